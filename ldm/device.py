"""MindSpore itself: what must be set before it is imported, its version, the device that it computes on, and
in which precision.

`prepare_environment` runs on `import ldm`, since some variables count only before mindspore is imported;
mindspore itself is imported by `start_device`, so that --help and a typing error need not wait for it.
"""

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ldm.memory import own_memory

VERSIONS = {"mindspore": ((2, 7), (2, 11)), "numpy": ((1, 25), (2, 0))}  # from the first to before the second
FIRST_GENERATION = "ascend910"  # MindSpore's name for the first Ascend 910, whatever its chip is called
NEWER = ("ascend910b", "ascend910_93")  # the Atlas A2 and A3 training series
logger = logging.getLogger(__name__)


def prepare_environment() -> None:
    """Set what must be set before `import mindspore`, never over the user's own setting."""
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's C++ log: errors only
    # What MindSpore leaves behind when a graph does not compile goes there, not into the user's folder.
    os.environ.setdefault("MS_OM_PATH", os.path.join(tempfile.gettempdir(), f"mindspore-{os.getuid()}"))


def is_dry_run() -> bool:
    """Whether MindSpore is told to compute nothing (MS_SIMULATION_LEVEL): graphs are compiled for an Ascend,
    kernels chosen and memory counted, but all results are meaningless.
    """
    return bool(os.environ.get("MS_SIMULATION_LEVEL"))


def start_device(device: str, mode: int, deterministic: bool | None = None) -> str:
    """Import mindspore and choose the device; returns its name.

    Args:
        device: "auto", "Ascend" or "CPU".
        mode: 0 graph mode, 1 PyNative.
        deterministic: on Ascend the same bits in every run; None: of exchanges between devices only.

    Raises:
        ValueError: MindSpore or NumPy is of a version that does not fit, or a forced device is not there.
    """
    require_versions()
    import mindspore as ms

    os.environ["MS_COMPILER_CACHE_ENABLE"] = (
        "0"  # MindSpore's own keys are too few: see ldm/run/compile_cache.py
    )
    reason = "" if device == "CPU" else _why_there_is_no_ascend(ms)
    if device == "Ascend" and reason:
        raise ValueError(f"device Ascend: {reason}; or give --device CPU")
    if device == "auto" and reason and _looks_like_an_ascend_host():
        logger.warning("this host has an Ascend, but the CPU is used: %s", reason)
    chosen = "CPU" if device == "CPU" or reason else "Ascend"
    number = [int(os.environ["DEVICE_ID"])] if chosen == "Ascend" and "DEVICE_ID" in os.environ else []
    ms.set_device(chosen, *number)
    ms.set_context(mode=ms.PYNATIVE_MODE if mode else ms.GRAPH_MODE)
    if chosen == "Ascend":
        _make_deterministic(ms, deterministic)
    return chosen


def log_device(precision: str) -> None:
    """Say on what the program runs."""
    where = f"Ascend ({soc() or 'of an unknown family'})" if not is_on_cpu() else "CPU"
    logger.info("MindSpore %s on %s, precision %s", version("mindspore"), where, precision)
    if is_dry_run():
        logger.warning(
            "MS_SIMULATION_LEVEL: a dry run, which computes nothing; it writes into folders dry_run"
        )


def is_on_cpu() -> bool:
    """Whether MindSpore computes on the CPU."""
    import mindspore as ms

    return ms.get_context("device_target") == "CPU"


def soc() -> str:
    """MindSpore's name for the family of the Ascend in use: `ascend910` (the first), `ascend910b` (Atlas A2),
    `ascend910_93` (A3); empty on a CPU, or where this MindSpore does not say.

    Not the name of the chip: the one called Ascend910B, without a digit, is of the first family. In a dry
    run, in which MindSpore does not say, the variable DRY_RUN_SOC names the chip.
    """
    if is_on_cpu():
        return ""
    if is_dry_run():
        return family_of(os.environ.get("DRY_RUN_SOC", "Ascend910B2"))
    try:
        from mindspore._c_expression import MSContext

        return MSContext.get_instance().get_ascend_soc_version()
    except (ImportError, AttributeError, RuntimeError):
        return ""


def family_of(chip: str) -> str:
    """Of CANN's name of a chip, as MindSpore assigns them."""
    if re.match(r"Ascend910B\d", chip):
        return "ascend910b"
    return "ascend910_93" if chip.startswith("Ascend910_93") else FIRST_GENERATION


def has_newer_kernels() -> bool:
    """Whether MindSpore runs CANN's newer kernels on the device in use, fused attention among them: on Atlas
    A2 and A3, kernel by kernel. On the first Ascend 910 a graph runs as one (GE), of the older operators.
    """
    return soc() in NEWER


def memory_in_use() -> int:
    """Bytes that this process has now: of the device's memory, on a CPU of the machine's; 0 where that cannot
    be told.
    """
    if is_on_cpu():
        return own_memory()
    import mindspore as ms

    try:
        return int(ms.runtime.memory_allocated())
    except (AttributeError, RuntimeError):
        return 0


def _make_deterministic(ms, deterministic: bool | None) -> None:
    if deterministic:
        ms.set_deterministic(True)
    elif deterministic is None:
        os.environ.setdefault("HCCL_DETERMINISTIC", "true")


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


def _why_there_is_no_ascend(ms) -> str:
    """Why MindSpore has no Ascend here, and what to do; empty where it has one."""
    error = _loader_error()
    if error:
        return f"MindSpore cannot load CANN ({error}); install it and source its set_env.sh in this shell"
    if is_dry_run():
        return ""
    try:
        if ms.device_context.ascend.device_count() > 0:
            return ""
        return "MindSpore finds no Ascend device here (npu-smi info lists them)"
    except Exception as error:  # no driver: MindSpore raises whatever its loader raised
        return f"MindSpore finds no Ascend device here ({_in_a_line(error)})"


def _loader_error() -> str:
    """What MindSpore's loader of the Ascend back end met first, which its log hides."""
    try:
        from mindspore._c_expression import MSContext

        lines = MSContext.get_instance().load_plugin_error().strip().splitlines()
    except (ImportError, AttributeError, RuntimeError):
        return ""
    ascend = [line for line in lines if "ascend" in line.lower()]
    return ascend[0].split(" failed. ")[-1].strip() if ascend else ""


def _in_a_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _looks_like_an_ascend_host() -> bool:
    return Path("/dev/davinci_manager").exists() or bool(shutil.which("npu-smi"))


@contextlib.contextmanager
def graphs_not_kept() -> Iterator[None]:
    """What is compiled within is not kept for the next start: MindSpore numbers graphs by their order, so
    that all starts must compile the same ones.
    """
    name = "MS_COMPILER_CACHE_ENABLE"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
