"""Validation images in a run's folder, `validation/step_000200.png`: a grid for each update that has one, a
row for each prompt.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
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

    def draw(self, trainer, on_step: Callable[[], None]) -> np.ndarray: ...


class _Abandoned(Exception):
    """The run is to stop."""


class Validation:
    """When a run draws, and where that goes. Nothing that goes wrong there ends a training.

    Args:
        draws: makes the images; None: there are none to make, here or at all.
        is_stopping: whether the run is to stop: it does not wait for images then.
    """

    def __init__(
        self, folder: Path, options: TrainOptions, draws: Draws | None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.folder, self.options, self.draws = folder / "validation", options, draws
        self.is_stopping = is_stopping

    def _go_on(self) -> None:
        if self.is_stopping():
            raise _Abandoned

    def path(self, update: int) -> Path:
        return self.folder / f"step_{update:06d}.png"

    def begin(self, global_step: int) -> None:
        """Remove what an earlier start drew after this update: its course is abandoned. At the beginning that
        is all of it, the base model's images, too, for that may be another.
        """
        if self.draws:
            for update, path in grids_in(self.folder):
                if update > global_step or not global_step:
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
            drawn = self.draws.draw(trainer, self._go_on)
            grid = images.grid(drawn.reshape(-1, *drawn.shape[2:]), columns=drawn.shape[1])
            images.save_image(grid, self.path(update), {OWN: json.dumps(self._facts(update))})
        except _Abandoned:
            logger.info("no validation images of update %d: the run stops", update)
            return None
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
    """What a grid shows, or nothing. Of a file that has not changed since it is read once only."""
    return _facts_of(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _facts_of(path: Path, _: int) -> dict:
    try:
        return json.loads(images.read_texts(path)[OWN])
    except (OSError, ValueError, KeyError, SyntaxError):  # the last of Pillow, for a damaged PNG
        return {}


def rows_of(grid: np.ndarray, prompts: Sequence[str]) -> list[np.ndarray]:
    """A grid's rows, one for each prompt."""
    height = (len(grid) - images.PADDING) // len(prompts)
    return [grid[row * height : (row + 1) * height + images.PADDING] for row in range(len(prompts))]
