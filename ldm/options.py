"""The options of train_dreambooth.py. Must not import mindspore."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ldm.config import PRECISIONS, ModelConfig
from ldm.device import is_dry_run
from ldm.fields import (
    DETERMINISTIC_HELP,
    DEVICES,
    FLASH_ATTENTION_HELP,
    FORCE_PRECISION_HELP,
    LOG_LEVELS,
    LORA_FORMATS,
    PRECISION_HELP,
    SAMPLER_NAMES,
    SAVE_DTYPES,
    SAVE_FORMATS,
    TIMESTEPS,
    VERSION_HELP,
    beside_program,
    check_folders,
    check_version,
    lora_target_names,
    option,
    require_weights,
    run_option,
    value_option,
)
from ldm.other_names import TRAINING
from ldm.values import ConfigError
from ldm.versions import VERSIONS, official_file, version_from_environment


@dataclass(frozen=True)
class TrainOptions:
    """Fine-tune Stable Diffusion on a few images of one subject (DreamBooth, arXiv 2208.12242)."""

    EXAMPLE: ClassVar[str] = (
        'python train_dreambooth.py --instance_data_dir=my_dog --instance_prompt="a photo of sks dog" \\\n'
        '      --class_data_dir=dogs --class_prompt="a photo of a dog" --output_path=output/my_dog'
    )

    OTHER_NAMES: ClassVar[dict[str, str]] = TRAINING

    instance_data_dir: str | None = run_option(
        None, "data", "folder with 3-5 images of the subject (read only) [required]"
    )
    instance_prompt: str | None = value_option(
        None, "data", 'what they show, with a rare word: "a photo of sks dog" [required]'
    )
    class_data_dir: str | None = run_option(
        None, "data",
        "folder of class images; missing ones are generated into it [required with prior preservation]",
    )  # fmt: skip
    class_prompt: str | None = value_option(
        None, "data", 'the same without the rare word: "a photo of a dog" [required with prior preservation]'
    )
    with_prior_preservation: bool = option(
        True, "data", "train on class images too, so that the class is not forgotten"
    )
    num_class_images: int = value_option(
        200, "data", "number of class images; those already there count", least=1
    )
    train_data_repeats: int = value_option(
        40, "data", "how often each instance image is used per epoch", least=1
    )
    image_size: int | None = option(
        None, "data", "side of the training images, in pixels [the model's: 512, or 768]", least=8
    )
    random_crop: bool = option(False, "data", "crop at random instead of at the centre")
    random_flip: bool | None = value_option(
        None, "data",
        "flip half of the images left to right; False for a subject with lettering [as random_crop]",
    )  # fmt: skip

    train_config: str = run_option(
        "configs/train_dreambooth_sd_v2.json", "model", "JSON or YAML with any of these options"
    )
    model_config: str = run_option(
        "auto", "model", "YAML of the networks and the noise schedule; auto: the one that fits the checkpoint"
    )
    version: str | None = run_option(
        None, "model", VERSION_HELP, aliases=("-v",), choices=tuple(VERSIONS), metavar="VERSION"
    )
    pretrained_model_path: str = run_option(
        "models/", "model", "folder of the base checkpoint; or a file or a diffusers folder that is it"
    )
    pretrained_model_file: str | None = run_option(
        None, "model", "its name in that folder [the version's published file]", metavar="NAME"
    )
    variant: str | None = run_option(
        None, "model", "of the files in a diffusers folder: fp16, bf16, non_ema [the plain ones]"
    )
    use_ema_weights: bool = run_option(
        False, "model", "begin with the averaged weights that lie in the checkpoint beside the others"
    )
    output_path: str = run_option(
        "output", "model", "folder for checkpoints, log and effective configuration"
    )

    train_text_encoder: bool = option(
        True, "training", "train the text encoder too (otherwise it is frozen)",
        aliases=("--lora_ft_text_encoder",),
    )  # fmt: skip
    cache_latents: bool = option(
        True, "training", "encode the images once, before training; then the VAE leaves memory",
        changes_result=False,
    )  # fmt: skip
    train_batch_size: int = option(
        2, "training", "instance images per step (plus the same number of class images)", least=1,
        changes_result=False,
    )  # fmt: skip
    gradient_accumulation_steps: int = option(
        1, "training", "steps whose gradients are averaged for one update", least=1, changes_result=False
    )
    epochs: int = run_option(8, "training", "passes over the repeated instance images", least=1)
    prior_loss_weight: float = option(
        1.0, "training", "weight of the class term (lambda in the paper)", least=0
    )
    optim: str = option("adamw", "training", "optimizer", choices=("adamw", "adam"))
    betas: tuple[float, float] = option(
        (0.9, 0.999), "training", "decay rates of the optimizer's moments", least=0, below=1
    )
    weight_decay: float = option(1e-2, "training", "weight decay (never on norms and biases)", least=0)
    start_learning_rate: float = value_option(
        5e-6, "training", "learning rate; constant, or with the next three options", above=0
    )
    end_learning_rate: float | None = value_option(
        None, "training", "rate at the end of the decay [0 if decay_steps > 0]", least=0
    )
    warmup_steps: int = value_option(0, "training", "updates of linear warm-up from 0", least=0)
    decay_steps: int = value_option(
        0, "training", "updates of cosine decay after the warm-up; 0: no decay", least=0
    )
    clip_grad: bool = option(False, "training", "clip gradients by their global norm")
    max_grad_norm: float = option(1.0, "training", "the norm to clip to", above=0)
    init_loss_scale: float = option(512, "training", "float16: first loss scale", least=1)
    loss_scale_factor: float = option(2, "training", "float16: factor by which the loss scale moves", above=1)
    scale_window: int = option(
        200, "training", "float16: updates without overflow before the scale grows", least=1
    )
    recompute: bool | None = option(
        None, "training",
        "gradient checkpointing: compute feed-forward layers twice to use less memory [on a CPU where memory "
        "is low, and with LoRA on a full-size model]",
        changes_result=False,
    )  # fmt: skip
    use_ema: bool = option(
        False, "training", "average the weights (decay 0.9999, warmed up); saved in a file of their own"
    )

    use_lora: bool = option(
        False, "LoRA", "train low-rank additions to the weights, and save them alone: a small file"
    )
    lora_rank: int | None = option(
        None, "LoRA", "rank of the additions [4, or as in --lora_ckpt_path]", least=1
    )
    lora_alpha: float | None = option(
        None, "LoRA", "additions are multiplied by this, over their rank [the rank]", above=0
    )
    lora_targets: str = option(
        "attention", "LoRA",
        "layers that get one: attention, and +feed_forward, +projections, +convolutions [attention]",
        metavar="NAME+NAME",
    )  # fmt: skip
    lora_dropout: float = option(
        0.0, "LoRA", "share of a layer's input that its addition does not see in training", least=0, below=1
    )
    lora_fp16: bool = run_option(True, "LoRA", "numbers in the saved file: float16, or float32 (False)")
    lora_format: str = run_option(
        "kohya", "LoRA", "names in it; kohya is what all programs read", choices=LORA_FORMATS
    )
    lora_ckpt_path: str | None = run_option(None, "LoRA", "a LoRA to go on from, of any program [no]")
    lora_ft_unet: bool = run_option(True, "LoRA", "")  # in files of September 2023

    accept_class_images: bool = run_option(
        False, "class images",
        "take class_data_dir as it is: with images drawn for another prompt or model, and beside sub-folders",
    )  # fmt: skip
    class_sampler: str = value_option(
        "ddim", "class images", "how to generate them; dpm_solver_pp needs 20 steps only",
        choices=SAMPLER_NAMES,
    )  # fmt: skip
    sampling_steps: int = value_option(50, "class images", "denoising steps", least=1, most=TIMESTEPS)
    sample_batch_size: int = run_option(4, "class images", "images at a time", least=1)
    guidance_scale: float = value_option(
        9.0, "class images", "classifier-free guidance scale", aliases=("--scale",), least=0
    )

    ckpt_save_interval: int = run_option(1, "run", "epochs between checkpoints", least=1)
    keep_weights: int = run_option(10, "run", "how many checkpoints to keep, the newest ones", least=1)
    save_weights_every: int | None = run_option(
        None, "run", "also write weights to generate with every N updates, and when stopped [no]", least=1
    )
    save_format: str = run_option(
        "mindspore", "run", "of the checkpoints; stability: a file, diffusers: a folder, for other programs",
        choices=SAVE_FORMATS,
    )  # fmt: skip
    save_dtype: str = run_option("float32", "run", "of the numbers in them", choices=SAVE_DTYPES)
    save_state_minutes: float | None = run_option(
        15.0, "run",
        "save a resumable state at a checkpoint when the last one is this many minutes old; 0: at every one, "
        "None: only when stopped", least=0,
    )  # fmt: skip
    save_every: int | None = run_option(
        None, "run", "also save a resumable state every N updates [no]", least=1
    )
    keep_states: int = run_option(
        1, "run", "how many resumable states to keep, the newest ones", aliases=("--keep_checkpoints",),
        least=1,
    )  # fmt: skip
    resume: str | None = run_option(
        None, "run", 'continue from "latest", or from a folder states/step_* [no]', metavar="latest|PATH"
    )
    allow_changed_options: bool = run_option(
        False, "run", "resume even if options, images or base model have changed"
    )
    callback_size: int = run_option(1, "run", "updates between log lines", least=1)
    seed: int = value_option(3407, "run", "all random numbers follow from it", least=0)
    log_level: str = run_option("INFO", "run", "how much to log", choices=LOG_LEVELS)
    device: str = option(
        "auto", "run", "where to run; auto: Ascend if there is one, else CPU", choices=DEVICES,
        changes_result=False,
    )  # fmt: skip
    precision: str = option("auto", "run", PRECISION_HELP, choices=PRECISIONS, changes_result=False)
    force_precision: bool = run_option(False, "run", FORCE_PRECISION_HELP)
    flash_attention: str = option(
        "auto", "run", FLASH_ATTENTION_HELP, choices=("auto", "off"), changes_result=False
    )
    deterministic: bool | None = run_option(None, "run", DETERMINISTIC_HELP)
    mode: int = option(
        0, "run", "0 graph mode, 1 PyNative (for debugging)", aliases=("--ms_mode",), choices=(0, 1),
        changes_result=False,
    )  # fmt: skip
    compile_cache: bool = option(True, "run", "keep compiled graphs for the next start", changes_result=False)
    use_parallel: bool = option(
        False, "run", "data parallel over the processes that mpirun or msrun started", changes_result=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.version or version_from_environment())
        if self.random_flip is None:
            object.__setattr__(self, "random_flip", self.random_crop)

    def kept_apart(self) -> "TrainOptions":
        """In a dry run with folders of its own: what it writes must not be taken for the results of a run."""
        if not is_dry_run():
            return self
        output = Path(self.output_path) / "dry_run"
        return dataclasses.replace(self, output_path=str(output), class_data_dir=str(output / "class_images"))

    def for_model(self, config: ModelConfig) -> "TrainOptions":
        """With what was left to the model filled in. Raises ConfigError for images that it cannot make."""
        size = self.image_size or config.image_size
        config.check_size(image_size=size)
        config.check_steps(self.sampling_steps)
        return dataclasses.replace(self, image_size=size)

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot work and for files that are not there."""
        self._check_lora()
        required = ["instance_data_dir", "instance_prompt"]
        required += ["class_data_dir", "class_prompt"] if self.with_prior_preservation else []
        for name in required:
            if not (getattr(self, name) or "").strip():
                more = " with prior preservation (or give --with_prior_preservation=False)"
                why = more if name.startswith("class") else ""
                raise ConfigError(f"--{name} is missing: it is required{why}")
        classes = self.class_data_dir if self.with_prior_preservation else None
        check_folders(self.instance_data_dir, classes, self.output_path)
        if self.resume not in (None, "latest") and not Path(self.resume).is_dir():
            raise ConfigError(f"resume must be latest, or a folder states/step_* of a run, got {self.resume}")
        if self.end_learning_rate is not None and not self.decay_steps:
            raise ConfigError("end_learning_rate is set but decay_steps is 0: give --decay_steps too")
        check_version(self.version)
        tiny = f" (or try the embedded model: bash {beside_program('scripts/demo.sh')})"
        is_default = (self.pretrained_model_path, self.pretrained_model_file) == ("models/", None)
        hint = "see models/README.md for where to get it"
        require_weights(self.checkpoint, hint + tiny if is_default else hint)

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
        return {key: value for key, value in facts.items() if self.use_lora or not key.startswith("lora_")}

    def _where(self, what: str) -> dict:
        return {
            spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self) if spec.metadata[what]
        }

    @property
    def prompts(self) -> list[str]:
        """Of the instance samples, and of the class samples where there are any."""
        return [self.instance_prompt] + ([self.class_prompt] if self.with_prior_preservation else [])

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
