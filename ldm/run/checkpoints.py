"""The checkpoints of a run: whole models, of which the training changes a part."""

import logging
import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from mindspore import nn

from ldm.memory import release_memory
from ldm.options import TrainOptions
from ldm.weights.checkpoint import move_to_disk, recorded_digests, save_weights, weights_of, write_digests
from ldm.weights.mindspore_ckpt import read_ckpt

NAME = re.compile(r"dreambooth_epoch_(\d+)(_ema)?\.ckpt")
logger = logging.getLogger(__name__)


class Model(Protocol):
    """What checkpoints are made of: ldm.networks.latent_diffusion.LatentDiffusion."""

    def parameter_names(self) -> list[str]: ...
    def take_out_frozen(self, train_text_encoder: bool) -> list[nn.Cell]: ...


class Checkpoints:
    """The checkpoints in a run's folder.

    Args:
        keep: of how many epochs, the newest ones.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.names: list[str] = []  # of all parameters of a model, in the order of a file
        self.frozen = {}  # parameters that are not trained
        self._are_on_disk = False

    def take_frozen_from(self, model: Model, options: TrainOptions) -> None:
        """Take the networks that are not trained out of a model, for the checkpoints to come.

        With cached latents nothing else needs them any more: they move out of memory, into a nameless file in
        the folder.
        """
        self.names, self._are_on_disk = model.parameter_names(), options.cache_latents
        for network in model.take_out_frozen(options.train_text_encoder):
            self.frozen |= move_to_disk(network, self.folder) if self._are_on_disk else weights_of(network)
        release_memory()

    def paths(self, epoch: int, has_averages: bool) -> list[Path]:
        """Of an epoch: the weights, and with EMA the averaged ones."""
        endings = ("", "_ema") if has_averages else ("",)
        return [self.folder / f"dreambooth_epoch_{epoch}{ending}.ckpt" for ending in endings]

    def save(self, epoch: int, weights: Mapping, averages: Mapping | None) -> list[Path]:
        """Write the whole model's weights, and with EMA the averaged ones beside them; then remove what is
        not kept.
        """
        paths = self.paths(epoch, averages is not None)
        for path, changed in zip(paths, ({}, averages)):
            # one array of the frozen networks at a time; the last map gives the order
            save_weights(
                ChainMap(changed, weights, self.frozen, dict.fromkeys(self.names)), path, record=True
            )
            logger.info("saved %s", path)
        if self._are_on_disk:
            # which has them now: the nameless file goes, and this one stays open
            self.frozen = read_ckpt(paths[0])
        for path in remove_old_checkpoints(self.folder, epoch, self.keep):
            logger.info("removed %s (--keep_weights)", path)
        return paths

    def save_if_missing(self, epoch: int, saved_at: int, weights: Mapping, averages: Mapping | None) -> None:
        """Write what a run that was killed after its state, saved at that time, has left out."""
        paths = self.paths(epoch, averages is not None)
        if not all(path.exists() and path.stat().st_mtime_ns >= saved_at for path in paths):
            self.save(epoch, weights, averages)


def own_checkpoints(folder: Path) -> dict[int, list[Path]]:
    """Epoch to its checkpoints in a folder, of those that the run has recorded: others are not its own."""
    epochs: dict[int, list[Path]] = {}
    for name in recorded_digests(folder):
        if match := NAME.fullmatch(name):
            epochs.setdefault(int(match[1]), []).append(folder / name)
    return epochs


def remove_old_checkpoints(folder: Path, epoch: int, keep: int) -> list[Path]:
    """Remove the run's own checkpoints of epochs up to `epoch`, but for the `keep` newest.

    Returns which those were.
    """
    epochs = own_checkpoints(folder)
    old = [
        path
        for number in sorted(number for number in epochs if number <= epoch)[:-keep]
        for path in epochs[number]
    ]
    for path in old:
        path.unlink(missing_ok=True)
    if old:
        left = {name: digest for name, digest in recorded_digests(folder).items() if folder / name not in old}
        write_digests(folder, left)
    return old
