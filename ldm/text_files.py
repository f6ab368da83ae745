"""Text files as people's editors write them. Must not import mindspore."""

import codecs
from pathlib import Path

MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16LE", codecs.BOM_UTF16_BE: "UTF-16BE"}


class NotText(ValueError):
    """A file's content is no text that is read here; the message names file, line and what to do."""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one, as on Windows.

    Raises:
        NotText: it is of another encoding, or no text.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    mark = next((mark for mark in MARKS if content.startswith(mark)), b"")
    encoding = MARKS.get(mark, "UTF-8")
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        before = content[len(mark) : len(mark) + error.start].decode(encoding, "replace")
        line, place = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise NotText(
            f"{path}: line {line}, character {place}: not {encoding}; save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise NotText(f"{path}: line {line} holds bytes that are no text: save the file as UTF-8")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without the spaces around them. Raises as `read_text` does.

    Lines end where an editor shows it: Unicode's other line separators are part of a line.
    """
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return [line.strip() for line in text.split("\n")]
