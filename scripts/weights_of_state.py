"""Make a model to generate with of a training's saved state.

    python scripts/weights_of_state.py output/my_dog/states/step_00000400 BASE TARGET

A state has the weights that were trained, not the others: BASE is the model that the training began with, of
any format. TARGET as with convert_checkpoint.py. Nothing that exists is overwritten.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from convert_checkpoint import add_writing_options, format_to_write, write

from ldm.command_line import Ending, home_path, start_logging
from ldm.weights.arrays import Arrays, ArraysInMemory, Joined, Made, Renamed
from ldm.weights.choice import choose_config, config_in
from ldm.weights.source import open_weights


def joined(parts: Sequence[tuple[str, Arrays]], shapes: Mapping[str, tuple]) -> Arrays:
    """Arrays of these names, each of the first part that has it under its name behind the part's prefix."""
    whole = Joined([(f"{number}/", arrays) for number, (_, arrays) in enumerate(parts)])
    found = {}
    for name in shapes:
        own = (f"{number}/{prefix}{name}" for number, (prefix, _) in enumerate(parts))
        found[name] = next(one for one in own if one in whole)
    return Renamed(whole, {name: Made([own], whole.shape(own)) for name, own in found.items()})


def weights_of_state(options: argparse.Namespace) -> None:
    from ldm.device import require_versions

    require_versions()
    from ldm.files import fingerprint
    from ldm.networks.latent_diffusion import build_model
    from ldm.run.states import read_state
    from ldm.tokenizer import token_of
    from ldm.weights.checkpoint import require_match
    from ldm.weights.embeddings import ROW, TABLE, with_row
    from ldm.weights.layouts import fit

    format_to_write(options.target, options.to)
    folder = (options.state.parent if options.state.name == "state.ckpt" else options.state).resolve()
    state = read_state(folder)
    if state.origin.get("use_lora"):
        raise ValueError(
            f"{folder}: is of a LoRA training: continue it with --resume; --save_weights_every leaves files "
            f"on the way"
        )
    averaged = " averaged" if options.base_was_averaged else ""
    base = open_weights(options.base, options.variant, options.base_was_averaged)
    if state.origin.get("base model") not in (None, fingerprint(base.files) + averaged):
        print(f"{options.base}: not the file that the training began with: what was frozen is taken from it")
    noted = folder.parent.parent / "effective_config.json"
    if options.config == "auto" and noted.is_file():
        config = config_in(noted)
    else:
        config = choose_config(base, options.config).config
    shapes = build_model(config).parameter_shapes()
    rest = fit(base.arrays, shapes, config, options.base_was_averaged and base.configs is None)
    require_match(shapes, rest, base.arrays, str(base.path))
    arrays, prefix = state.arrays(), "ema." if options.use_ema_weights else ""
    if prefix and not any(name.startswith(prefix) for name in arrays):
        raise ValueError(f"{folder}: has no averaged weights: leave --use_ema_weights out")
    own = [prefix + name for name in shapes if prefix + name in arrays]
    word = {}
    if prefix + ROW in arrays:  # of --train_token
        token = token_of(state.origin["train_token"])
        word = {TABLE: with_row(rest[TABLE], token, arrays[prefix + ROW])}
    whole = joined([(prefix, arrays), ("", ArraysInMemory(word)), ("", rest)], shapes)
    require_match(shapes, whole, whole, str(folder))
    trained, step = len(own) + len(word), state.progress["global_step"]
    print(f"{folder}: {trained} parameters after update {step}, {len(shapes) - trained} of the base")
    write(whole, config, options.target, options.to, options.dtype)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("state", type=home_path, help="a folder states/step_*")
    parser.add_argument("base", type=home_path, help="the model that the training began with")
    add_writing_options(parser)
    parser.add_argument("--variant", help="of the files of the base, if it is a folder: fp16, bf16, non_ema")
    parser.add_argument(
        "--use_ema_weights", action="store_true", help="take the averages in the state (--use_ema)"
    )
    parser.add_argument("--base_was_averaged", action="store_true", help="the training had --use_ema_weights")
    options = parser.parse_args(argv)
    start_logging("INFO")
    with Ending("weights_of_state.py"):
        weights_of_state(options)


if __name__ == "__main__":
    main()
