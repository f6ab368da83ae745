"""Where compiled graphs are kept, for whom, and when they are found again.

Each in a process of its own, as it changes the environment.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

KEYS = (
    "MS_COMPILER_CACHE_ENABLE",
    "MS_COMPILER_CACHE_PATH",
    "ONEDNN_MAX_CPU_ISA",
    "DREAMBOOTH_STARTED_AGAIN",
)


def environment_after(code: str, **given) -> dict:
    """What a fresh process has in its environment after `code`."""
    clean = {name: value for name, value in os.environ.items() if name not in KEYS}
    program = (
        f"import json, os\nfrom ldm.run.compile_cache import "
        f"CompileCache\n{code}\nprint(json.dumps(dict(os.environ)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=clean | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_keyed_locked_and_put_where_the_user_says(tmp_path):
    def folder(**facts):
        code = f"cache = CompileCache.open(True, {facts!r})"
        return environment_after(code, MS_COMPILER_CACHE_PATH=str(tmp_path))["MS_COMPILER_CACHE_PATH"]

    assert folder(size=1, batch=2) == folder(batch=2, size=1) != folder(size=2, batch=2)
    assert folder(size=1).startswith(f"{tmp_path}{os.sep}")
    nested = (
        "cache = CompileCache.open(True, {})\nimport subprocess, sys\n"
        "code = 'from ldm.run.compile_cache import CompileCache; print(CompileCache.open(True, {}).folder)'\n"
        f"env = os.environ | {{'MS_COMPILER_CACHE_PATH': {str(tmp_path)!r}}}\n"
        "os.environ['SECOND'] = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, "
        "text=True).stdout.strip()"
    )
    found = environment_after(nested, MS_COMPILER_CACHE_PATH=str(tmp_path))
    assert (found["MS_COMPILER_CACHE_ENABLE"], found["SECOND"]) == ("1", "None")


def test_it_is_off_where_it_is_not_wanted_or_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for code in ("CompileCache.open(False, {})", "CompileCache.open(True, {})"):
        found = environment_after(
            f"cache = {code}\ncache.mark_complete()", MS_COMPILER_CACHE_PATH=str(tmp_path / "file")
        )
        assert found["MS_COMPILER_CACHE_ENABLE"] == "0"


def test_compiled_graphs_of_a_run_that_was_killed_are_not_used(tmp_path):
    """Only what `mark_complete` was called for is there at the next start."""
    given = {"MS_COMPILER_CACHE_PATH": str(tmp_path)}
    enable = "cache = CompileCache.open(True, {})\nfolder = os.environ['MS_COMPILER_CACHE_PATH']\n"
    write = "os.makedirs(folder + '/rank_0', exist_ok=True); open(folder + '/rank_0/graph', 'w')\n"
    look = "os.environ['FOUND'] = str(os.path.exists(folder + '/rank_0/graph'))\n"
    environment_after(enable + write, **given)
    assert environment_after(enable + look + write + "cache.mark_complete()", **given)["FOUND"] == "False"
    assert environment_after(enable + look, **given)["FOUND"] == "True"


@pytest.mark.parametrize("cached, given", [(True, "graphs"), (True, None), (False, "graphs")])
def test_a_command_restarts_once_and_finds_its_compile_cache(tmp_path, cached, given):
    """With its arguments, and with the folder of compiled graphs that the first start was given; not at all
    without the cache. MindSpore, which sets a number of threads for itself, leaves no trace of it.
    """
    program = tmp_path / "command.py"
    program.write_text(
        "import os, sys\nfrom ldm.run.compile_cache import CompileCache\n"
        "threads = os.environ.get('OMP_NUM_THREADS')\n"
        "print(sys.argv[1:], os.environ.get('MS_COMPILER_CACHE_PATH'), threads, flush=True)\n"
        "import mindspore\n"
        f"cache = CompileCache.open({cached}, {{}})\n"
        "cache.restart_if_large(lambda: print('compiling', flush=True), 1 << 50)\nprint('done')\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in (*KEYS, "OMP_NUM_THREADS")}
    variables = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    variables |= {"MS_COMPILER_CACHE_PATH": str(tmp_path / given)} if given else {}
    done = subprocess.run(
        [sys.executable, program, "--a=b c"],
        env=clean | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    start = f"['--a=b c'] {tmp_path / given if given else None} None"
    assert done.stdout.splitlines() == ([start, "compiling", start] if cached else [start]) + ["done"]


def test_a_small_training_does_not_restart(tmp_path):
    code = "CompileCache.open(True, {}).restart_if_large(lambda: 1 / 0, 1 << 20)"
    environment_after(code, MS_COMPILER_CACHE_PATH=str(tmp_path))
