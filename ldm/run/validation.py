"""Validation images in a run's folder, `validation/step_000200.png`: a grid for each update that has one, a
row for each prompt.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ldm import images
from ldm.options import TrainOptions

NAME = re.compile(r"step_(\d{6,})\.png")
OWN = "validation"  # the name of the text in a grid's file
logger = logging.getLogger(__name__)


class Draws(Protocol):
    """ldm.training.validation.ValidationImages, which explains the method."""

    def draw(self, trainer) -> np.ndarray: ...


class Validation:
    """When a run draws, and where that goes. Nothing that goes wrong there ends a training.

    Args:
        draws: makes the images; None: there are none to make, here or at all.
    """

    def __init__(self, folder: Path, options: TrainOptions, draws: Draws | None) -> None:
        self.folder, self.options, self.draws = folder / "validation", options, draws

    def path(self, update: int) -> Path:
        return self.folder / f"step_{update:06d}.png"

    def begin(self, global_step: int) -> None:
        """Remove what an earlier start drew after this update: its course is abandoned."""
        if self.draws:
            for update, path in grids_in(self.folder):
                if update > global_step:
                    path.unlink()

    def is_due(self, update: int, has_checkpoint: bool, is_last: bool) -> bool:
        """Whether images belong to an update; 0 is the base model."""
        every = self.options.validation_every
        if update == 0 or is_last:
            return True
        return update % every == 0 if every else has_checkpoint

    def draw(self, update: int, trainer) -> np.ndarray | None:
        """Write the grid of an update, which is returned; None where there is nothing to do."""
        if not self.draws or self.path(update).exists():
            return None
        try:
            drawn = self.draws.draw(trainer)
            grid = images.grid(drawn.reshape(-1, *drawn.shape[2:]), columns=drawn.shape[1])
            images.save_image(grid, self.path(update), {OWN: json.dumps(self._facts(update))})
        except (FloatingPointError, OSError) as error:
            logger.warning("no validation images of update %d: %s", update, error)
            return None
        except (RuntimeError, MemoryError) as error:  # of MindSpore, say where memory does not suffice
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("no validation images from update %d on: %s", update, reason)
            self.draws = None
            return None
        logger.info("validation images of update %d: %s", update, self.path(update))
        return grid

    def _facts(self, update: int) -> dict:
        options = self.options
        return {
            "update": update, "prompts": list(options.validation_prompt), "seed": options.seed,
            "sampler": options.class_sampler, "sampling_steps": options.sampling_steps,
            "guidance_scale": options.validation_guidance_scale, "images": options.validation_images,
        }  # fmt: skip


def grids_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """The grids that runs have written there, with their updates, which rise."""
    named = ((NAME.fullmatch(path.name), path) for path in folder.glob("step_*.png"))
    for update, path in sorted((int(match[1]), path) for match, path in named if match):
        if facts_of(path):
            yield update, path


def facts_of(path: Path) -> dict:
    """What a grid shows, or nothing."""
    try:
        return json.loads(images.read_texts(path)[OWN])
    except (OSError, ValueError, KeyError, SyntaxError):  # the last of Pillow, for a damaged PNG
        return {}


def rows_of(grid: np.ndarray, prompts: Sequence[str]) -> list[np.ndarray]:
    """A grid's rows, one for each prompt."""
    height = (len(grid) - images.PADDING) // len(prompts)
    return [grid[row * height : (row + 1) * height + images.PADDING] for row in range(len(prompts))]
