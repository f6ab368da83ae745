"""Log lines, and how a command ends."""

import logging
import signal
import sys

import pytest

from ldm.command_line import Ending, Interrupted, Pace, duration, make_parser, start_logging
from ldm.options import TrainOptions
from ldm.sample_options import SampleOptions


def test_log_lines_go_to_the_file_too(tmp_path, capsys):
    before = logging.getLogger().handlers[:]
    try:
        start_logging("INFO", tmp_path / "train.log")
        logging.getLogger("x").info("hello")
        logging.getLogger("x").debug("hidden")
    finally:
        logging.getLogger().handlers[:] = before
    text = (tmp_path / "train.log").read_text()
    assert "INFO hello" in text and "hidden" not in text and "hello" in capsys.readouterr().err


def test_warnings_name_their_rank(capsys):
    before = logging.getLogger().handlers[:]
    try:
        start_logging("WARNING", who="rank 3 ")
        logging.getLogger("x").warning("hello")
    finally:
        logging.getLogger().handlers[:] = before
    assert "rank 3 WARNING hello" in capsys.readouterr().err


def ended(error, capsys, rank=0, size=1, **more) -> tuple[int, str]:
    """Exit status and standard error of a command that an error ends."""
    with pytest.raises(SystemExit) as stop, Ending("train_dreambooth.py", **more) as ending:
        ending.joined(rank, size)
        raise error
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("no\nsuch  thing"), OSError("no such thing"), FloatingPointError("no such thing")]
)
def test_an_error_of_the_user_is_one_line_and_status_2(error, capsys):
    assert ended(error, capsys) == (2, "train_dreambooth.py: error: no such thing\n")


def test_a_full_disk_says_where_to_look(capsys):
    error = OSError(28, "No space left on device", "out/.a.part")
    assert ended(error, capsys)[1].endswith("`df -i` whether of files (inodes)\n")


def test_a_signal_has_the_shells_status_and_says_how_to_continue(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_dreambooth.py", "--class_prompt=a dog"])
    for number in (signal.SIGINT, signal.SIGTERM):
        code, text = ended(Interrupted(128 + number), capsys, can_be_resumed=True)
        assert code == 128 + number
        assert (
            text
            == "stopped; continue with: python train_dreambooth.py '--class_prompt=a dog' --resume=latest\n"
        )
    assert ended(KeyboardInterrupt(), capsys) == (130, "train_dreambooth.py: interrupted\n")
    assert ended(Interrupted(143), capsys, rank=1, size=2, can_be_resumed=True) == (143, "")
    code, text = ended(Interrupted(143), capsys, size=2, can_be_resumed=True)
    assert text == "stopped; continue with the same command and --resume=latest\n"


def test_other_errors_keep_their_traceback(capsys):
    with pytest.raises(KeyError), Ending("train_dreambooth.py"):
        raise KeyError("ours")


@pytest.mark.parametrize("cls", [TrainOptions, SampleOptions])
def test_help_says_what_is_required_and_gives_an_example(cls):
    text = make_parser(cls).format_help()
    assert "example:\n  python " in text and "lora_ft_unet" not in text
    assert text.lower().count("[none]") == (2 if cls is TrainOptions else 0)  # --captions, --report_to
    assert text.count("[required]") == (2 if cls is TrainOptions else 0)


class Gone:
    """A terminal that was closed, or a pipe whose reader has ended."""

    def write(self, text) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def test_work_goes_on_where_nobody_reads_the_log(tmp_path, monkeypatch):
    before = logging.getLogger().handlers[:]
    monkeypatch.setattr(sys, "stderr", Gone())
    try:
        start_logging("INFO", tmp_path / "caf\udce9.log")
        logging.getLogger("x").info("hello caf\udce9")
        with pytest.raises(SystemExit) as stop, Ending("train_dreambooth.py", can_be_resumed=True):
            raise Interrupted(129)
    finally:
        logging.getLogger().handlers[:] = before
    assert stop.value.code == 129
    assert "INFO hello caf\\udce9" in (tmp_path / "caf\udce9.log").read_text()


def test_how_long_it_takes_is_said_once(caplog, monkeypatch):
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        for steps in (104, 9):
            pace = Pace(steps, f"{steps} images")
            for _ in range(steps):
                pace()
    assert caplog.messages == ["104 images: about 17 min more (10 s a step)"]
    assert [duration(seconds) for seconds in (9, 99, 100, 5999, 12600)] == [
        "9 s", "99 s", "2 min", "100 min", "3.5 h",
    ]  # fmt: skip
