"""The operators of networks/native/operators.cc, which a C++ compiler makes once, for the processor at hand.

Where there is no compiler, the networks are built of MindSpore's own operators: see networks/layers_cpu.py.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ldm import files

SOURCES = Path(__file__).parent / "networks" / "native"
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")
logger = logging.getLogger(__name__)


def compiler() -> str | None:
    """The user's CXX, or g++ or clang++."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)


@functools.cache
def library() -> Path | None:
    """The library of the operators, made where it is not in the user's cache; None where it cannot be had."""
    program = compiler()
    if platform.system() != "Linux" or not program:
        return None
    digest = hashlib.sha256(repr((program, OPTIONS, processor())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    found = Path(files.cache_folder()) / f"operators-{digest.hexdigest()[:20]}.so"
    if not found.exists() and not _compile(program, found):
        return None
    # MindSpore sets OMP_NUM_THREADS to 1 for itself, where only C sees it
    threads = os.environ.get("OMP_NUM_THREADS", "")
    ctypes.CDLL(str(found)).use_threads(int(threads) if threads.isdecimal() else len(os.sched_getaffinity(0)))
    return found


def _compile(program: str, found: Path) -> bool:
    logger.info("compiling the operators for this processor, once")
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=found.parent) as folder:
            made = Path(folder) / found.name
            command = [*shlex.split(program), *OPTIONS, "-o", str(made), str(SOURCES / "operators.cc")]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, found)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        logger.warning("this project's own operators cannot be compiled (%s): slower ones are used", reason)
        return False
    return True


def processor() -> str:
    """What tells this processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def has_bfloat16() -> bool:
    """Whether the operators multiply bfloat16 here: where the processor does (AVX512-BF16)."""
    return library() is not None and bool(ctypes.CDLL(str(library())).has_bfloat16())


def operator(name: str, shapes, answers: int = 1, kind: tuple = (), writes: tuple = ()):
    """An operator by its name.

    Args:
        shapes: the shape of its answer, or a tuple of them, of the shapes of its inputs.
        answers: how many there are.
        kind: what else `shapes` depends on. MindSpore takes two operators of one name for the same unless
            something that it sees tells them apart, and one's shapes for the other's.
        writes: for each input, whether it is a parameter that is written to; (): none is.
    """
    import mindspore as ms
    from mindspore import ops
    from mindspore.ops import signature

    dtypes = ms.float32 if answers == 1 else (ms.float32,) * answers
    made = ops.Custom(f"{library()}:{name}", shapes, lambda *_: dtypes, func_type="aot")
    made.add_prim_attr("kind", repr((answers, kind)))
    if writes:  # MindSpore orders it after all that reads them before, and before all that reads them later
        access = (signature.sig_rw.RW_READ, signature.sig_rw.RW_WRITE)
        made.set_signatures([signature.make_sig(f"x{i}", access[its]) for i, its in enumerate(writes)])
        made.add_prim_attr("side_effect_mem", True)
    return made
