"""What a training's result follows from, and where it can be resumed: from a state, from its beginning, or
not at all.

`run.json` in the output folder says what the run there is made of, from its first update on, and whether it
has ended. States come minutes apart: killed before the first one, a run can only begin again, and only as it
was, for its checkpoints are written again.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ldm.config import ModelConfig
from ldm.files import fingerprint, write_text
from ldm.image_files import mask_file
from ldm.options import TrainOptions
from ldm.run.states import State, States, read_state
from ldm.subjects import Picture, Subject
from ldm.values import ConfigError
from ldm.weights.lora_files import find_lora

RECORD = "run.json"
logger = logging.getLogger(__name__)


class Counting(Protocol):
    """How a run's samples make up updates: ldm.training.progress.Progress."""

    samples_per_update: int
    text_stop: int | None  # the update after which the text encoder is frozen


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    Attributes:
        state: to restore, or None for the beginning.
        origin: what the run in the output folder, or that of the state, is made of; None where there is none
            to be the same as.
        ended: the last update of a run that has ended, or None.
    """

    state: State | None = None
    origin: dict | None = None
    ended: int | None = None

    @property
    def global_step(self) -> int:
        return self.state.progress["global_step"] if self.state else 0

    def summary(self) -> list[int]:
        """Numbers that differ where two processes would start differently."""
        return [self.global_step if self.state else -1, self.ended or -1, int(self.origin is None)]

    def is_done(self, total_updates: int) -> bool:
        """Whether nothing is left to do.

        With a state of the end its checkpoints can be written again, should they be missing.
        """
        return self.ended is not None and total_updates <= self.ended and self.global_step < self.ended

    def changes(self, now: dict) -> list[str]:
        """What differs from the run that was begun, as far as `now` tells."""
        before = now if self.origin is None else TrainOptions.facts_of_before() | self.origin
        return [line for name, value in now.items() for line in _differences(name, before.get(name), value)]

    def require_same(self, now: dict, allowed: bool) -> None:
        """Raises ConfigError where the training would not be the one that was begun, as far as `now` tells,
        unless allowed.
        """
        changes = self.changes(now)
        if changes and not self.state:
            raise ConfigError(
                f"resume: changed since the run began: {'; '.join(changes)}; it has saved no state, so that "
                f"it could only "
                "begin again as it was: give another folder"
            )
        if changes and not allowed:
            raise ConfigError(
                f"resume: changed since the state was saved: {'; '.join(changes)}; "
                f"--allow_changed_options=True continues anyway"
            )
        for change in changes:
            logger.warning("resume: changed: %s", change)

    def leaves_work(self, total_updates: int, origin: dict, allowed: bool, output: Path) -> bool:
        """Whether anything is left to do. Raises as `require_same` and `require_that_it_can_continue` do."""
        self.require_same(origin, allowed)
        self.require_that_it_can_continue(total_updates, output)
        return not self.is_done(total_updates) or bool(self.changes(origin))

    def require_that_it_can_continue(self, total_updates: int, output: Path) -> None:
        """Raises ConfigError where a run that has ended is to be made longer, but has kept no state."""
        if self.ended is not None and not self.state and total_updates > self.ended:
            raise ConfigError(
                f"resume: the run in {output} ended after {self.ended} updates and kept no state to continue "
                f"from "
                "(--save_state_minutes=0 keeps one); give another folder, there with "
                "--pretrained_model_path=FILE, its last checkpoint"
            )


def _differences(name: str, before, now) -> list[str]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [f"{name} {before} -> {now}"] if before != now else []
    keys = [*now, *(key for key in before if key not in now)]
    return [line for key in keys for line in _differences(f"{name}: {key}", before.get(key), now.get(key))]


def results(output: Path) -> list[Path]:
    """What a run has left in its output folder and another must not overwrite."""
    return sorted(
        path.relative_to(output)
        for kind in (
            "dreambooth_epoch_*",
            "dreambooth_step_*",
            "dreambooth_lora_*",
            "dreambooth_embedding_*",
            "states/step_*",
        )
        for path in output.glob(kind)
    )


def resumes_here(resume: str | None, output: Path) -> bool:
    """Whether --resume continues the run in this output folder."""
    return resume == "latest" or bool(
        resume and Path(resume).resolve().parent == (output / "states").resolve()
    )


def find_start(resume: str | None, output: Path, states: States) -> Start:
    """Where `--resume` begins. Raises ConfigError where results are there, but nothing to continue from."""
    if resume is None:
        return Start()
    record = read_record(output)
    if resume != "latest":
        return _from_state(read_state(Path(resume)), record if resumes_here(resume, output) else None)
    if state := states.latest():
        return _from_state(state, record)
    found = results(output)
    if not found:
        logger.info("resume: no state there yet, starting from the beginning")
        return Start()
    if states.paths() or not record:
        raise ConfigError(
            f"resume: output_path {output} holds {found[-1]}, but no state that can be read; give another "
            f"folder to start "
            "again, there with --pretrained_model_path=FILE to continue training a checkpoint"
        )
    if record["ended"] is None:
        text = (
            "resume: the run was stopped before it saved a state (--save_state_minutes): starting from "
            "the beginning"
        )
        logger.warning(text)
    return Start(None, record["origin"], record["ended"])


def _from_state(state: State, record: dict | None) -> Start:
    """Of a run that was resumed with other options, and has saved no state since, `record` knows them."""
    return Start(state, record["origin"], record["ended"]) if record else Start(state, state.origin)


def read_record(output: Path) -> dict | None:
    """What `write_record` wrote, or None where there is nothing that can be read."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        ended = record["ended"]
        return {"origin": dict(record["origin"]), "ended": None if ended is None else int(ended)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(output: Path, origin: dict, ended: int | None = None) -> None:
    """Note what the run is made of, before its first update; and with the number of its last, that it has
    ended.
    """
    write_text(output / RECORD, json.dumps({"origin": origin, "ended": ended}, indent=2) + "\n")


def origin_of(
    options: TrainOptions, config: ModelConfig, base: list[Path], subjects: list[Subject], progress: Counting
) -> dict:  # fmt: skip
    """What a training's result follows from, to be compared when it is resumed; without the class images, see
    below.

    Args:
        base: the files of the base model.
        progress: how many samples an update has.

    The names are those in the files of saved states.
    """
    pictures = [picture for subject in subjects for picture in subject.pictures]
    averaged = " averaged" if options.use_ema_weights else ""
    lora, word = options.use_lora and options.lora_ckpt_path, options.embedding_path
    return {
        **options.training_facts(),
        "instance pictures an update": progress.samples_per_update,
        "instance pictures": fingerprint([picture.path for picture in pictures]),
        "base model": fingerprint(base) + averaged,
        "model configuration": json.loads(json.dumps(config.facts())),
        **_captions(pictures, options, "instance"),
        **_masks(pictures),
        "text encoder frozen after": progress.text_stop,
        **({"LoRA at the start": fingerprint([find_lora(Path(lora))[0]])} if lora else {}),
        "embedding at the start": fingerprint([Path(word)]) if word else None,
    }


def _captions(pictures: Sequence[Picture], options: TrainOptions, whose: str) -> dict:
    """Of images that have prompts of their own, what these are."""
    if options.captions == "none":
        return {f"{whose} captions": None}
    text = json.dumps([picture.prompt for picture in pictures])
    return {f"{whose} captions": hashlib.sha256(text.encode()).hexdigest()}


def _masks(pictures: Sequence[Picture]) -> dict:
    """Of images with masks, what these are; one without a file of its own is part of the image."""
    paths = [
        path for path in map(mask_file, (its.path for its in pictures if its.has_mask)) if path.is_file()
    ]
    return {"masks": fingerprint(paths) if paths else None}


def origin_of_class_images(classes: list[list[Picture]], options: TrainOptions) -> dict:
    """The rest of it, which is known only when the missing ones have been generated."""
    pictures = [picture for pictures in classes for picture in pictures]
    paths = [picture.path for picture in pictures]
    return {"class pictures": fingerprint(paths), **_captions(pictures, options, "class")}
