"""Captions: a prompt of its own for each image, from files beside it, its name, or a table. Must not import
mindspore.
"""

import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ldm.text_files import read_text

PROMPT = "[prompt]"  # in a caption: the instance prompt, or that of the class
SUFFIXES = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv", "img_txt.csv")  # of Hugging Face's imagefolder; of mindone
NUMBERED = re.compile(r"[\s_-]*(\(\d+\)|[\s_-]\d+)$")  # what tells apart files of one name
SAYS_NOTHING = re.compile(
    r"(img|dscn?|dscf|pxl|image|photo|picture|screenshot|class)?[\W\d_]*", re.IGNORECASE
)
logger = logging.getLogger(__name__)


def prompts_of(
    folder: Path, paths: Sequence[Path], prompt: str, kind: str, is_class: bool = False
) -> list[str]:
    """The prompt of each image of a folder: its caption, or, where it has none, `prompt`.

    Args:
        kind: one of ldm.fields.CAPTIONS.
        is_class: of class images: a table need not be there, and a file name is a caption only if it says
            [prompt], for those of generated images say nothing.

    Raises:
        ValueError: a table is not there or cannot be read, or a text file is no text.
    """
    if kind == "none":
        _say_what_is_there(folder, paths)
        return [prompt] * len(paths)
    if kind == "table":
        table = _table(folder)
        if table is None and not is_class:
            raise ValueError(f"{folder}: captions=table, but there is none of {', '.join(TABLES)} in it")
        captions = [(table or {}).get(path.name, "") for path in paths]
    elif kind == "text_files":
        captions = [_beside(path) for path in paths]
    else:
        captions = [_named(path) for path in paths]
        captions = [named if PROMPT in named or not is_class else "" for named in captions]
    found = sum(map(bool, captions))
    others = "" if found == len(paths) else f", the others take the prompt {prompt!r}"
    if found:
        logger.info("%s: %d of %d images have a caption%s", folder, found, len(paths), others)
    else:
        logger.info("%s: no captions, the prompt is %r", folder, prompt)
    return [caption.replace(PROMPT, prompt) if caption else prompt for caption in captions]


def _first_file(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _text_file(path: Path) -> Path | None:
    """The file beside an image that may hold its caption."""
    return _first_file(path.with_suffix(suffix) for suffix in SUFFIXES)


def _table_file(folder: Path) -> Path | None:
    return _first_file(folder / name for name in TABLES)


def _beside(path: Path) -> str:
    file = _text_file(path)
    return " ".join(read_text(file).split()) if file else ""


def _named(path: Path) -> str:
    if SAYS_NOTHING.fullmatch(path.stem):
        return ""
    return " ".join(NUMBERED.sub("", path.stem).replace("_", " ").split())


def _say_what_is_there(folder: Path, paths: Sequence[Path]) -> None:
    count, table = sum(_text_file(path) is not None for path in paths), _table_file(folder)
    if count or table:
        what, kind = (f"{count} caption files", "text_files") if count else (table.name, "table")
        logger.info("%s: %s not used (--captions=%s takes them as prompts)", folder, what, kind)


def _table(folder: Path) -> dict[str, str] | None:
    """File name to caption; None where there is no table."""
    path = _table_file(folder)
    if path is None:
        return None
    text = read_text(path)
    if path.suffix == ".jsonl":
        rows = [_json_row(line, f"{path}: line {n}") for n, line in enumerate(text.splitlines(), 1)
                if line.strip()]  # fmt: skip
    else:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True))
    captions = {}
    for number, row in enumerate(rows, 1):
        name, caption = row.get("file_name") or row.get("dir"), row.get("text")
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{path}: row {number} must have file_name (or dir) and text, got {row}")
        if not (folder / name).is_file():
            logger.warning("%s: row %d: no such image: %s", path, number, name)
        captions[Path(name).name] = " ".join(caption.split())
    return captions


def _json_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: must be {{"file_name": ..., "text": ...}}, got {line.strip()}')
    return row
