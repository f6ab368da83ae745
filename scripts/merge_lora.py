"""Merge LoRA files into a base model: what it draws is what `--lora_ckpt_path` draws.

    python scripts/merge_lora.py BASE LORA[:WEIGHT] ... TARGET

BASE and TARGET as with convert_checkpoint.py: any format, and what TARGET becomes follows from its name. A
LoRA is of this or another program, with a weight of 1 unless one is given. Nothing that exists is
overwritten.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from convert_checkpoint import add_reading_options, add_writing_options, format_to_write, open_whole, write

from ldm.command_line import Ending, home_path, start_logging


def merge(options: argparse.Namespace) -> None:
    from ldm.weights.lora_merge import merged, read_loras

    format_to_write(options.target, options.to)
    arrays, shapes, source = open_whole(options.base, options)
    added = read_loras(options.lora, shapes, source.config)
    write(merged(arrays, added), source.config, options.target, options.to, options.dtype)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=home_path, help="the model that the LoRA is an addition to")
    parser.add_argument("lora", nargs="+", metavar="LORA[:WEIGHT]", help="a file, or a folder of PEFT's")
    add_writing_options(parser)
    add_reading_options(parser)
    options = parser.parse_args(argv)
    start_logging("INFO")
    with Ending("merge_lora.py"):
        merge(options)


if __name__ == "__main__":
    main()
