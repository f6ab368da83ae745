"""`checkpoints.sha256`: the SHA-256 of the files in a folder, as they were written."""

import re
from collections.abc import Mapping
from pathlib import Path

from ldm.files import write_text

DIGESTS = "checkpoints.sha256"
LINE = re.compile(r"(\S+) [ *](.+)")  # as sha256sum writes it, of text or binary files


def recorded_digests(folder: Path) -> dict[str, str]:
    """File name to SHA-256, from the folder's `checkpoints.sha256`, which `sha256sum --check` reads too."""
    path = folder / DIGESTS
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (LINE.fullmatch(line) for line in lines)
    return {match[2]: match[1] for match in found if match}


def record_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Note the SHA-256 of files by their names, beside what is there."""
    write_digests(folder, recorded_digests(folder) | digests)


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write them all; lines of another kind, say comments of the user's, stay."""
    path = folder / DIGESTS
    there = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = [line for line in there if not LINE.fullmatch(line)]
    lines += [f"{digest}  {name}" for name, digest in sorted(digests.items())]
    write_text(path, "".join(f"{line}\n" for line in lines))
