"""The face of a command: flags and option files in; log lines, one-line errors and exit statuses out.

No mindspore.

Values come in the order default < file < flag. An unknown key, a wrong type or an impossible combination ends
the command with one line and status 2, before any network is built.
"""

import argparse
import contextlib
import dataclasses
import errno
import logging
import os
import shlex
import sys
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ldm.config import read_mapping
from ldm.other_names import advice
from ldm.values import ConfigError, nearest, parse_value

logger = logging.getLogger(__name__)
USERS_ERRORS = (ValueError, FloatingPointError, OverflowError, MemoryError, OSError)


class Interrupted(SystemExit):
    """SIGINT, SIGTERM or SIGHUP, with the exit status that shells give it: 130, 143 or 129."""


class Ending:
    """How a command ends: `with Ending("train_dreambooth.py"): ...`

    An error that is the user's to mend ends it with one line and status 2; a signal with the shell's status,
    130, 143 or 129, and the line that continues the command where it can be resumed. Of several processes the
    line names the rank, and an error ends the process without shutting down MindSpore's communication, in
    which it would wait for the others.
    """

    def __init__(self, command: str, can_be_resumed: bool = False) -> None:
        self.command, self.can_be_resumed = command, can_be_resumed
        self.rank, self.size = 0, 1

    def joined(self, rank: int, size: int) -> None:
        """This process is one of several from now on."""
        self.rank, self.size = rank, size

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            if self.rank == 0:
                _say(self._interrupted())
            raise SystemExit(error.code if isinstance(error, Interrupted) else 130)
        if isinstance(error, USERS_ERRORS):
            who = f"{self.command}: rank {self.rank}" if self.size > 1 else self.command
            message = " ".join(str(error).split()) or type(error).__name__
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                message += "; make room: `df` tells what is full, `df -i` whether of files (inodes)"
            _say(f"{who}: error: {message}")
            if self.size > 1:
                os._exit(2)
            raise SystemExit(2)
        if error and self.size > 1:
            traceback.print_exception(error)
            os._exit(1)

    def _interrupted(self) -> str:
        if not self.can_be_resumed:
            return f"{self.command}: interrupted"
        if self.size > 1:
            return "stopped; continue with the same command and --resume=latest"
        return f"stopped; continue with: {command_to_resume()}"


def command_to_resume() -> str:
    """The command of this process once more; of several --resume the last counts."""
    return f"python {shlex.join([*sys.argv, '--resume=latest'])}"


def _say(line: str) -> None:
    """To standard error, which may be gone: a terminal that was closed, a reader that has ended."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class _BarHandler(logging.StreamHandler):
    """Log lines that do not tear a progress bar apart; where nobody reads them the work goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


def start_logging(level: str, log_file: Path | None = None, who: str = "") -> None:
    """Log lines of this program to standard error and, where given, to a file as well; `who` stands before
    each.
    """
    logging.raiseExceptions = (
        False  # a log that cannot be written, on a full disk, is no reason for a traceback
    )
    handlers: list[logging.Handler] = [_BarHandler()]
    if log_file:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
    line = f"%(asctime)s {who}%(levelname)s %(message)s"
    logging.basicConfig(level=level, format=line, handlers=handlers, force=True)


def progress_bar(what: str, is_shown: bool = True, unit: str = "image") -> Callable[..., tqdm]:
    """A function that opens a progress bar on standard error for a total, where there is a terminal and
    anything to do.
    """

    def show(total: int, done: int = 0) -> tqdm:
        disable = None if is_shown and total else True  # None: unless it is a terminal
        return tqdm(total=total, initial=done, desc=what, unit=unit, disable=disable)

    return show


class Pace:
    """Says in the log how long work of so many steps will take, once a few of them have shown it.

    To be called after every step. The first one, which may compile, does not count; of less than ten steps
    nothing is said.
    """

    SHOWN = 4  # steps until it is said

    def __init__(self, steps: int, what: str) -> None:
        self.steps, self.what, self.done, self.start = steps, what, 0, 0.0

    def __call__(self) -> None:
        self.done += 1
        if self.done == 1:
            self.start = time.perf_counter()
        if self.done == self.SHOWN and self.steps >= 10:
            seconds = (time.perf_counter() - self.start) / (self.SHOWN - 1)
            text = "%s: about %s more (%.3g s a step)"
            logger.info(text, self.what, duration(seconds * (self.steps - self.done)), seconds)


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> typing.NoReturn:
        if "expected" in message and "argument" in message:
            message += "; a value that begins with a dash is given as --NAME=VALUE"
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(cls) -> argparse.ArgumentParser:
    """The parser of an option class: a flag for each field, in the fields' groups."""
    parser = _Parser(
        usage="%(prog)s [options]",
        description=cls.__doc__,
        epilog=f"example:\n  {cls.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {}
    for spec in dataclasses.fields(cls):
        meta = spec.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        extra = {"metavar": meta["metavar"] or _metavar(spec)}
        if spec.type in (bool, bool | None):
            extra = {"metavar": "BOOL", "nargs": "?", "const": "True"}
        elif any(typing.get_origin(kind) is tuple for kind in (spec.type, *typing.get_args(spec.type))):
            extra = {"metavar": meta["metavar"] or "N", "nargs": "+"}
        text = _help(spec) if meta["text"] else argparse.SUPPRESS
        groups[meta["group"]].add_argument(
            f"--{spec.name}", *meta["aliases"], dest=spec.name, help=text, **extra
        )
    return parser


def _metavar(spec: dataclasses.Field) -> str:
    if is_path(spec.name):
        return "PATH"
    return "N" if spec.type in (int, float, int | None, float | None) else "TEXT"


def _help(spec: dataclasses.Field) -> str:
    """A line of --help: text, choices, and the default in brackets unless the text ends with its own."""
    meta, default = spec.metadata, spec.default
    choices = f" {{{','.join(map(str, meta['choices']))}}}" if meta["choices"] else ""
    shown = (
        " ".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else default
    )
    text = meta["text"] if meta["text"].endswith("]") else f"{meta['text']}{choices} [{shown}]"
    return text.replace("%", "%%")


def parse_options(cls, argv: Sequence[str] | None = None):
    """Options of type `cls` from the command line and, where it has `train_config`, from that file.

    Ends the process with one line and status 2 where something is wrong.
    """
    parser = make_parser(cls)
    known, unknown = parser.parse_known_args(argv)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    if unknown:
        parser.error(_unknown("argument", _flags_among(unknown), flags, cls.OTHER_NAMES))
    try:
        given = collect(cls, vars(known), "command line")
        if "train_config" in cls.__dataclass_fields__:
            path = given.get("train_config", cls.train_config)
            given = collect(cls, read_mapping(path), str(path)) | given
        options = cls(**given)
        options.check()
    except ConfigError as error:
        parser.error(str(error))
    return options


def collect(cls, given: dict, source: str) -> dict:
    """`given` converted to the types of `cls`; a key that `cls` lacks is an error."""
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}
    names = {name: name for name in specs}
    for spec in specs.values():
        names |= {
            alias.lstrip("-"): spec.name for alias in spec.metadata["aliases"] if alias.startswith("--")
        }
    if unknown := [str(key) for key in given if key not in names]:
        raise ConfigError(f"{source}: {_unknown('option', unknown, list(names), cls.OTHER_NAMES)}")
    result = {}
    for key, value in given.items():
        name = names[key]
        before = result.get(name)
        if name == "log_level" and isinstance(value, str):
            value = value.removeprefix("logging.").upper()
        result[name] = parse_value(value, specs[name].type, f"{source}: {name}")
        if is_path(name) or specs[name].metadata["metavar"] == "PATH":
            result[name] = _as_path(result[name], f"{source}: {name}", specs[name].default)
        elif isinstance(result[name], str):
            result[name] = _as_text(result[name], f"{source}: {name}")
        _check_bounds(specs[name], result[name])
        if before not in (None, result[name]):
            raise ConfigError(
                f"{source}: {name} is given twice, {before} and, as {key}, {result[name]}: leave one out"
            )
    return result


def _flags_among(words: Sequence[str]) -> list[str]:
    """The flags among unknown words, without the values behind them; a word without a flag is one, too."""
    flags, is_value = [], False
    for word in words:
        is_flag = word.startswith("-") and not word[1:2].isdigit()
        if is_flag or not is_value:
            flags.append(word.split("=")[0])
        is_value = is_flag and "=" not in word or (is_value and not is_flag)
    return flags


def _unknown(kind: str, names: Sequence[str], known: Sequence[str], others: dict[str, str]) -> str:
    """All that is not known, each with what to do about it."""
    found = [f"{name}{advice(name, others) or nearest(name, known)}" for name in names]
    return f"unknown {kind}{'s' if len(names) > 1 else ''} {', '.join(found)}"


def is_path(name: str) -> bool:
    """Whether an option's value is the path of a file or folder, by its name."""
    return name.endswith(("_dir", "_path", "_file", "_config")) or name in ("config", "resume", "concepts")


def home_path(text: str) -> Path:
    """A path of a command line, its `~` as the home folder."""
    return Path(os.path.expanduser(text))


def _as_path(value, what: str, default):
    """Paths with `~` as the home folder it stands for; an empty one is the default. Raises ConfigError."""
    if isinstance(value, tuple):
        return tuple(_as_path(item, what, "") for item in value if item) or default
    if not value:
        return default
    if (value != value.strip() or value[0] in "'\"") and not os.path.exists(value):
        raise ConfigError(f"{what} must be a path, got {value!r}: with spaces or quotation marks around it")
    expanded = os.path.expanduser(value)
    if expanded.startswith("~") and not os.path.exists(expanded):
        raise ConfigError(f"{what} {value}: no home folder is known for it; write the path out")
    return expanded


def _as_text(value: str, what: str) -> str:
    """The text of a flag where Python took it for bytes of the locale: everyone's terminal writes UTF-8."""
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(value).decode()
    except UnicodeError:
        raise ConfigError(f"{what} must be text in UTF-8, got {value!r}") from None


def _check_bounds(spec: dataclasses.Field, value) -> None:
    """Raises ConfigError where a value is not among an option's choices or outside its bounds."""
    meta = spec.metadata
    if meta["choices"] and value not in meta["choices"]:
        choices = list(map(str, meta["choices"]))
        hint = "" if str(value)[:1].isdigit() else nearest(str(value), choices)  # 2.1 is no misspelt 2.0
        raise ConfigError(f"{spec.name} must be one of {', '.join(choices)}, got {value!r}{hint}")
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        if meta["least"] is not None and item < meta["least"]:
            raise ConfigError(f"{spec.name} must be {meta['least']} or more, got {item}")
        if meta["most"] is not None and item > meta["most"]:
            raise ConfigError(f"{spec.name} must be {meta['most']} or less, got {item}")
        if meta["above"] is not None and item <= meta["above"]:
            raise ConfigError(f"{spec.name} must be more than {meta['above']}, got {item}")
        if meta["below"] is not None and item >= meta["below"]:
            raise ConfigError(f"{spec.name} must be less than {meta['below']}, got {item}")
