"""The options of train_dreambooth.py. Must not import mindspore."""

import dataclasses
import importlib.util
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ldm.concepts import SUBJECT_KEYS, Concept, read_concepts
from ldm.config import ModelConfig
from ldm.device import is_dry_run
from ldm.fields import (
    beside_program,
    came_later,
    check_folders,
    check_version,
    lora_target_names,
    require_weights,
)
from ldm.other_names import TRAINING
from ldm.train_fields import TrainFields
from ldm.values import ConfigError
from ldm.versions import official_file, version_from_environment

LEAST_FACTOR = 0.01  # of Prodigy's rate: less is a rate that was meant for another optimizer


@dataclass(frozen=True)
class TrainOptions(TrainFields):
    """Fine-tune Stable Diffusion on a few images of one subject or several (DreamBooth, arXiv 2208.12242)."""

    EXAMPLE: ClassVar[str] = (
        'python train_dreambooth.py --instance_data_dir=my_dog --instance_prompt="a photo of sks dog" \\\n'
        '      --class_data_dir=dogs --class_prompt="a photo of a dog" --output_path=output/my_dog'
    )

    OTHER_NAMES: ClassVar[dict[str, str]] = TRAINING

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.version or version_from_environment())
        left_open = {
            "random_flip": self.random_crop,
            "betas": (0.9, 0.99) if self.optim == "lion" else (0.9, 0.999),
            "start_learning_rate": 1.0 if self.optim == "prodigy" else 5e-6,
        }
        for name, value in left_open.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def kept_apart(self) -> "TrainOptions":
        """In a dry run with folders of its own: what it writes must not be taken for the results of a run."""
        if not is_dry_run():
            return self
        output = Path(self.output_path) / "dry_run"
        return dataclasses.replace(self, output_path=str(output), class_data_dir=str(output / "class_images"))

    def for_model(self, config: ModelConfig) -> "TrainOptions":
        """With what was left to the model filled in. Raises ConfigError for images that it cannot make."""
        end = min(self.max_timestep, config.noise_schedule.timesteps)
        if self.min_timestep >= end:
            raise ConfigError(f"min_timestep must be less than {end}, got {self.min_timestep}")
        size = self.image_size or config.image_size
        config.check_size(image_size=size)
        config.check_steps(self.sampling_steps)
        return dataclasses.replace(self, image_size=size, max_timestep=end)

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot work and for files that are not there."""
        self._check_lora()
        self._check_recipe()
        self._check_validation()
        for concept in self.subjects:
            for name in concept.missing(self.with_prior_preservation):
                more = " with prior preservation (or give --with_prior_preservation=False)"
                why = more if name.startswith("class") else ""
                where = f"{self.concepts}: {name}" if self.concepts else f"--{name}"
                raise ConfigError(f"{where} is missing: it is required{why}")
        classes = [its.class_data_dir for its in self.subjects] if self.with_prior_preservation else [None]
        for concept, class_data_dir in itertools.product(self.subjects, classes):
            check_folders(concept.instance_data_dir, class_data_dir, self.output_path)
        if self.resume not in (None, "latest") and not Path(self.resume).is_dir():
            raise ConfigError(f"resume must be latest, or a folder states/step_* of a run, got {self.resume}")
        check_version(self.version)
        tiny = f" (or try the embedded model: bash {beside_program('scripts/demo.sh')})"
        is_default = (self.pretrained_model_path, self.pretrained_model_file) == ("models/", None)
        hint = "see models/README.md for where to get it"
        require_weights(self.checkpoint, hint + tiny if is_default else hint)

    def _check_recipe(self) -> None:
        """Raise ConfigError where an option of the training would not act."""
        trains_word = self.train_token is not None
        decays = self.decay_steps or self.lr_schedule not in (None, "constant")
        wrong = [
            (self.end_learning_rate is not None and not decays,
            "end_learning_rate is set but decay_steps is 0: give --decay_steps too, or an --lr_schedule"),
            (self.lr_cycles > 1 and self.lr_schedule != "cosine_with_restarts",
            "lr_cycles acts with --lr_schedule=cosine_with_restarts only"),
            (self.lr_power != 1 and self.lr_schedule != "polynomial",
            "lr_power acts with --lr_schedule=polynomial only"),
            (self.decay_steps and self.lr_schedule == "constant",
            "decay_steps contradicts --lr_schedule=constant: leave one out"),
            (self.text_encoder_learning_rate and not self.train_text_encoder,
            "text_encoder_learning_rate: the text encoder is frozen (train_text_encoder=False)"),
            (self.text_encoder_stop and not self.trains_text,
            "text_encoder_stop: the text encoder is frozen anyway (train_text_encoder=False)"),
            (self.token_learning_rate and not trains_word,
            "token_learning_rate acts with --train_token only"),
            (self.embedding_path and not trains_word, "embedding_path acts with --train_token only"),
            (self.optim == "prodigy" and self.start_learning_rate < LEAST_FACTOR,
            "prodigy finds the rate: start_learning_rate is a factor of it, give --start_learning_rate=1, "
            f"got {self.start_learning_rate:g}"),
            (self.optim == "prodigy" and (self.text_encoder_learning_rate or self.token_learning_rate),
            "prodigy finds one rate for all: leave text_encoder_learning_rate and token_learning_rate out"),
        ]  # fmt: skip
        for is_wrong, message in wrong:
            if is_wrong:
                raise ConfigError(message)
        if trains_word:
            self._check_token()

    def _check_validation(self) -> None:
        own = [spec.name for spec in dataclasses.fields(self) if spec.name.startswith("validation_")]
        given = [name for name in own if getattr(self, name) != getattr(TrainFields, name)]
        if given and not self.validation_prompt:
            raise ConfigError(f"{given[0]} acts with --validation_prompt only")
        if self.validation_prompt:
            from ldm.prompts import parse_weights  # whose tokenizer takes a while

            for prompt in self.validation_prompt:
                parse_weights(prompt)
        if self.report_to == "tensorboard" and importlib.util.find_spec("tensorboardX") is None:
            raise ConfigError("report_to tensorboard: the package is missing: pip install tensorboardX")

    def _check_token(self) -> None:
        from ldm.tokenizer import token_of  # whose vocabulary takes a while

        try:
            token_of(self.train_token, [concept.instance_prompt or "" for concept in self.subjects])
        except ConfigError as error:
            raise ConfigError(f"train_token: {error}") from None

    def _check_lora(self) -> None:
        if not self.lora_ft_unet:
            raise ConfigError("lora_ft_unet must be True: the UNet is always trained")
        lora = [spec for spec in dataclasses.fields(self) if spec.name.startswith("lora_")]
        given = [spec.name for spec in lora if getattr(self, spec.name) != spec.default]
        if given and not self.use_lora and (given, self.lora_rank) != (["lora_rank"], 4):  # as files of 2023
            raise ConfigError(f"{given[0]} acts with LoRA only: give --use_lora=True, or leave it out")
        lora_target_names(self.lora_targets)
        if self.use_lora and (self.save_format != "mindspore" or self.save_dtype != "float32"):
            raise ConfigError(
                "save_format and save_dtype are of whole models: with LoRA give --lora_format and --lora_fp16"
            )

    def graph_facts(self) -> dict:
        """The options that may shape a compiled graph."""
        return self._where("shapes_graph")

    def training_facts(self) -> dict:
        """The options that a training's result follows from, as JSON types; files are compared by content
        elsewhere.

        How the samples of an update are cut into batches is left out: it changes roundings only.
        """
        facts = self._where("changes_result") | {"betas": list(self.betas)}
        facts |= {"concepts": [concept.facts() for concept in self.subjects] if self.concepts else None}
        left_out = set(SUBJECT_KEYS) if self.concepts else set()
        if not self.use_lora:
            left_out |= {name for name in facts if name.startswith("lora_")}
        return {name: value for name, value in facts.items() if name not in left_out}

    @classmethod
    def facts_of_before(cls) -> dict:
        """Of `training_facts` those that states of older versions do not know, as they were made."""
        later = [spec for spec in dataclasses.fields(cls) if came_later(spec)]
        return {spec.name: spec.default for spec in later if spec.metadata["changes_result"]}

    def _where(self, what: str) -> dict:
        return {
            spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self) if spec.metadata[what]
        }

    @cached_property
    def subjects(self) -> tuple[Concept, ...]:
        """What is learned: those of the file of concepts, or the one of the options."""
        if not self.concepts:
            return (Concept(**{name: getattr(self, name) for name in SUBJECT_KEYS}),)
        concepts = read_concepts(Path(self.concepts), self.num_class_images, self.train_data_repeats)
        if not is_dry_run():
            return concepts
        folder = Path(self.output_path) / "class_images"
        return tuple(
            dataclasses.replace(concept, class_data_dir=str(folder / Path(concept.class_data_dir or "").name))
            for concept in concepts
        )

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder is part of the trained graph: all of it, or the embedding of a word."""
        return self.train_text_encoder or self.train_token is not None

    def until(self, total_updates: int) -> "TrainOptions":
        """With the length of the decay filled in where it was left to the length of the run."""
        if self.lr_schedule in (None, "constant") or self.decay_steps:
            return self
        return dataclasses.replace(self, decay_steps=max(1, total_updates - self.warmup_steps))

    @property
    def caches_graphs(self) -> bool:
        return self.compile_cache and self.mode == 0

    @property
    def samples_per_update(self) -> int:
        """Instance samples of one process."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def checkpoint(self) -> Path:
        """The base checkpoint.

        `pretrained_model_path` names the file itself in commands from September 2023 on.
        """
        path = Path(self.pretrained_model_path)
        is_it = path.is_file() or (path / "model_index.json").is_file() or (path / "unet").is_dir()
        if is_it and not self.pretrained_model_file:
            return path
        return path if path.is_file() else path / (self.pretrained_model_file or official_file(self.version))
