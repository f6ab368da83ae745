"""A CANN of empty functions, with which MindSpore's Ascend back end loads where neither it nor an Ascend is.

MindSpore's wheel holds that whole back end; only CANN's libraries are missing. Stub libraries of their names
are made from the wheel's own symbol tables: what the wheel calls answers 0, but for the few functions of
`device.c` and the classes of `ge_objects.cc`. Nothing of CANN is in them, and MindSpore is not imported.

usage: python scripts/dry_run/make_stubs.py FOLDER      (gcc, g++ and binutils; for x86-64)
"""

import platform
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("gcc", "g++", "nm", "strings", "c++filt")
CANN = (  # its libraries, beside libascendcl and libopapi
    "acl_dvpp acl_dvpp_mpi acl_dvpp_op acl_mdl acl_op_compiler acl_prof acl_tdt_channel acl_tdt_queue "
    "ascend_hal ascendalog atb c_sec ge_runner graph hccl mmpa msprofiler nnopbase platform profapi register "
    "runtime shmem"
).split()
OPAPI = (  # what libopapi has beside the operators
    "aclCreateTensor aclDestroyTensor aclCreateScalar aclDestroyScalar aclCreateIntArray aclDestroyIntArray "
    "aclCreateFloatArray aclDestroyFloatArray aclCreateBoolArray aclDestroyBoolArray aclCreateTensorList "
    "aclDestroyTensorList aclSetAclOpExecutorRepeatable aclDestroyAclOpExecutor InitHugeMemThreadLocal "
    "UnInitHugeMemThreadLocal ReleaseHugeMem"
).split()
RETURN_THEMSELVES = ("ge::Operator::", "ge::TensorDesc::Set", "ops::Op")  # setters, called in chains
NOT_CANN = ("Py", "_Py", "__", "_ITM_", "_ZTH", "_Jv")
LINK = "-Wl,--no-as-needed"


def mindspore_folder() -> Path:
    """Where MindSpore is installed; it is not imported."""
    return Path(find_spec("mindspore").origin).parent


def make_stubs(folder: Path) -> Path:
    """Make the stub libraries in `folder`, unless they are there for this MindSpore. Returns the folder.

    Raises:
        ValueError: a compiler is missing, or this is no x86-64.
        subprocess.CalledProcessError: a tool failed.
    """
    mindspore = mindspore_folder()
    stamp, version = folder / "made_for", f"{mindspore} {mindspore.stat().st_mtime_ns} {_own_sources()}"
    if stamp.exists() and stamp.read_text() == version:
        return folder
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not found; apt-get install gcc g++ binutils")
    if platform.machine() != "x86_64":
        raise ValueError(f"the stub libraries are for x86_64, got {platform.machine()}")
    library, build = folder / "latest/lib64", folder / "build"
    for path in (library, build):
        path.mkdir(parents=True, exist_ok=True)
    _build(mindspore, library, build, folder)
    stamp.write_text(version)
    return folder


def _own_sources() -> int:
    names = ("make_stubs.py", "device.c", "ge_objects.cc", "preloaded.c")
    return max((HERE / name).stat().st_mtime_ns for name in names)


def _build(mindspore: Path, library: Path, build: Path, folder: Path) -> None:
    plugin = mindspore / "lib/plugin"
    parts = [path for path in (plugin / "ascend").rglob("*.so*") if path.is_file()]
    parts = [path for path in parts if "op_impl" not in str(path) and "custom_aicpu" not in str(path)]
    back_end = [
        mindspore / "lib/libmindspore_ge_backend.so",
        plugin / "libmindspore_ascend.so.2",
        plugin / "libmindspore_ops_ascend.so",
    ]
    ours = [*parts, *back_end]
    rest = [*(mindspore / "lib").glob("*.so*"), *plugin.glob("*.so*"), *mindspore.glob("_c_expression*.so")]
    system = _system_libraries()
    there = _symbols([*ours, *rest, *system], "defined")
    called = {name for name in _symbols(ours, "undefined") - there if not name.startswith(NOT_CANN)}
    looked_up, pointers = _looked_up_by_name(mindspore)
    words = _words([*back_end, plugin / "ascend/libmindspore_ascend_res_manager.so"])
    called |= {name for name in words if re.fullmatch(r"(Hccl|Hcom|rt)[A-Z]\w*", name)} - there
    operators = {name for name in words if re.fullmatch(r"aclnn[A-Z]\w*", name)}
    operators |= {f"{name}GetWorkspaceSize" for name in operators} | set(OPAPI)

    _run("gcc", "-c", _assembly(called | looked_up, build / "stubs.s", pointers), "-o", build / "stubs.o")
    _run("gcc", "-c", "-fPIC", HERE / "device.c", "-o", build / "device.o")
    old_abi = "-D_GLIBCXX_USE_CXX11_ABI=0"
    _run("g++", old_abi, "-O1", "-fPIC", "-c", HERE / "ge_objects.cc", "-o", build / "ge.o")
    objects = [build / name for name in ("stubs.o", "device.o", "ge.o")]
    _run("g++", "-shared", "-o", library / "libascendcl.so", *objects)
    plain = ["gcc", "-shared", "-nostdlib"]
    _run(*plain, "-o", library / "libopapi.so", _assembly(operators, build / "opapi.s"))
    (build / "empty.c").write_text("")
    for name in CANN:
        target = library / f"lib{name}.so"
        _run(*plain, build / "empty.c", "-o", target, f"-L{library}", LINK, "-lascendcl")
    # MindSpore's own library of collectives does not load without CANN's definitions of operators: an empty
    # one of the same name is loaded before it
    own = plugin / "ascend/libd_collective.so"
    others = _symbols([path for path in ours if path != own], "undefined")
    used = (_symbols([own], "defined") & others) - _symbols(system, "defined")
    (folder / "python/hccl").mkdir(parents=True, exist_ok=True)  # the wheel of CANN that MindSpore asks for
    (folder / "python/hccl/sys_version.py").write_text('__sys_version__ = "0.0"\n')
    _run(
        *plain, "-fPIC", "-Wl,-soname,libd_collective.so", "-o", folder / "libd_collective.so",
        _assembly(used, build / "collective.s"), HERE / "preloaded.c", LINK,
        mindspore / "lib/libmindspore_cluster.so", "-Wl,--allow-shlib-undefined",
    )  # fmt: skip


def _run(*words, given: str | None = None) -> str:
    return subprocess.run(
        [str(word) for word in words], input=given, capture_output=True, text=True, check=True
    ).stdout


def _system_libraries() -> list[Path]:
    names = "libc.so.6 libstdc++.so.6 libm.so.6 libgcc_s.so.1 libgomp.so.1 libpthread.so.0 libdl.so.2".split()
    found = [Path(_run("gcc", f"-print-file-name={name}").strip()) for name in names]
    return [path for path in found if path.is_absolute() and path.exists()]


def _symbols(paths: list[Path], kind: str) -> set[str]:
    """Names in the dynamic symbol tables, without versions; `kind` is defined or undefined."""
    names = set()
    for path in paths:
        table = subprocess.run(["nm", "-D", f"--{kind}-only", str(path)], capture_output=True, text=True)
        names |= {line.split()[-1].split("@")[0] for line in table.stdout.splitlines() if line.strip()}
    return names


def _words(paths: list[Path]) -> set[str]:
    """Texts in libraries: what they look up by name is among them."""
    return {word for path in paths for word in _run("strings", "-n", "6", path).splitlines()}


def _looked_up_by_name(mindspore: Path) -> tuple[set[str], set[str]]:
    """Names of functions in the wheel's own headers, and those of them that return a pointer."""
    folder = mindspore / "include/mindspore/ccsrc/plugin/ascend/res_manager/symbol_interface"
    pattern = re.compile(r"ORIGIN_METHOD(?:_WITH_SIMU(?:_CREATE)?)?\((\w+),\s*([^,)]+)")
    found = [pair for header in folder.glob("*.h") for pair in pattern.findall(header.read_text())]
    return {name for name, _ in found}, {name for name, result in found if "*" in result}


def _assembly(names: set[str], path: Path, pointers: set[str] = frozenset()) -> Path:
    """Write functions of these names that return 0, an empty block (pointers), or their object (setters)."""
    ordered = sorted(names)
    readable = _run("c++filt", given="\n".join(ordered)).splitlines()
    lines = [".text"]
    for name, plain in zip(ordered, readable, strict=True):
        answer = "leaq block(%rip), %rax" if name in pointers else "xorl %eax, %eax"
        if plain.startswith(RETURN_THEMSELVES) and "::Get" not in plain:
            answer = "movq %rdi, %rax"
        lines += [f".weak {name}", f".type {name},@function", f"{name}:", answer, "ret"]
    lines += [".bss", ".balign 64", "block: .zero 65536", '.section .note.GNU-stack,"",@progbits', ""]
    path.write_text("\n".join(lines))
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(make_stubs(Path(sys.argv[1])))
