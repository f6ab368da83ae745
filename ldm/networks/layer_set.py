"""Which layers the networks are built of: those of the device, in one compute dtype.

Chosen once, by `build_model`.
"""

from functools import partial
from types import ModuleType

import mindspore as ms

from ldm.device import is_on_cpu
from ldm.networks import layers, layers_cpu


class LayerSet:
    """The layers of one module; those that multiply have the compute dtype already: `layer_set.Dense(320,
    640)`.

    Args:
        module: `layers` (what an accelerator runs; a CPU can, slowly) or `layers_cpu`.
        dtype: of the products, float32 or float16.
    """

    def __init__(self, module: ModuleType, dtype=ms.float32) -> None:
        self.dtype = dtype
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
        self.AddPerChannel, self.Attention = module.AddPerChannel, module.Attention


def layers_of_this_device(dtype=ms.float32) -> LayerSet:
    return LayerSet(layers_cpu if is_on_cpu() else layers, dtype)
