"""How well DreamBooth works on the embedded tiny model: figures, each judged by scripts/tiny_model/judge.py.

    python scripts/tiny_model/evaluate_tiny.py --quick                     # one subject, one seed
    python scripts/tiny_model/evaluate_tiny.py --json quality.json
        # base model, three subjects, three seeds: over an hour
    python scripts/tiny_model/evaluate_tiny.py --ablations
        # and text encoder, class pictures, steps: the first subject and seed
    python scripts/tiny_model/evaluate_tiny.py --lora
        # LoRA: three subjects; ranks and targets: the first subject
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
  other_classes      class right of the other classes, base model less fine-tuned
  megabytes          of the checkpoint
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/tiny_model")]
from drawer import BASE, CONFIG, Drawer

from ldm import images
from ldm.command_line import Ending
from ldm.device import start_device
from ldm.files import write_text

LORA_CONFIG = ROOT / "configs/train_dreambooth_lora_tiny.json"
SUBJECTS, SEEDS = ("penguin", "car", "house"), (1, 2, 3)
NEW_PLACES = (
    "in the snow",
    "on the beach",
    "at night",
    "in front of a brick wall",
    "in the forest",
    "in the desert",
)
RUN_FIGURES = ("subject_fidelity", "prompt_fidelity", "prior_leak", "prior_diversity", "other_classes")
ABLATIONS = {  # name -> options of the training that differ
    "without the prior loss": {"with_prior_preservation": False},
    "text encoder frozen": {"train_text_encoder": False},
    "50 class pictures": {"num_class_images": 50},
    "200 class pictures": {"num_class_images": 200},
    "half the steps": {"train_data_repeats": 20},
    "twice the steps": {"train_data_repeats": 80},
}
LORA_SETTINGS = {  # the same for --lora; the first is what the configuration says
    "LoRA": {},
    "LoRA of rank 4": {"lora_rank": 4},
    "LoRA of rank 64": {"lora_rank": 64},
    "LoRA, feed-forward layers too": {"lora_targets": "+feed_forward"},
    "LoRA, all kinds of layers": {"lora_targets": "+feed_forward+projections+convolutions"},
    "LoRA, text encoder frozen": {"train_text_encoder": False},
}


def noun(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


class Evaluation:
    """Draws, judges and keeps the sheets.

    Args:
        work: folder for runs and sheets.
        each: pictures of the base model a prompt.
    """

    def __init__(self, work: Path, each: int) -> None:
        from judge import Judges

        self.work, self.each = work, each
        work.mkdir(parents=True, exist_ok=True)
        self.drawer, self.judges = Drawer(), Judges()
        self._drawn: dict[tuple[Path, str], np.ndarray] = {}
        self.classes, self.places = self.judges.labels["class"], self.judges.labels["place"]

    def sheet(self, pictures: np.ndarray, name: str, columns: int) -> None:
        path = self.work / f"{name}.png"
        path.unlink(missing_ok=True)  # an earlier one of this script's own
        images.save_image(images.grid(pictures, columns), path)

    def base(self) -> dict[str, float]:
        """The figures of the base model."""
        import pictures

        prompts, classes, places = [], [], []
        for word in self.classes:
            for place, wordings in pictures.PLACES.items():
                for number, wording in enumerate(wordings):
                    colour = list(pictures.COLOURS)[(len(prompts) + number) % len(pictures.COLOURS)]
                    prompts += [f"{noun(word)} {wording.format(colour)}"] * self.each
                    classes, places = classes + [word] * self.each, places + [place] * self.each
        drawn = self.drawer(BASE, prompts, seed=0)
        self.sheet(drawn[:: self.each], "base", 22)
        verdicts = self.judges(drawn)
        class_right, place_right = verdicts.classes == np.array(classes), verdicts.places == np.array(places)
        pairs = [
            (colour, word)
            for word in self.classes
            for colour in pictures.COLOURS
            for _ in range(min(2, self.each))
        ]
        coloured = self.drawer(BASE, [f"{noun(colour)} {word}" for colour, word in pairs], seed=1)
        self.sheet(coloured, "base_colours", 20)
        verdicts = self.judges(coloured)
        return {
            "base_class_right": float(class_right.mean()),
            "base_place_right": float(place_right.mean()),
            "base_both_right": float((class_right & place_right).mean()),
            "base_vae_psnr": self.drawer.psnr(BASE, self.judges.held_out),
            "base_colour_right": float(
                (verdicts.colours == np.array([colour for colour, _ in pairs])).mean()
            ),
            **{
                f"base_class_right_{word.replace(' ', '_')}": float(
                    class_right[np.array(classes) == word].mean()
                )
                for word in self.classes
            },
        }

    def draw_subject_in_new_places(self, checkpoint: Path, subject: str) -> np.ndarray:
        """The subject in the new places, four times each; drawn once."""
        if (checkpoint, subject) not in self._drawn:
            prompts = [f"a sks {subject} {place}" for _ in range(4) for place in NEW_PLACES]
            self._drawn[checkpoint, subject] = self.drawer(checkpoint, prompts, seed=2)
        return self._drawn[checkpoint, subject]

    def fidelity(self, drawn: np.ndarray, subject: str) -> dict[str, float]:
        """Of what `draw_subject_in_new_places` drew."""
        verdicts, places = (
            self.judges(drawn),
            [self.place_of(place) for _ in range(4) for place in NEW_PLACES],
        )
        return {
            "subject_fidelity": float(verdicts.subjects[subject].mean()),
            "prompt_fidelity": float((verdicts.places == np.array(places)).mean()),
        }

    def draw_class_and_others(
        self, checkpoint: Path, subject: str
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """The subject's class alone, other classes, and the latter's names."""
        alone = self.drawer(checkpoint, [noun(subject)] * 32, seed=3)
        others = [word for word in self.classes if word != subject for _ in range(4)]
        return (
            alone,
            self.drawer(
                checkpoint, [f"{noun(word)} {NEW_PLACES[n % 6]}" for n, word in enumerate(others)], seed=4
            ),
            others,
        )

    def base_figures(self, subject: str) -> dict:
        """What the figures of a fine-tuned model are compared with."""
        alone, rest, others = self.draw_class_and_others(BASE, subject)
        return {
            "base_subject": self.fidelity(self.draw_subject_in_new_places(BASE, subject), subject)[
                "subject_fidelity"
            ],
            "diversity": self.judges(alone).diversity(),
            "others": float((self.judges(rest).classes == np.array(others)).mean()),
        }

    def figures_of(self, checkpoint: Path, subject: str, base: dict, name: str) -> dict[str, float]:
        """The figures of a fine-tuned checkpoint, and a sheet of what it draws."""
        drawn, (alone, rest, others) = (
            self.draw_subject_in_new_places(checkpoint, subject),
            self.draw_class_and_others(checkpoint, subject),
        )
        self.sheet(np.concatenate([drawn, alone, rest]), name, 12)
        by_class = self.judges(alone)
        return self.fidelity(drawn, subject) | {
            "prior_leak": float(by_class.subjects[subject].mean()),
            "prior_diversity": by_class.diversity() / base["diversity"],
            "other_classes": base["others"] - float((self.judges(rest).classes == np.array(others)).mean()),
        }

    @staticmethod
    def place_of(wording: str) -> str:
        import pictures

        return next(place for place, wordings in pictures.PLACES.items() if wording in wordings)

    def train(self, subject: str, seed: int, changes: dict, is_lora: bool) -> Path:
        """Fine-tune, or find the checkpoint of an earlier start."""
        settings = [f"{key}={value}" for key, value in changes.items()]
        name = "-".join(["lora"] * is_lora + [subject, str(seed), *settings])
        folder = self.work / "runs" / name
        if not (done := folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted start of this script has left
            count = changes.get("num_class_images", "default")
            arguments = {
                "train_config": LORA_CONFIG if is_lora else CONFIG.with_suffix(".json"),
                "model_config": CONFIG.with_suffix(".yaml"),
                "pretrained_model_path": BASE.parent, "instance_data_dir": ROOT / "examples" / subject,
                "instance_prompt": f"a sks {subject}", "class_prompt": noun(subject),
                "class_data_dir": self.work / "class_images" / f"{subject}-{count}", "output_path": folder,
                "seed": seed,
            } | changes  # fmt: skip
            command = [
                sys.executable,
                str(ROOT / "train_dreambooth.py"),
                *(f"--{key}={value}" for key, value in arguments.items()),
            ]
            result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if result.returncode:
                raise ChildProcessError(
                    f"training {name} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
            done.touch()
        found = folder.glob("dreambooth_lora_epoch_*" if is_lora else "dreambooth_epoch_*")
        return max(found, key=lambda path: int(path.stem.split("_")[-1]))

    def run(self, subject: str, seed: int, base: dict, changes: dict, is_lora: bool) -> dict[str, float]:
        checkpoint = self.train(subject, seed, changes, is_lora)
        return {"megabytes": checkpoint.stat().st_size / 1e6} | cached_json(
            checkpoint.with_name("figures.json"),
            lambda: self.figures_of(checkpoint, subject, base, checkpoint.parent.name),
        )


def cached_json(file: Path, measure: Callable[[], dict]) -> dict:
    """What `measure` finds, from the file where an earlier start has left it."""
    if not file.exists():
        write_text(file, json.dumps(measure(), indent=2))
    return json.loads(file.read_text())


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


def settings_of(options: argparse.Namespace) -> dict[str, dict]:
    """What is trained: name -> options that differ from the configuration."""
    if options.lora:
        return dict(list(LORA_SETTINGS.items())[: 1 if options.quick else None])
    more = ABLATIONS if options.ablations else dict([next(iter(ABLATIONS.items()))])
    return {"figures": {}} | ({} if options.quick else more)


def evaluate(options: argparse.Namespace) -> dict[str, list[dict]]:
    start_device("auto", mode=0)
    evaluation = Evaluation(options.work, each=1 if options.quick else 8)
    tables = {"figures": [row(name, [value]) for name, value in evaluation.judges.accuracy().items()]}
    subjects, seeds = (
        ((options.subject,), SEEDS[:1]) if options.quick or options.checkpoint else (SUBJECTS, SEEDS)
    )
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
    if not options.lora:
        file = options.work / f"base-{evaluation.each}.json"
        found = cached_json(file, evaluation.base)
        tables["figures"] += [row(name, [value]) for name, value in found.items()]
    show("Judge and base model", tables["figures"])
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
    parser.add_argument("--checkpoint", type=Path, help="judge this one and train nothing")
    parser.add_argument(
        "--subject", choices=SUBJECTS, default=SUBJECTS[0], help="of --quick and --checkpoint"
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
