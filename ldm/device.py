"""MindSpore itself: what must be set before it is imported, its version, and the device that it computes on.

`prepare_environment` runs on `import ldm`, since some variables count only before mindspore is imported;
mindspore itself is imported by `start_device`, so that --help and a typing error need not wait for it.
"""

import logging
import os
import re
import tempfile
from importlib.metadata import PackageNotFoundError, version

VERSIONS = {"mindspore": ((2, 7), (2, 11)), "numpy": ((1, 25), (2, 0))}  # from the first to before the second
logger = logging.getLogger(__name__)


def prepare_environment() -> None:
    """Set what must be set before `import mindspore`, never over the user's own setting."""
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    # What MindSpore leaves behind when a graph does not compile goes there, not into the user's folder.
    os.environ.setdefault("MS_OM_PATH", os.path.join(tempfile.gettempdir(), f"mindspore-{os.getuid()}"))


def start_device(device: str, mode: int) -> str:
    """Import mindspore and choose the device; returns its name.

    Args:
        device: "auto", "Ascend" or "CPU".
        mode: 0 graph mode, 1 PyNative.

    Raises:
        ValueError: MindSpore or NumPy is of a version that does not fit, or a forced device is not there.
    """
    require_versions()
    import mindspore as ms

    os.environ["MS_COMPILER_CACHE_ENABLE"] = (
        "0"  # MindSpore's own keys are too few: see ldm/run/compile_cache.py
    )
    available = _ascend_is_available(ms)
    if device == "Ascend" and not available:
        raise ValueError("device Ascend: MindSpore finds no Ascend device here; give --device CPU or auto")
    chosen = device if device != "auto" else "Ascend" if available else "CPU"
    number = [int(os.environ["DEVICE_ID"])] if chosen == "Ascend" and "DEVICE_ID" in os.environ else []
    ms.set_device(chosen, *number)
    ms.set_context(mode=ms.PYNATIVE_MODE if mode else ms.GRAPH_MODE)
    logger.info("MindSpore %s on %s", ms.__version__, chosen)
    return chosen


def is_on_cpu() -> bool:
    """Whether MindSpore computes on the CPU."""
    import mindspore as ms

    return ms.get_context("device_target") == "CPU"


def require_versions() -> None:
    """Raises ValueError where MindSpore or NumPy is missing or of a version that this program does not work
    with.
    """
    for package, (first, end) in VERSIONS.items():
        required = f"{package} from {first[0]}.{first[1]} to before {end[0]}.{end[1]}"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise ValueError(
                f"{package} is not installed: {required} is needed (README, Dependencies)"
            ) from None
        numbers = tuple(int(re.match(r"\d*", part)[0] or 0) for part in found.split(".")[:2])
        if not first <= numbers < end:
            raise ValueError(f"{package} {found} does not fit: {required} is needed (README, Dependencies)")


def _ascend_is_available(ms) -> bool:
    try:
        return ms.device_context.ascend.device_count() > 0
    except Exception as error:  # no driver: MindSpore raises whatever its loader raised
        logger.debug("no Ascend: %s", error)
        return False
