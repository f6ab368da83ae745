"""Values that users give, in flags and files: converted, or refused in one line.

Must not import mindspore.
"""

import difflib
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path


class ConfigError(ValueError):
    """What a user wrote cannot be used; the message is one line that says what to do."""


def require_file(path: Path, what: str, hint: str) -> None:
    if not path.is_file():
        raise ConfigError(f"{what} {path}: {absent(path)}; {hint}")


def absent(path: Path, what: str = "no such file") -> str:
    """Why there is nothing at a path, as people put it."""
    if path.is_symlink():
        return f"a link to {os.readlink(path)}, where nothing is"
    return what


def nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def parse_value(value, kind, name: str):
    """`value` (from a flag or a file) as the type that the field is annotated with; ConfigError where it is
    not one.
    """
    kinds = (
        [k for k in typing.get_args(kind)]
        if typing.get_origin(kind) in (typing.Union, type(int | None))
        else [kind]
    )
    if value in (None, "None", ["None"]):
        if type(None) in kinds:
            return None
        raise ConfigError(f"{name} must have a value, got none")
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return _parse_tuple(value, typing.get_args(kind), name)
    if kind is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() in known:
            return known[str(value).lower()]
    elif kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    elif kind in (int, float) and not isinstance(value, (bool, list, dict)):
        try:
            if kind is int and re.fullmatch(r"-?\d{1,300}", str(value)):
                return int(value)  # a float has no room for a seed of 17 digits
            number = float(value)
            if kind is float and number == number and abs(number) != float("inf"):
                return number
            if kind is int and number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
    required = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[kind]
    raise ConfigError(f"{name} must be {required}, got {value!r}")


def _parse_tuple(value, kinds: tuple, name: str) -> tuple:
    if kinds[0] is str:
        items = [value] if isinstance(value, str) else value
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        items = " ".join(value).replace(",", " ").split()  # from the command line: 0.9 0.98 or 0.9,0.98
    else:
        items = value.replace(",", " ").split() if isinstance(value, str) else value
    is_any_number = kinds[-1] is Ellipsis
    if not isinstance(items, (list, tuple)) or (not is_any_number and len(items) != len(kinds)):
        raise ConfigError(
            f"{name} must be {'a list' if is_any_number else f'{len(kinds)} values'}, got {value!r}"
        )
    return tuple(parse_value(item, kinds[0], name) for item in items)
