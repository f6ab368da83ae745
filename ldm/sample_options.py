"""The options of text_to_image.py. Must not import mindspore."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from ldm.config import PRECISIONS
from ldm.device import is_dry_run
from ldm.fields import (
    DETERMINISTIC_HELP,
    DEVICES,
    FLASH_ATTENTION_HELP,
    FORCE_PRECISION_HELP,
    IMAGE_FORMATS,
    LOG_LEVELS,
    PRECISION_HELP,
    SAMPLER_NAMES,
    TIMESTEPS,
    VERSION_HELP,
    beside_program,
    check_version,
    option,
    require_weights,
)
from ldm.other_names import DRAWING
from ldm.values import ConfigError, require_file
from ldm.versions import VERSIONS, official_file, version_from_environment


@dataclass(frozen=True)
class SampleOptions:
    """Generate images from prompts with a Stable Diffusion checkpoint, 1.4 to 2.1, of any format."""

    EXAMPLE: ClassVar[str] = (
        'python text_to_image.py --prompt="a sks dog on the hill" '
        "--ckpt_path=output/my_dog/dreambooth_epoch_8.ckpt"
    )

    OTHER_NAMES: ClassVar[dict[str, str]] = DRAWING

    prompt: str = option("A cute wolf in winter forest", "prompts", "what the images show")
    negative_prompt: str = option("", "prompts", "what they should not show", aliases=("--negative",))
    data_path: str | None = option(
        None,
        "prompts",
        "file with one prompt per line, instead of --prompt; options may stand behind it, as in a dog "
        "--seed 5 --steps 20 [no]",
        aliases=("--from-file", "--from_file"),
    )
    negative_data_path: str | None = option(
        None, "prompts", "file with one negative prompt per line: one, or as many as prompts [no]"
    )
    prompt_weights: str = option(
        "on",
        "prompts",
        "on: (word:1.3) counts more and [word] less, BREAK begins a new part; off: brackets are text",
        choices=("on", "off"),
    )
    support_long_prompts: bool = option(
        True, "prompts", "read prompts of more than 75 tokens in several parts; False: cut them"
    )

    config: str = option(
        "auto",
        "model",
        "YAML of the networks and the noise schedule; auto: the one that fits the checkpoint",
        aliases=("--model_config",),
    )
    ckpt_path: str | None = option(
        None, "model", "weights: a file of any format, or a diffusers folder [models/, the version's file]"
    )
    version: str | None = option(
        None, "model", VERSION_HELP, aliases=("-v",), choices=tuple(VERSIONS), metavar="VERSION"
    )
    variant: str | None = option(
        None, "model", "of the files in a diffusers folder: fp16, bf16, non_ema [the plain ones]"
    )
    use_ema_weights: bool = option(
        False, "model", "the averaged weights that lie in the checkpoint beside the others"
    )

    zero_terminal_snr: bool = option(
        False, "model", "the model was trained with it, and does not say so: a single file in another folder"
    )

    lora_ckpt_path: tuple[str, ...] | None = option(
        None,
        "model",
        "LoRA files, of this or another program, each with a weight: FILE or FILE:0.7 [no]",
        metavar="FILE[:WEIGHT]",
    )
    use_lora: bool | None = option(None, "model", "False: leave them out [if there are any]")
    lora_rank: int | None = option(None, "model", "the rank that they must have [any]", least=1)

    embedding_path: tuple[str, ...] | None = option(
        None,
        "model",
        "files of word embeddings, as a training with --train_token writes: in place of the words' own [no]",
        metavar="FILE",
    )

    init_image: str | None = option(
        None, "sampling", "an image to begin with, instead of pure noise [no]", metavar="PATH"
    )
    strength: float = option(
        0.75,
        "sampling",
        "of --init_image, how much is drawn anew: the share of the steps that are done",
        above=0,
        most=1,
    )
    sampler: str = option(
        "plms", "sampling", "how to sample", aliases=("--sampler_name",), choices=SAMPLER_NAMES
    )
    plms: bool = option(False, "sampling", "the same as --sampler plms")
    ddim: bool = option(False, "sampling", "the same as --sampler ddim")
    dpm_solver: bool = option(False, "sampling", "the same as --sampler dpm_solver")
    dpm_solver_pp: bool = option(False, "sampling", "the same as --sampler dpm_solver_pp")
    uni_pc: bool = option(False, "sampling", "the same as --sampler uni_pc")
    sampling_steps: int = option(
        50, "sampling", "denoising steps", aliases=("--steps",), least=1, most=TIMESTEPS
    )
    timestep_spacing: str = option(
        "auto",
        "sampling",
        "auto: over the whole schedule; trailing: from its very end, for a model of --zero_terminal_snr; "
        "leading: as in 2023, which with 350 steps begins at 699 of 1,000",
        choices=("auto", "trailing", "leading"),
    )
    guidance_scale: float = option(
        9.0,
        "sampling",
        "classifier-free guidance scale; 1: none",
        aliases=("--scale", "--cfg_scale"),
        least=0,
    )
    guidance_rescale: float = option(
        0.0,
        "sampling",
        "against colours that guidance burns, by this share; 0.7 with --zero_terminal_snr, at guidance 7.5",
        least=0,
        most=1,
    )
    ddim_eta: float = option(0.0, "sampling", "noise of DDIM: 0 none, 1 as much as DDPM", least=0)
    n_iter: int = option(2, "sampling", "rounds", least=1)
    n_samples: int = option(8, "sampling", "images per prompt and round", least=1)
    batch_size: int | None = option(None, "sampling", "images at a time [n_samples]", least=1)
    H: int | None = option(
        None, "sampling", "height in pixels [the configuration's]", aliases=("--height",), least=8
    )
    W: int | None = option(
        None, "sampling", "width in pixels [the configuration's]", aliases=("--width",), least=8
    )
    seed: int = option(42, "sampling", "the same seed gives the same images, whatever the batch", least=0)
    image_number: int = option(
        0, "sampling", "of the first image: each has noise of its own, by the seed and its number", least=0
    )
    fixed_code: bool = option(False, "sampling", "start every prompt and round from the same noise")

    output_path: str = option(
        "output", "output", "folder: images go to samples/ in it, a grid of them beside it"
    )
    output_format: str = option("png", "output", "of the images", choices=IMAGE_FORMATS)
    no_metadata: bool = option(
        False, "output", "leave out of the images what they were drawn with (scripts/read_recipe.py)"
    )
    n_rows: int = option(0, "output", "images per row of the grid; 0: n_samples", least=0)
    skip_grid: bool = option(False, "output", "no grid")
    skip_save: bool = option(False, "output", "no single images")

    log_level: str = option("INFO", "run", "how much to log", choices=LOG_LEVELS)
    device: str = option(
        "auto", "run", "where to run; auto: Ascend if there is one, else CPU", choices=DEVICES
    )
    precision: str = option("auto", "run", PRECISION_HELP, choices=PRECISIONS)
    force_precision: bool = option(False, "run", FORCE_PRECISION_HELP)
    flash_attention: str = option("auto", "run", FLASH_ATTENTION_HELP, choices=("auto", "off"))
    deterministic: bool | None = option(None, "run", DETERMINISTIC_HELP)
    mode: int = option(
        0, "run", "0 graph mode, 1 PyNative (for debugging)", aliases=("--ms_mode",), choices=(0, 1)
    )
    compile_cache: bool = option(True, "run", "keep compiled graphs for the next start")

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.version or version_from_environment())

    def kept_apart(self) -> "SampleOptions":
        """In a dry run with a folder of its own, for what it draws is nothing; the grid lies beside that."""
        output = Path(self.output_path)
        return replace(self, output_path=str(output / "dry_run" / output.name)) if is_dry_run() else self

    @property
    def loras(self) -> tuple[str, ...]:
        """The LoRA files to add, each perhaps with a weight."""
        return () if self.use_lora is False else self.lora_ckpt_path or ()

    @property
    def embeddings(self) -> list[Path]:
        return [Path(path) for path in self.embedding_path or ()]

    @property
    def images_at_a_time(self) -> int:
        return self.batch_size or self.n_samples

    @property
    def model_config(self) -> str:
        return self.config

    @property
    def checkpoint(self) -> Path:
        return Path(self.ckpt_path or f"models/{official_file(self.version)}")

    def _check_lora(self) -> None:
        if self.lora_ckpt_path is None:
            given = [name for name in ("use_lora", "lora_rank") if getattr(self, name)]
            if given:
                raise ConfigError(f"{given[0]}: give the LoRA with --lora_ckpt_path=FILE")

    @property
    def caches_graphs(self) -> bool:
        return self.compile_cache and self.mode == 0

    @property
    def sampler_name(self) -> str:
        return next(iter(self._flagged_samplers()), self.sampler)

    def _flagged_samplers(self) -> list[str]:
        """Those whose own flag is given; samplers since 2023 have none."""
        return [name for name in SAMPLER_NAMES if getattr(self, name, False)]

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot work and for files that are not there."""
        self._check_lora()
        named = set(self._flagged_samplers())
        if len(named) > 1 or (named and self.sampler not in ("plms", *named)):
            several = ", ".join(sorted(named | {self.sampler} - {"plms"}))
            raise ConfigError(f"give one sampler only, got several: {several}")
        if self.ddim_eta and self.sampler_name != "ddim":
            raise ConfigError(
                f"ddim_eta {self.ddim_eta:g} acts with the ddim sampler only, not with {self.sampler_name}: "
                f"give --ddim"
            )
        if self.guidance_rescale and self.guidance_scale == 1:
            raise ConfigError("guidance_rescale acts with guidance only: guidance_scale 1 is none")
        if self.init_image:
            require_file(Path(self.init_image), "init_image", "it is an image to begin with")
        elif self.strength != SampleOptions.strength:
            raise ConfigError("strength acts with --init_image only: leave it out")
        if self.init_image and self.sampling_steps * self.strength < 1:
            required = (
                f"{1 / self.sampling_steps:.2g} or more, for one of {self.sampling_steps} sampling_steps"
            )
            raise ConfigError(f"strength must be {required}, got {self.strength:g}")
        if self.skip_grid and self.skip_save:
            raise ConfigError("skip_grid and skip_save together leave nothing to write: leave one out")
        for name in ("data_path", "negative_data_path"):
            if getattr(self, name):
                require_file(Path(getattr(self, name)), name, "it has one prompt per line")
        check_version(self.version)
        hint = "give --ckpt_path (see models/README.md)"
        if not self.ckpt_path:
            program, tiny = map(beside_program, ("text_to_image.py", "models/tiny_sd_v2.safetensors"))
            hint += f"; or try the embedded model: python {program} --ckpt_path={tiny} "
            hint += '--prompt="a red car on the beach" --guidance_scale=3'
        require_weights(self.checkpoint, hint)
