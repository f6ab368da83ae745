"""Runs DreamBooth on the embedded tiny model, draws with what comes out and has it judged: for
evaluate_tiny.py, which says what each figure means.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/tiny_model")]
from drawer import BASE, CONFIG, Drawer

from ldm import images
from ldm.files import write_text

NAMES = ("sks", "ohwx", "olis")  # rare words, for the first subject and more
LORA_CONFIG = ROOT / "configs/train_dreambooth_lora_tiny.json"
NEW_PLACES = (
    "in the snow",
    "on the beach",
    "at night",
    "in front of a brick wall",
    "in the forest",
    "in the desert",
)


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

    def word(self, subject: str) -> str:
        """What people call the class of a subject."""
        return self.judges.class_of[subject]

    def draw_subject_in_new_places(self, checkpoint: Path, subject: str, name: str = "sks") -> np.ndarray:
        """The subject, of that rare name, in the new places, four times each; drawn once."""
        if (checkpoint, subject) not in self._drawn:
            prompts = [f"a {name} {self.word(subject)} {place}" for _ in range(4) for place in NEW_PLACES]
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
        alone = self.drawer(checkpoint, [noun(self.word(subject))] * 32, seed=3)
        others = [word for word in self.classes if word != self.word(subject) for _ in range(4)]
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

    def subject(self, subject: str, name: str, count: str | int) -> dict:
        """Its images, its class and their prompts, by the names of options."""
        word = self.word(subject)
        return {
            "instance_data_dir": str(ROOT / "examples" / subject), "instance_prompt": f"a {name} {word}",
            "class_data_dir": str(self.work / "class_images" / f"{word}-{count}"), "class_prompt": noun(word),
        }  # fmt: skip

    def train(self, subjects: tuple[str, ...], seed: int, changes: dict, is_lora: bool = False) -> Path:
        """Fine-tune on one subject or on several at once, or find the checkpoint of an earlier start."""
        settings = [f"{key}={value}" for key, value in changes.items()]
        name = "-".join(["lora"] * is_lora + [*subjects, str(seed), *settings])
        folder = self.work / "runs" / name
        found = "dreambooth_lora_epoch_*" if is_lora else "dreambooth_epoch_*"
        if not (done := folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted start of this script has left
            count = changes.get("num_class_images", "default")
            named = [self.subject(subject, name, count) for subject, name in zip(subjects, NAMES)]
            arguments = {
                "train_config": LORA_CONFIG if is_lora else CONFIG.with_suffix(".json"),
                "model_config": CONFIG.with_suffix(".yaml"), "pretrained_model_path": BASE.parent,
                "output_path": folder, "seed": seed, **named[0],
            } | changes  # fmt: skip
            if len(subjects) > 1:
                arguments["concepts"] = folder.with_suffix(".json")
                write_text(arguments["concepts"], json.dumps(named, indent=2))
            words = [f"--{key}={value}" for key, value in arguments.items()]
            command = [sys.executable, str(ROOT / "train_dreambooth.py"), *words]
            result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if result.returncode:
                raise ChildProcessError(
                    f"training {name} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
            done.touch()
        return max(folder.glob(found), key=lambda path: int(path.stem.split("_")[-1]))

    def run(self, subject: str, seed: int, base: dict, changes: dict, is_lora: bool) -> dict[str, float]:
        checkpoint = self.train((subject,), seed, changes, is_lora)
        return {"megabytes": checkpoint.stat().st_size / 1e6} | cached_json(
            checkpoint.with_name("figures.json"),
            lambda: self.figures_of(checkpoint, subject, base, checkpoint.parent.name),
        )

    def run_together(self, subjects: tuple[str, ...], seed: int, changes: dict) -> dict[str, float]:
        """Figures of several subjects that one model has learned, by subject."""
        checkpoint = self.train(subjects, seed, changes)
        return cached_json(
            checkpoint.with_name("figures.json"), lambda: self.figures_together(checkpoint, subjects)
        )

    def figures_together(self, checkpoint: Path, subjects: tuple[str, ...]) -> dict[str, float]:
        """How well each is drawn, and how often another one instead; and a sheet."""
        figures, sheets = {}, []
        for subject, name in zip(subjects, NAMES):
            drawn = self.draw_subject_in_new_places(checkpoint, subject, name)
            alone = self.drawer(checkpoint, [noun(self.word(subject))] * 24, seed=3)
            sheets += [drawn, alone]
            by_subject, by_class = self.judges(drawn).subjects, self.judges(alone).subjects
            others = [by_subject[other] for other in subjects if other != subject]
            found = self.fidelity(drawn, subject) | {
                "confusion": float(np.any(others, 0).mean()),
                "prior_leak": float(np.any([by_class[own] for own in subjects], 0).mean()),
            }
            figures |= {f"{subject}: {figure}": value for figure, value in found.items()}
        self.sheet(np.concatenate(sheets), checkpoint.parent.name, 12)
        return figures


def cached_json(file: Path, measure: Callable[[], dict]) -> dict:
    """What `measure` finds, from the file where an earlier start has left it."""
    if not file.exists():
        write_text(file, json.dumps(measure(), indent=2))
    return json.loads(file.read_text())
