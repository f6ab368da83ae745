"""Make a LoRA of what a fine-tuned model has and its base has not.

    python scripts/extract_lora.py BASE TUNED TARGET.safetensors --rank 16

The difference of each weight is cut down to a rank by its singular values, which leaves the least that the
rank allows (Eckart & Young 1936); what is left is said. Norms, biases and embeddings have no low-rank
addition. BASE and TUNED are of any format; they are read array by array. Nothing that exists is overwritten.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import ldm  # noqa: F401 (first: it says which packages are missing)

# isort: split
import numpy as np
from convert_checkpoint import add_reading_options, open_whole
from convert_lora import add_writing_options, require_new, write

from ldm.command_line import Ending, home_path, progress_bar, start_logging
from ldm.fields import LORA_TARGETS, lora_target_names


def low_rank(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B (out, rank) and A (rank, n) whose product is nearest to a matrix (out, n), in the Frobenius norm."""
    u, singular, v = np.linalg.svd(difference, full_matrices=False)
    root = np.sqrt(singular[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


class Left:
    """Squared norms: of two models' whole difference, of what can have additions, of what these leave."""

    def __init__(self) -> None:
        self.whole = self.covered = self.left = 0.0

    def count(self, difference: np.ndarray, rest: np.ndarray | None) -> None:
        """Of an array, and what an addition leaves of it; None where it has none."""
        size = float(np.square(difference, dtype=np.float64).sum())
        self.whole += size
        if rest is not None:
            self.covered += size
            self.left += float(np.square(rest, dtype=np.float64).sum())

    def report(self) -> str:
        of_covered = np.sqrt(self.left / self.covered) if self.covered else 0.0
        of_whole = np.sqrt((self.whole - self.covered + self.left) / self.whole) if self.whole else 0.0
        return (
            f"they leave {of_covered:.1%} of the difference of these weights, {of_whole:.1%} of that of all "
            f"(relative L2)"
        )


def extract(options: argparse.Namespace) -> None:
    from ldm.weights.lora_files import Lora
    from ldm.weights.lora_merge import fingerprint_of
    from ldm.weights.lora_units import units_of

    require_new(options.target)
    targets = lora_target_names(options.targets)
    base, shapes, source = open_whole(options.base, options)
    tuned, _, other = open_whole(options.tuned, options)
    if source.config.facts() != other.config.facts():
        raise ValueError(f"{options.tuned}: is of another version of Stable Diffusion than {options.base}")
    units = {name: unit for name, unit in units_of(shapes, source.config).items() if unit.target in targets}
    parts: dict[str, list] = {}
    for unit in units.values():
        parts.setdefault(unit.weight, []).append(unit)
    pairs, left = {}, Left()
    with progress_bar("extracting", unit="array")(len(shapes)) as bar:
        for name in shapes:
            difference = np.asarray(tuned[name], np.float32) - np.asarray(base[name], np.float32)
            pairs |= cut_down(difference, parts.get(name, []), options.rank, left)
            bar.update()
    if not pairs:
        raise ValueError(f"{options.tuned}: no weight of these targets differs from that of {options.base}")
    own = {"base": fingerprint_of(base), "extracted_from": options.tuned.name}
    write(Lora(options.target, pairs, units=units), source.config, own, options)
    print(f"{options.target}: {len(pairs)} additions; {left.report()}")


def cut_down(difference: np.ndarray, parts: list, rank: int, left: Left) -> dict:
    """The additions to a weight, which may have several parts; what they leave is counted."""
    from ldm.weights.lora_files import Pair

    if not parts or not difference.any():
        left.count(difference, None)
        return {}
    found = {}
    for unit, part in zip(parts, np.split(difference, len(parts))):
        matrix = part.reshape(len(part), -1)
        up, down = low_rank(matrix, min(rank, *matrix.shape))
        left.count(matrix, matrix - up @ down)
        found[unit.name] = Pair(down, up, float(len(down)))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=home_path, help="the model that the other one was made of")
    parser.add_argument("tuned", type=home_path, help="the fine-tuned model")
    add_writing_options(parser)
    parser.add_argument("--rank", type=int, default=16, help="of each addition [%(default)s]")
    parser.add_argument(
        "--targets", default="attention+feed_forward+projections", metavar="NAME+NAME",
        help=f"of {', '.join(LORA_TARGETS)} [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--config", default="auto", help="model configuration [the one that fits]")
    add_reading_options(parser)
    options = parser.parse_args(argv)
    start_logging("INFO")
    with Ending("extract_lora.py"):
        if options.rank < 1:
            raise ValueError(f"rank must be 1 or more, got {options.rank}")
        extract(options)


if __name__ == "__main__":
    main()
