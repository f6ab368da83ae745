"""Which layers the networks are built of: those of the device, in one compute dtype.

Chosen once, by `build_model`.
"""

from functools import partial
from types import ModuleType

import mindspore as ms

from ldm.device import has_newer_kernels, is_on_cpu
from ldm.networks import layers, layers_cpu
from ldm.operators import library


class LayerSet:
    """The layers of one module; those that multiply have the compute dtype already: `layer_set.Dense(320,
    640)`.

    Args:
        module: `layers` (plain, for any device), `layers_cpu` or `layers_ascend` (Atlas A2 and A3).
        dtype: of the products, float32, float16 or bfloat16.
        fuses_attention: by one kernel, where the device has it.
    """

    def __init__(self, module: ModuleType, dtype=ms.float32, fuses_attention: bool = True) -> None:
        # the project's own operators round within a product: all else is float32
        self.dtype = ms.float32 if module.__name__.endswith("native") else dtype
        self.Dense = partial(module.Dense, dtype=dtype)
        self.PlacesToTokens = partial(module.PlacesToTokens, dtype=dtype)
        self.TokensToPlaces = partial(module.TokensToPlaces, dtype=dtype)
        self.Conv2d = partial(module.Conv2d, dtype=dtype)
        self.UpsampledConv2d = partial(module.UpsampledConv2d, dtype=dtype)
        self.GroupNorm, self.GroupNormSiLU, self.LayerNorm = (
            module.GroupNorm,
            module.GroupNormSiLU,
            module.LayerNorm,
        )
        self.GELU, self.QuickGELU, self.GatedGELU = module.GELU, module.QuickGELU, module.GatedGELU
        self.AddPerChannel, self.CausalAttention = module.AddPerChannel, module.CausalAttention
        self.Attention = partial(module.Attention, fuses=fuses_attention and has_newer_kernels(), dtype=dtype)


def layers_of_this_device(dtype=ms.float32, fuses_attention: bool = True) -> LayerSet:
    if is_on_cpu():
        if library():
            from ldm.networks import layers_native

            return LayerSet(layers_native, dtype)
        return LayerSet(layers_cpu, dtype)
    if not has_newer_kernels():
        return LayerSet(layers, dtype, fuses_attention)
    from ldm.networks import layers_ascend  # whose operators a MindSpore without an Ascend need not have

    layers_ascend.add_gradients_by_add()
    return LayerSet(layers_ascend, dtype, fuses_attention)
