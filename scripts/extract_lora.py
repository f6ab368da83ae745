"""Make a LoRA of what a fine-tuned model has and its base has not.

    python scripts/extract_lora.py BASE TUNED TARGET.safetensors --rank 16

The difference of each weight is cut down to a rank by its singular values, which leaves the least that the
rank allows (Eckart & Young 1936); what is left is said. Norms, biases and embeddings have no low-rank
addition. BASE and TUNED are of any format; they are read array by array. Nothing that exists is overwritten.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import numpy as np
from convert_checkpoint import add_reading_options, open_whole

from ldm.command_line import Ending, progress_bar, start_logging
from ldm.config import ModelConfig
from ldm.fields import LORA_FORMATS, LORA_TARGETS, SAVE_DTYPES


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
    from ldm.weights.lora_units import units_of

    base, shapes, source = open_whole(options.base, options)
    tuned, _, other = open_whole(options.tuned, options)
    if source.config.facts() != other.config.facts():
        raise ValueError(f"{options.tuned}: is of another version of Stable Diffusion than {options.base}")
    units = units_of(shapes, source.config)
    weights, left = {}, Left()
    with progress_bar("extracting", unit="array")(len(shapes)) as bar:
        for name in shapes:
            parts = [u for u in units.values() if u.weight == name and u.target in options.targets]
            weights |= cut_down(base[name], tuned[name], parts, options.rank, left)
            bar.update()
    save(weights, units, base, source.config, options)
    print(f"{options.target}: {len(weights) // 2} additions; {left.report()}")


def cut_down(
    before: np.ndarray, after: np.ndarray, parts: list, rank: int, left: Left
) -> dict[str, np.ndarray]:
    """The additions of a weight, which may have several parts; what they leave is counted."""
    from ldm.weights.lora_units import DOWN, UP

    difference = np.asarray(after, np.float32) - np.asarray(before, np.float32)
    if not parts or not difference.any():
        left.count(difference, None)
        return {}
    found = {}
    for unit, part in zip(parts, np.split(difference, len(parts))):
        matrix = part.reshape(len(part), -1)
        up, down = low_rank(matrix, min(rank, *matrix.shape))
        left.count(matrix, matrix - up @ down)
        found |= {unit.name + UP: up, unit.name + DOWN: down}
    return found


def save(weights: Mapping, units: Mapping, base: Mapping, config: ModelConfig, options) -> None:
    from ldm.weights.lora_merge import fingerprint_of
    from ldm.weights.lora_units import DOWN
    from ldm.weights.lora_writing import LoraWriter, texts_of
    from ldm.weights.writing import DTYPES

    sizes = {name: (len(weights[name + DOWN]),) * 2 for name in units if name + DOWN in weights}
    if not sizes:
        raise ValueError(f"{options.tuned}: no weight of these targets differs from that of {options.base}")
    texts = texts_of(config, sizes, {"base": fingerprint_of(base), "extracted_from": options.tuned.name})
    alphas = {name: float(alpha) for name, (_, alpha) in sizes.items()}
    chosen = {name: units[name] for name in sizes}
    writer = LoraWriter(chosen, alphas, options.lora_format, DTYPES[options.dtype], texts)
    writer.save(weights, options.target, replace=False)


def targets(given: str) -> list[str]:
    names = [name.strip() or "attention" for name in given.split("+")]
    if unknown := sorted(set(names) - set(LORA_TARGETS)):
        raise argparse.ArgumentTypeError(f"some of {', '.join(LORA_TARGETS)} wanted, got {unknown[0]}")
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="the model that the other one was made of")
    parser.add_argument("tuned", type=Path, help="the fine-tuned model")
    parser.add_argument("target", type=Path, help="what to write: NAME.safetensors")
    parser.add_argument("--rank", type=int, default=16, help="of each addition [%(default)s]")
    parser.add_argument(
        "--targets", type=targets, default="attention+feed_forward+projections", metavar="NAME+NAME",
        help=f"of {', '.join(LORA_TARGETS)} [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=SAVE_DTYPES, default="float16", help="of the numbers [%(default)s]"
    )
    parser.add_argument("--lora_format", choices=LORA_FORMATS, default="kohya", help="names [%(default)s]")
    parser.add_argument("--config", default="auto", help="model configuration [the one that fits]")
    add_reading_options(parser)
    options = parser.parse_args(argv)
    start_logging("INFO")
    with Ending("extract_lora.py"):
        if options.rank < 1:
            raise ValueError(f"rank must be 1 or more, got {options.rank}")
        if options.target.suffix != ".safetensors":
            raise ValueError(f"{options.target}: must end with .safetensors")
        if options.target.exists():
            raise FileExistsError(f"{options.target}: exists already; give another name or remove it")
        extract(options)


if __name__ == "__main__":
    main()
