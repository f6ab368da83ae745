"""How well DreamBooth works on the embedded tiny model: figures, each judged by scripts/tiny_model/judge.py.

    python scripts/tiny_model/evaluate_tiny.py --quick                     # one subject, one seed
    python scripts/tiny_model/evaluate_tiny.py --json quality.json
        # base model, three subjects, three seeds: over an hour
    python scripts/tiny_model/evaluate_tiny.py --ablations
        # and text encoder, class pictures, steps: the first subject and seed
    python scripts/tiny_model/evaluate_tiny.py --lora
        # LoRA: three subjects; ranks and targets: the first subject
    python scripts/tiny_model/evaluate_tiny.py --recipes
        # optimizers, schedules, loss weights, the text encoder apart: the first subject and seed
    python scripts/tiny_model/evaluate_tiny.py --together
        # two subjects in one training, three seeds
    python scripts/tiny_model/evaluate_tiny.py --shapes
        # subjects of another shape than their class, two seeds
    python scripts/tiny_model/evaluate_tiny.py --checkpoint FILE --subject penguin
        # a checkpoint, or a LoRA, that is there already

Class pictures are drawn once a subject. Runs and figures are kept in --work with their pictures, and a second
start goes on from them: give another folder after a change. Judges flatter: look at the sheets.

figures (fractions; see docs/quality.md):
  judge_*            the judge on real pictures that it was not trained on
  base_*_right       base model, "a CLASS PLACE" in two wordings of each place; colour: "a COLOUR CLASS"
  base_vae_psnr      how well its VAE gives those real pictures back, in dB
  base_subject       base model, "a sks CLASS PLACE": judged to be the subject
  subject_fidelity   fine-tuned, "a sks CLASS PLACE", six places not among the five pictures: judged to be it
  prompt_fidelity    the same pictures: place right
  prior_leak         fine-tuned, "a CLASS": judged to be the subject
  prior_diversity    the same pictures: mean distance of their features, over the base model's
  confusion          of two subjects in one model: the other one is drawn
  other_classes      class right of the other classes, base model less fine-tuned
  megabytes          of the checkpoint
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/tiny_model")]
from evaluation import Evaluation, cached_json

from ldm.command_line import Ending
from ldm.device import start_device
from ldm.files import write_text

SUBJECTS, SEEDS = ("penguin", "car", "house"), (1, 2, 3)
SHAPES, TOGETHER = ("racer", "hut", "school"), (("penguin", "car"),)
RUN_FIGURES = ("subject_fidelity", "prompt_fidelity", "prior_leak", "prior_diversity", "other_classes")
ABLATIONS = {  # name -> options of the training that differ
    "without the prior loss": {"with_prior_preservation": False},
    "text encoder frozen": {"train_text_encoder": False},
    "50 class pictures": {"num_class_images": 50},
    "200 class pictures": {"num_class_images": 200},
    "half the steps": {"train_data_repeats": 20},
    "twice the steps": {"train_data_repeats": 80},
}
_RECIPES = {
    "no captions": {},
    "min-SNR, gamma 5": {"min_snr_gamma": 5},
    "offset noise 0.05": {"noise_offset": 0.05},
    "half the rate for the text encoder": {"text_encoder_learning_rate": 5e-5},
    "text encoder frozen after half of the run": {"text_encoder_stop": 0.5},
    "the word's embedding apart": {"train_token": "sks", "token_learning_rate": 2e-3},
    "the word's embedding, text encoder frozen": {
        "train_text_encoder": False, "train_token": "sks", "token_learning_rate": 2e-3
    },
    "cosine": {"lr_schedule": "cosine"},
    "adafactor": {"optim": "adafactor"},
    "lion, a third of the rate": {"optim": "lion", "start_learning_rate": 3e-5},
    "prodigy": {"optim": "prodigy", "start_learning_rate": 1},
    "empty prompt in a tenth": {"caption_dropout": 0.1},
    "time steps from 300 on": {"min_timestep": 300},
}  # fmt: skip
# the same for --recipes: captions, as configured, and what helps as well or not without them
RECIPES = {"captions": {}} | {name: {"captions": "none"} | changes for name, changes in _RECIPES.items()}
LORA_SETTINGS = {  # the same for --lora; the first is what the configuration says
    "LoRA": {},
    "LoRA of rank 4": {"lora_rank": 4},
    "LoRA of rank 64": {"lora_rank": 64},
    "LoRA, feed-forward layers too": {"lora_targets": "+feed_forward"},
    "LoRA, all kinds of layers": {"lora_targets": "+feed_forward+projections+convolutions"},
    "LoRA, text encoder frozen": {"train_text_encoder": False},
}


def row(name: str, values: Sequence[float]) -> dict:
    """A figure: its mean and spread (standard deviation) over runs."""
    return {
        "name": name,
        "value": mean(values),
        "spread": stdev(values) if len(values) > 1 else None,
        "runs": len(values),
    }


def show(title: str, rows: Sequence[dict]) -> None:
    print(f"\n{title}")
    for figure in rows:
        spread = f" +- {figure['spread']:.3f} ({figure['runs']} runs)" if figure["spread"] is not None else ""
        print(f"  {figure['name']:30} {figure['value']:.3f}{spread}", flush=True)


def together(evaluation: Evaluation, tables: dict) -> dict[str, list[dict]]:
    """Several subjects in one training."""
    for subjects in TOGETHER:
        results = [evaluation.run_together(subjects, seed, {}) for seed in SEEDS]
        rows = [row(key, [result[key] for result in results]) for key in results[0]]
        tables[" and ".join(subjects)] = rows
        show(f"Together: {' and '.join(subjects)}", rows)
    return tables


def settings_of(options: argparse.Namespace) -> dict[str, dict]:
    """What is trained: name -> options that differ from the configuration."""
    if options.lora:
        return dict(list(LORA_SETTINGS.items())[: 1 if options.quick else None])
    if options.recipes:
        return RECIPES
    more = ABLATIONS if options.ablations else dict([next(iter(ABLATIONS.items()))])
    if options.shapes:
        return {"figures": {}}
    return {"figures": {}} | ({} if options.quick else more)


def evaluate(options: argparse.Namespace) -> dict[str, list[dict]]:
    start_device("auto", mode=0)
    evaluation = Evaluation(options.work, each=1 if options.quick else 8)
    tables = {"figures": [row(name, [value]) for name, value in evaluation.judges.accuracy().items()]}
    subjects, seeds = (SHAPES, SEEDS[:2]) if options.shapes else (SUBJECTS, SEEDS)
    if options.quick or options.checkpoint or options.recipes:
        subjects, seeds = (options.subject,), SEEDS[:1]
    bases = {
        s: cached_json(options.work / f"base-{s}.json", lambda s=s: evaluation.base_figures(s))
        for s in subjects
    }
    tables["figures"].append(row("base_subject", [base["base_subject"] for base in bases.values()]))
    if options.checkpoint:
        figures = evaluation.figures_of(
            options.checkpoint, options.subject, bases[options.subject], "checkpoint"
        )
        tables["figures"] += [row(name, [value]) for name, value in figures.items()]
        show("Figures", tables["figures"])
        return tables
    if not (options.lora or options.recipes or options.together or options.shapes):
        file = options.work / f"base-{evaluation.each}.json"
        found = cached_json(file, evaluation.base)
        tables["figures"] += [row(name, [value]) for name, value in found.items()]
    show("Judge and base model", tables["figures"])
    if options.together:
        return together(evaluation, tables)
    for name, changes in settings_of(options).items():
        every = name in ("figures", "without the prior loss", "LoRA")
        used_subjects = subjects if every else subjects[:1]
        used_seeds = seeds if every and not options.lora else seeds[:1]
        pairs = [(subject, seed) for seed in used_seeds for subject in used_subjects]
        results = [
            evaluation.run(subject, seed, bases[subject], changes, options.lora) for subject, seed in pairs
        ]
        rows = [row(key, [result[key] for result in results]) for key in (*RUN_FIGURES, "megabytes")]
        show("Fine-tuned" if name == "figures" else name, rows)
        tables[name] = tables.get(name, []) + rows
    return tables


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one subject and seed, one picture a prompt of the base model"
    )
    parser.add_argument(
        "--ablations", action="store_true", help="more settings, the first subject and seed each"
    )
    parser.add_argument("--lora", action="store_true", help="LoRA instead of whole models, one seed")
    parser.add_argument("--recipes", action="store_true", help="optimizers, schedules and more, one seed")
    parser.add_argument("--together", action="store_true", help="two subjects in one training")
    parser.add_argument(
        "--shapes", action="store_true", help="subjects that differ from their class in shape"
    )
    parser.add_argument("--checkpoint", type=Path, help="judge this one and train nothing")
    parser.add_argument(
        "--subject", choices=SUBJECTS + SHAPES, default=SUBJECTS[0], help="of --quick and --checkpoint"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "output/evaluation", help="folder of runs and sheets"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(argv)
    with Ending("evaluate_tiny.py"):
        tables = evaluate(options)
        if options.json:
            write_text(options.json, json.dumps(tables, indent=2) + "\n")
        print(f"sheets: {options.work}")


if __name__ == "__main__":
    main()
