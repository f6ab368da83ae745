"""Print what an image was drawn with, as the command that draws it again.

    python scripts/read_recipe.py IMAGE [--look_in FOLDER ...]

The same machine and versions draw the same image, bit by bit, since the command also says how many images
were drawn at a time; without --batch_size it is faster, and the same but for roundings. Checkpoint, LoRA
and other files are looked for by name and SHA-256: in models/, in the folders around the image and in those
given. Where one is not found the command has its name, and a line on standard error says so.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from ldm.command_line import Ending, home_path

AROUND = 3  # folders above an image in which, and one below, its files are looked for


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=home_path, help="that text_to_image.py has drawn")
    parser.add_argument(
        "--look_in", type=home_path, nargs="+", default=[], metavar="FOLDER", help="for checkpoints and LoRA"
    )
    parser.add_argument(
        "--text", action="store_true", help="print the text for AUTOMATIC1111 instead, of any image with one"
    )
    options = parser.parse_args(argv)
    with Ending("read_recipe.py"):
        print(text_of(options.image) if options.text else command(options.image, options.look_in))


def texts_in(image: Path) -> dict[str, str]:
    from ldm.images import read_texts

    try:
        return read_texts(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # a reader raises whatever the damage leads to
        raise ValueError(f"{image}: not a readable image ({error})") from None


def text_of(image: Path) -> str:
    if text := texts_in(image).get("parameters"):
        return text
    raise ValueError(f"{image}: holds no text `parameters`")


def command(image: Path, look_in: Sequence[Path] = ()) -> str:
    from ldm.image_metadata import command_of, facts_of, files_of
    from ldm.versions import PROGRAM_VERSION

    try:
        facts = facts_of(texts_in(image))
    except ValueError as error:
        raise ValueError(f"{image}: {str(error).removeprefix(f'{image}: ')}") from None
    found = {}
    for file in files_of(facts):
        path = find(file, places_around(image.resolve(), look_in))
        if path is None:
            digest = file["sha256"][:10]
            say(f"not found: {file['name']} (SHA-256 {digest}...); give its folder with --look_in")
        else:
            found[file["sha256"]] = path
    if not facts["program"].endswith(f" {PROGRAM_VERSION}"):
        say(f"drawn by {facts['program']}, this is {PROGRAM_VERSION}: roundings may differ")
    return command_of(facts, found)


def say(line: str) -> None:
    print(f"read_recipe.py: {line}", file=sys.stderr)


def places_around(image: Path, given: Sequence[Path]) -> Iterator[Path]:
    own = ROOT / "models", ROOT / "configs"
    for folder in (*given, *own, Path.cwd(), *itertools.islice(image.parents, AROUND)):
        yield folder
        if folder not in (Path.home(), Path("/")):
            with contextlib.suppress(OSError):  # a neighbour's
                below = (*folder.glob("*"), *folder.glob("*/samples"))
                yield from sorted(path for path in below if path.is_dir())


def find(file: dict, folders: Iterator[Path]) -> Path | None:
    """The file, or the folder of diffusers, of that name and content."""
    for folder in folders:
        path = folder / file["name"]
        with contextlib.suppress(OSError, ValueError):
            if path.exists() and digest_of(path) == file["sha256"]:
                return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return None


def digest_of(path: Path) -> str:
    from ldm.image_metadata import File
    from ldm.weights.source import open_weights

    return File.of(path, open_weights(path).files if path.is_dir() else ()).sha256


if __name__ == "__main__":
    main()
