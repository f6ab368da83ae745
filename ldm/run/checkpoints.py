"""The checkpoints of a run: whole models, of which the training changes a part."""

import contextlib
import logging
import re
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from mindspore import nn

from ldm.config import ModelConfig
from ldm.memory import release_memory
from ldm.options import TrainOptions
from ldm.tokenizer import token_of
from ldm.weights.arrays import as_numpy
from ldm.weights.checkpoint import drop_values, move_to_disk, put_back_values, weights_of
from ldm.weights.digests import recorded_digests, write_digests
from ldm.weights.embeddings import TABLE, save_embedding
from ldm.weights.lora_writing import LoraWriter
from ldm.weights.source import read_file
from ldm.weights.writing import DTYPES, SUFFIXES, save_weights

NAME = re.compile(
    r"(dreambooth_(?:lora_|embedding_)?(epoch|step)_(\d+)(?:_ema)?(?:\.ckpt|\.safetensors)?)(?:/.+)?"
)
logger = logging.getLogger(__name__)


class Model(Protocol):
    """What checkpoints are made of: ldm.networks.latent_diffusion.LatentDiffusion."""

    config: ModelConfig
    first_stage_model: nn.Cell

    def parameter_names(self) -> list[str]: ...
    def take_out_frozen(self, train_text_encoder: bool) -> list[nn.Cell]: ...


class Checkpoints:
    """The checkpoints in a run's folder: `dreambooth_epoch_8.ckpt`, `dreambooth_step_400.ckpt`, which below
    have the names `epoch_8` and `step_400`.

    Of a LoRA training they hold the additions alone and are called `dreambooth_lora_epoch_8.safetensors`.
    With --train_token the word's embedding lies beside them, `dreambooth_embedding_epoch_8.safetensors`.

    Args:
        keep: of how many epochs, the newest ones; and of as many steps.
        to: their format, a key of ldm.weights.writing.SUFFIXES.
        dtype: of the numbers in them, a key of ldm.weights.writing.DTYPES.
    """

    def __init__(self, folder: Path, keep: int, to: str = "mindspore", dtype: str = "float32") -> None:
        self.folder, self.keep, self.format, self.dtype = folder, keep, to, dtype
        self.config: ModelConfig | None = None
        self.names: list[str] = []  # of all parameters of a model, in the order of a file
        self.frozen = {}  # parameters that are not trained
        self.lora: LoraWriter | None = None
        self.word: str | None = None
        self._are_on_disk = self._is_vae_away = False

    def take_frozen_from(self, model: Model, options: TrainOptions, lora: LoraWriter | None = None) -> None:
        """Take the networks that are not trained out of a model, for the checkpoints to come.

        With cached latents nothing else needs them any more: they move out of memory, into a nameless file in
        the folder, unless the checkpoints are those of `lora`, which have nothing of them, and nothing is to
        be brought back.
        """
        vae = model.first_stage_model
        self.lora, self.config, self.names = lora, model.config, model.parameter_names()
        self.word = options.train_token
        self._are_on_disk = options.cache_latents and not lora
        if options.trains_text and not options.train_text_encoder and not lora:
            # of the text encoder one word is trained: the rest of it goes into checkpoints as it is
            self.frozen |= weights_of(model.cond_stage_model)
        for network in model.take_out_frozen(options.trains_text):
            if not lora:
                self.frozen |= (
                    move_to_disk(network, self.folder) if self._are_on_disk else weights_of(network)
                )
            elif options.cache_latents and options.validation_prompt and network is vae:
                self.frozen |= move_to_disk(network, self.folder)
            elif options.cache_latents:
                drop_values(network)
        self._is_vae_away = options.cache_latents
        release_memory()

    @contextlib.contextmanager
    def brought_back(self, vae: nn.Cell) -> Iterator[None]:
        """A block in which the VAE that was taken out of the model is in memory, to draw with."""
        if not self._is_vae_away:
            yield
            return
        put_back_values(vae, self.frozen)
        try:
            yield
        finally:
            drop_values(vae)
            release_memory()

    def paths(self, name: str, has_averages: bool) -> list[Path]:
        """The weights, and with EMA the averaged ones."""
        endings = ("", "_ema") if has_averages else ("",)
        if self.lora:
            return [self.folder / f"dreambooth_lora_{name}{ending}.safetensors" for ending in endings]
        return [self.folder / f"dreambooth_{name}{ending}{SUFFIXES[self.format]}" for ending in endings]

    def are_there(self) -> bool:
        """Whether any is on the disk, of an epoch or of a step."""
        own = [own_checkpoints(self.folder, kind) for kind in ("epoch", "step")]
        return any(path.exists() for numbered in own for paths in numbered.values() for path in paths)

    def newest(self) -> Path | None:
        """The checkpoint that was written last, the averaged one where there are two."""
        own = [own_checkpoints(self.folder, kind) for kind in ("epoch", "step")]
        there = [path for numbered in own for paths in numbered.values() for path in paths if path.exists()]
        there = [path for path in there if "_embedding_" not in path.name]
        return max(there, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)

    def save(self, name: str, weights: Mapping, averages: Mapping | None) -> list[Path]:
        """Write the weights, and with EMA the averaged ones beside them; then remove what is not kept."""
        paths = self.paths(name, averages is not None)
        for path, changed in zip(paths, (weights, averages)):
            if self.lora:
                self.lora.save(changed, path, record=True)
            else:
                self._save_whole(changed, weights, path)
            logger.info("saved %s", path)
            if self.word is not None:
                self._save_embedding(embedding_beside(path), changed)
        if self._are_on_disk and self.format == "mindspore" and self.dtype == "float32":
            # which has them now: the nameless file goes, and this one stays open
            self.frozen = read_file(paths[0])
        for path in remove_old_checkpoints(self.folder, name, self.keep):
            logger.info("removed %s (--keep_weights)", path)
        return paths

    def _save_whole(self, changed: Mapping, weights: Mapping, path: Path) -> None:
        # one array of the frozen networks at a time; the last map gives the order
        whole = ChainMap(changed, weights, self.frozen, dict.fromkeys(self.names))
        if path.is_dir() and self._is_own(path):  # of a course that was abandoned
            shutil.rmtree(path)
        save_weights(whole, path, True, to=self.format, dtype=DTYPES[self.dtype], config=self.config)

    def _save_embedding(self, path: Path, weights: Mapping) -> None:
        token = token_of(self.word)
        save_embedding(self.word, as_numpy(weights[TABLE])[token : token + 1], path)
        logger.info("saved %s: the embedding of %r", path, self.word)

    def _is_own(self, path: Path) -> bool:
        return any(name.split("/")[0] == path.name for name in recorded_digests(self.folder))

    def save_if_missing(self, name: str, saved_at: int, weights: Mapping, averages: Mapping | None) -> None:
        """Write what a run that was killed after its state, saved at that time, has left out."""
        paths = self.paths(name, averages is not None)
        paths += [embedding_beside(path) for path in paths] if self.word is not None else []
        if not all(path.exists() and path.stat().st_mtime_ns >= saved_at for path in paths):
            self.save(name, weights, averages)


def embedding_beside(path: Path) -> Path:
    """Where the embedding of the word lies that was trained with a checkpoint."""
    name = path.name.removesuffix(".ckpt").removesuffix(".safetensors")
    name = name.removeprefix("dreambooth_").removeprefix("lora_")
    return path.with_name(f"dreambooth_embedding_{name}.safetensors")


def own_checkpoints(folder: Path, kind: str = "epoch") -> dict[int, list[Path]]:
    """Epoch or step to its checkpoints in a folder, of those that the run has recorded: others are not its
    own.
    """
    found: dict[int, list[Path]] = {}
    for name in recorded_digests(folder):
        match = NAME.fullmatch(name)
        if match and match[2] == kind and folder / match[1] not in found.setdefault(int(match[3]), []):
            found[int(match[3])].append(folder / match[1])
    return found


def remove_old_checkpoints(folder: Path, name: str, keep: int) -> list[Path]:
    """Remove the run's own checkpoints up to the epoch or step of that name, but for the `keep` newest.

    Returns which those were.
    """
    kind, number = name.split("_")
    there = own_checkpoints(folder, kind)
    old = [path for n in sorted(n for n in there if n <= int(number))[:-keep] for path in there[n]]
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if old:
        recorded = recorded_digests(folder).items()
        left = {name: digest for name, digest in recorded if folder / Path(name).parts[0] not in old}
        write_digests(folder, left)
    return old
