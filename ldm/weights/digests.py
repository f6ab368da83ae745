"""`checkpoints.sha256`: the SHA-256 of the files in a folder, as they were written."""

from collections.abc import Mapping
from pathlib import Path

from ldm.files import write_text

DIGESTS = "checkpoints.sha256"


def recorded_digests(folder: Path) -> dict[str, str]:
    """File name to SHA-256, from the folder's `checkpoints.sha256`, which `sha256sum --check` reads too."""
    path = folder / DIGESTS
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


def record_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Note the SHA-256 of files by their names, beside what is there."""
    write_digests(folder, recorded_digests(folder) | digests)


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    write_text(folder / DIGESTS, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))
