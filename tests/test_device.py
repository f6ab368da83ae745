import json
import logging
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from ldm import device as runtime

KEYS = ("GLOG_v", "ONEDNN_MAX_CPU_ISA", "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH")


def environment_after(code: str, **given) -> dict:
    """What a fresh process has in its environment after `import ldm` and `code`."""
    clean = {name: value for name, value in os.environ.items() if name not in (*KEYS, "MS_OM_PATH")}
    program = f"import json, os\nfrom ldm import device as runtime\n{code}\nprint(json.dumps(dict(os.environ)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean | given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_environment_is_set_but_never_over_the_users_own_setting():
    assert environment_after("", GLOG_v="1")["GLOG_v"] == "1"
    assert environment_after("")["GLOG_v"] == "3"


def test_importing_the_options_does_not_import_mindspore():
    program = "import sys, ldm.options, ldm.images, ldm.training.samples, ldm.device; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    # A thread that is there before StopSignals would take SIGINT to MindSpore's handler.
    program = "import train_dreambooth, os; raise SystemExit(len(os.listdir('/proc/self/task')) - 1)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_compile_cache_is_keyed_locked_and_put_where_the_user_says(tmp_path):
    def folder(*facts):
        return environment_after(f"runtime.enable_compile_cache(*{facts!r})", MS_COMPILER_CACHE_PATH=str(tmp_path))[
            "MS_COMPILER_CACHE_PATH"
        ]

    assert folder("train", 1) == folder("train", 1) != folder("train", 2)
    assert folder("train", 1).startswith(f"{tmp_path}{os.sep}")
    nested = (
        "runtime.enable_compile_cache('a')\nimport subprocess, sys\n"
        'code = \'from ldm import device as runtime; import os; runtime.enable_compile_cache("a"); print(os.environ["MS_COMPILER_CACHE_ENABLE"])\'\n'
        f"env = os.environ | {{'MS_COMPILER_CACHE_PATH': {str(tmp_path)!r}}}\n"
        "os.environ['SECOND'] = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout.strip()"
    )
    found = environment_after(nested, MS_COMPILER_CACHE_PATH=str(tmp_path))
    assert (found["MS_COMPILER_CACHE_ENABLE"], found["SECOND"]) == ("1", "0")


def test_compiled_graphs_of_a_run_that_was_killed_are_not_used(tmp_path):
    """Only what `keep_compiled_graphs` was called for is there at the next start."""
    given = {"MS_COMPILER_CACHE_PATH": str(tmp_path)}
    enable = "runtime.enable_compile_cache('a')\nfolder = os.environ['MS_COMPILER_CACHE_PATH']\n"
    write = "os.makedirs(folder + '/rank_0', exist_ok=True); open(folder + '/rank_0/graph', 'w')\n"
    look = "os.environ['FOUND'] = str(os.path.exists(folder + '/rank_0/graph'))\n"
    environment_after(enable + write, **given)
    assert environment_after(enable + look + write + "runtime.keep_compiled_graphs()", **given)["FOUND"] == "False"
    assert environment_after(enable + look, **given)["FOUND"] == "True"


def test_an_unwritable_cache_folder_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    found = environment_after("runtime.enable_compile_cache('a')", MS_COMPILER_CACHE_PATH=str(tmp_path / "file"))
    assert found["MS_COMPILER_CACHE_ENABLE"] == "0"


def test_litter_of_processes_that_are_gone_is_removed_and_nothing_else(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout.strip()
    mine = runtime.partial_path(tmp_path / "class_00001.png")
    theirs = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{gone}."))
    elsewhere = mine.with_name(f".class_00001.png.another-host.{gone}.part")
    kept = {mine, elsewhere, tmp_path / "class_00000.png", tmp_path / ".notes.part"}
    for path in kept | {theirs}:
        path.write_text("")
    runtime.remove_litter(tmp_path)
    assert set(tmp_path.iterdir()) == kept


def test_log_lines_go_to_the_file_too(tmp_path, capsys):
    before = logging.getLogger().handlers[:]
    try:
        runtime.start_logging("INFO", tmp_path / "train.log")
        logging.getLogger("x").info("hello")
        logging.getLogger("x").debug("hidden")
    finally:
        logging.getLogger().handlers[:] = before
    text = (tmp_path / "train.log").read_text()
    assert "INFO hello" in text and "hidden" not in text and "hello" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no Ascend device"):
        runtime.start_device("Ascend", 0)


def test_memory_is_short_where_training_would_not_fit():
    assert not runtime.memory_is_short(1 << 20)
    assert runtime.memory_is_short(1 << 50)


@pytest.mark.parametrize("cached", ["1", "0"])
def test_a_command_starts_again_once_and_finds_its_compile_cache(tmp_path, cached):
    """With its arguments, and with the folder of compiled graphs that the first start was given; not at all without the cache."""
    program = tmp_path / "command.py"
    program.write_text(
        "import os, sys\nfrom ldm import device as runtime\nprint(sys.argv[1:], os.environ['MS_COMPILER_CACHE_PATH'], flush=True)\n"
        "os.environ['MS_COMPILER_CACHE_PATH'] += '/digest'\nruntime.start_again()\nprint('done')\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "DREAMBOOTH_STARTED_AGAIN"}
    given = {"PYTHONPATH": str(ROOT), "MS_COMPILER_CACHE_PATH": "/graphs", "MS_COMPILER_CACHE_ENABLE": cached}
    done = subprocess.run([sys.executable, program, "--a=b c"], env=clean | given, capture_output=True, text=True, check=True)
    starts = 2 if cached == "1" else 1
    assert done.stdout.splitlines() == ["['--a=b c'] /graphs"] * starts + ["done"]


def test_stop_signals():
    """Postponed, the first one is only noted and the second one stops; otherwise the first one stops. The status is the shell's."""
    program = """
import os, signal, time
from ldm.device import Interrupted, StopSignals

def status_of(number):
    try:
        os.kill(os.getpid(), number)
        time.sleep(0.5)
    except Interrupted as end:
        return end.code

signals = StopSignals()
with signals.postponed():
    print(status_of(signal.SIGTERM), signals.received == signal.SIGTERM, status_of(signal.SIGINT))
print(status_of(signal.SIGTERM), StopSignals().received, status_of(signal.SIGINT))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["None True 130", "143 None 130"]


@pytest.mark.parametrize("package, found, fits", [
    ("mindspore", "2.6.0", False), ("mindspore", "2.7.0rc1", True), ("mindspore", "2.11.0", False), ("mindspore", "1.10.1", False),
    ("numpy", "2.1.3", False), ("numpy", "1.24.4", False), ("numpy", "1.26.4", True),
])  # fmt: skip
def test_a_version_that_does_not_fit_ends_in_one_line(tmp_path, package, found, fits):
    """The metadata of that version comes first on the path; nothing of it is imported where it does not fit."""
    folder = tmp_path / f"{package}-{found}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {found}\n")
    if fits:
        program = "from ldm.device import require_versions; require_versions()"
        assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}).returncode == 0
        return
    for command in (["text_to_image.py", "--ckpt_path=README.md"], ["scripts/convert_checkpoint.py", "README.md", str(tmp_path / "out")]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f": error: {package} {found} does not fit: {package} from " in done.stderr
