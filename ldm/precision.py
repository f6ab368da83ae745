"""In which precision the networks compute on a device."""

from ldm.device import FIRST_GENERATION, is_on_cpu, soc
from ldm.operators import has_bfloat16


def default_precision() -> str:
    """What an Ascend is fast at, as in the 2023 example; float32 on a CPU."""
    return "float32" if is_on_cpu() else "float16"


def settle_precision(asked: str, configured: str, is_forced: bool = False) -> str:
    """What the networks compute in on this device: float32, float16 or bfloat16; the device is told.

    Args:
        asked: by an option; "auto": as the model configuration says, and if that is "auto", float16 on an
            Ascend and float32 on a CPU.
        is_forced: also where the device does not compute in it.

    Raises:
        ValueError: the device does not compute in it.
    """
    precision = asked if asked != "auto" else configured
    if precision == "auto":
        precision = default_precision()
    reason = None if is_forced else _why_not(precision)
    if reason:
        raise ValueError(f"precision {precision}: {reason}; or force it: --force_precision=True")
    if not is_on_cpu():
        _tell_device(precision)
    return precision


def _why_not(precision: str) -> str | None:
    if precision == "bfloat16" and is_on_cpu():
        if has_bfloat16():
            return None
        return "on a CPU it needs a C++ compiler and a processor with AVX512-BF16; give float32"
    if soc() != FIRST_GENERATION:
        return None
    if precision == "bfloat16":
        return "the first Ascend 910 does not know it; give float16"
    if precision == "float32":
        return (
            "the first Ascend 910 multiplies in float16 then, too, but without a loss scale and without a "
            "look at overflows; give float16"
        )
    return None


def _tell_device(precision: str) -> None:
    """Kernels compute in the dtypes that the graph says; their defaults differ from version to version."""
    from mindspore.device_context.ascend import op_precision

    has_float32 = soc() != FIRST_GENERATION
    keeps = "must_keep_origin_dtype" if has_float32 or precision != "float32" else "allow_fp32_to_fp16"
    op_precision.precision_mode(keeps)
    op_precision.conv_allow_hf32(False)
    op_precision.matmul_allow_hf32(False)
