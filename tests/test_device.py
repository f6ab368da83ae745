import json
import os
import subprocess
import sys

import mindspore
import pytest
from conftest import ROOT

from ldm import device, precision
from ldm.device import family_of, start_device
from ldm.precision import settle_precision


def environment_after(code: str, **given) -> dict:
    """What a fresh process has in its environment after `import ldm` and `code`."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GLOG_v", "MS_OM_PATH")}
    program = f"import json, os\nimport ldm\n{code}\nprint(json.dumps(dict(os.environ)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=clean | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_environment_is_set_but_never_over_the_users_own_setting():
    assert environment_after("", GLOG_v="1")["GLOG_v"] == "1"
    assert environment_after("")["GLOG_v"] == "3"


def test_importing_the_options_does_not_import_mindspore():
    program = (
        "import sys, ldm.command_line, ldm.options, ldm.images, ldm.training.samples, ldm.device; "
        "sys.exit('mindspore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    # A thread that is there before StopSignals would take SIGINT to MindSpore's handler.
    program = "import train_dreambooth, os; raise SystemExit(len(os.listdir('/proc/self/task')) - 1)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(
        ValueError, match="MindSpore cannot load CANN .libge_runner.so: cannot open .*set_env.sh"
    ):
        start_device("Ascend", 0)


def test_an_ascend_host_without_cann_is_told_why_the_cpu_is_used(monkeypatch, caplog):
    """Whoever forgot set_env.sh would wait twenty seconds a step without it."""
    monkeypatch.setattr(
        mindspore, "set_device", lambda *_: None
    )  # once only, and before anything is computed
    assert start_device("auto", 0) == "CPU" and not caplog.messages
    monkeypatch.setattr(device, "_looks_like_an_ascend_host", lambda: True)
    assert start_device("auto", 0) == "CPU"
    (message,) = caplog.messages
    assert (
        "this host has an Ascend, but the CPU is used: MindSpore cannot load CANN (libge_runner.so" in message
    )
    assert start_device("CPU", 0) == "CPU" and len(caplog.messages) == 1


@pytest.mark.parametrize(
    "chip, family",
    [
        ("Ascend910B2", "ascend910b"),
        ("Ascend910_9391", "ascend910_93"),
        ("Ascend910A", "ascend910"),
        ("Ascend910ProB", "ascend910"),
        ("Ascend910B", "ascend910"),  # without a digit a chip of the first generation
    ],
)
def test_the_family_of_a_chip(chip, family):
    assert family_of(chip) == family


@pytest.mark.parametrize(
    "family, asked, configured, expected",
    [
        ("", "auto", "auto", "float32"),
        ("", "auto", "float16", "float16"),
        ("", "float32", "float16", "float32"),
        ("", "bfloat16", "auto", "needs a C\\+\\+ compiler and a processor with AVX512-BF16"),
        ("ascend910", "auto", "auto", "float16"),
        ("ascend910", "auto", "float32", "multiplies in float16 then, too, but without a loss scale"),
        ("ascend910", "bfloat16", "auto", "does not know it; give float16"),
        ("ascend910b", "auto", "auto", "float16"),
        ("ascend910b", "auto", "float32", "float32"),
        ("ascend910b", "bfloat16", "float32", "bfloat16"),
    ],
)
def test_the_precision_is_the_devices_unless_it_is_said(family, asked, configured, expected, monkeypatch):
    told = []
    monkeypatch.setattr(precision, "is_on_cpu", lambda: not family)
    monkeypatch.setattr(precision, "soc", lambda: family)
    monkeypatch.setattr(precision, "_tell_device", told.append)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    if expected in ("float32", "float16", "bfloat16"):
        assert settle_precision(asked, configured) == expected and told == [expected] * bool(family)
        return
    with pytest.raises(ValueError, match=f"{expected}.*--force_precision"):
        settle_precision(asked, configured)
    forced = settle_precision(asked, configured, is_forced=True)
    assert forced == (asked if asked != "auto" else configured)


@pytest.mark.parametrize("package, found, fits", [
    ("mindspore", "2.6.0", False), ("mindspore", "2.7.0rc1", True), ("mindspore", "2.11.0", False),
    ("mindspore", "1.10.1", False),
    ("numpy", "2.1.3", False), ("numpy", "1.24.4", False), ("numpy", "1.26.4", True),
])  # fmt: skip
def test_a_version_that_does_not_fit_ends_in_one_line(tmp_path, package, found, fits):
    """The metadata of that version comes first on the path; nothing of it is imported."""
    folder = tmp_path / f"{package}-{found}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {found}\n")
    if fits:
        program = "from ldm.device import require_versions; require_versions()"
        assert (
            subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}
            ).returncode
            == 0
        )
        return
    for command in (
        ["text_to_image.py", "--ckpt_path=models/tiny_sd_v2.safetensors"],
        ["scripts/convert_checkpoint.py", "README.md", str(tmp_path / "out")],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f": error: {package} {found} does not fit: {package} from " in done.stderr
