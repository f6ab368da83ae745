"""The options of the two commands: the one place for argparse.

A dataclass field is the flag, the key of a configuration file, the type, the default and the help, at once.
Values come in the order default < file < flag; an unknown key, a wrong type or an impossible combination ends the
command with one line and exit status 2, before any network is built. Must not import mindspore.
"""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.config import ConfigError, convert, nearest, read_mapping, require_file

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
SAMPLER_NAMES = ("plms", "ddim", "dpm_solver", "dpm_solver_pp", "uni_pc")
DEVICES = ("auto", "Ascend", "CPU")
# Options of which neither a graph nor a result depends.
AROUND_THE_RUN = {
    "log_level", "callback_size", "ckpt_save_interval", "keep_weights", "save_every", "save_state_minutes", "keep_checkpoints", "resume",
    "allow_changed_options", "version",
}  # fmt: skip


def option(default, group: str, text: str, *, aliases: Sequence[str] = (), choices: Sequence = (), least=None, above=None, below=None):
    """A field with what its flag needs: group and text for --help, further spellings, choices, bounds."""
    limits = dict(least=least, above=above, below=below)
    return field(default=default, metadata=dict(group=group, text=text, aliases=aliases, choices=choices, **limits))


@dataclass(frozen=True)
class TrainOptions:
    """Fine-tune Stable Diffusion 2 on a few pictures of one subject (DreamBooth, arXiv 2208.12242)."""

    instance_data_dir: str | None = option(None, "data", "folder with 3-5 pictures of the subject (never written to)")
    instance_prompt: str | None = option(None, "data", 'what they show, with a rare word: "a photo of sks dog"')
    class_data_dir: str | None = option(None, "data", "folder of class pictures; the missing ones are sampled into it")
    class_prompt: str | None = option(None, "data", 'the same without the rare word: "a photo of a dog"')
    with_prior_preservation: bool = option(True, "data", "add the class term, so that the class is not forgotten")
    num_class_images: int = option(200, "data", "class pictures wanted; valid ones already there count", least=1)
    train_data_repeats: int = option(40, "data", "draws of each instance picture an epoch", least=1)
    image_size: int = option(512, "data", "side of the training pictures, in pixels", least=8)
    random_crop: bool = option(False, "data", "crop at random instead of at the centre")
    random_flip: bool | None = option(
        None, "data", "flip half of the pictures left to right; False for a subject with lettering [as random_crop]"
    )

    train_config: str = option("configs/train_dreambooth_sd_v2.json", "model", "JSON or YAML with any of these options")
    model_config: str = option("configs/train_dreambooth_sd_v2.yaml", "model", "YAML of the networks and the noise schedule")
    version: str = option("2.0", "model", "Stable Diffusion version; others come later", aliases=("-v",), choices=("2.0",))
    pretrained_model_path: str = option("models/", "model", "folder of the base checkpoint, or the file itself")
    pretrained_model_file: str = option("sd_v2_base-57526ee4.ckpt", "model", "its name in that folder, .ckpt or .safetensors")
    output_path: str = option("output", "model", "folder for checkpoints, log and effective configuration")

    train_text_encoder: bool = option(True, "training", "train the text encoder too (else it is frozen)")
    cache_latents: bool = option(True, "training", "encode the pictures once, before training; then the VAE leaves memory")
    train_batch_size: int = option(2, "training", "instance pictures a step; as many class pictures come on top", least=1)
    gradient_accumulation_steps: int = option(1, "training", "steps whose gradients are averaged for one update", least=1)
    epochs: int = option(8, "training", "passes over the repeated instance pictures", least=1)
    prior_loss_weight: float = option(1.0, "training", "weight of the class term (lambda in the paper)", least=0)
    optim: str = option("adamw", "training", "optimizer", choices=("adamw", "adam"))
    betas: tuple[float, float] = option((0.9, 0.999), "training", "decay rates of the optimizer's moments", least=0, below=1)
    weight_decay: float = option(1e-2, "training", "weight decay (never on norms and biases)", least=0)
    start_learning_rate: float = option(5e-6, "training", "learning rate, constant unless the next three say otherwise", above=0)
    end_learning_rate: float | None = option(None, "training", "rate at the end of the decay [0 if decay_steps > 0]", least=0)
    warmup_steps: int = option(0, "training", "updates of linear warm-up from 0", least=0)
    decay_steps: int = option(0, "training", "updates of cosine decay after the warm-up; 0: constant", least=0)
    clip_grad: bool = option(False, "training", "clip the gradients by their global norm")
    max_grad_norm: float = option(1.0, "training", "the norm to clip to", above=0)
    init_loss_scale: float = option(512.0, "training", "first loss scale (float16 compute only)", least=1)
    loss_scale_factor: float = option(2.0, "training", "factor the loss scale grows and shrinks by", above=1)
    scale_window: int = option(200, "training", "updates without overflow before the loss scale grows", least=1)
    recompute: bool | None = option(None, "training", "feed-forward layers in less memory, twice computed [where memory is short]")
    use_ema: bool = option(False, "training", "average the weights (decay 0.9999, warmed up); saved beside the weights")

    class_sampler: str = option("ddim", "class pictures", "how to sample; dpm_solver_pp needs 20 steps only", choices=SAMPLER_NAMES)
    sampling_steps: int = option(50, "class pictures", "denoising steps", least=1)
    sample_batch_size: int = option(4, "class pictures", "pictures at a time", least=1)
    guidance_scale: float = option(9.0, "class pictures", "classifier-free guidance scale", aliases=("--scale",), least=0)

    ckpt_save_interval: int = option(1, "run", "epochs between checkpoints", least=1)
    keep_weights: int = option(10, "run", "checkpoints kept, the newest ones", least=1)
    save_state_minutes: float | None = option(
        15.0, "run", "save a state (to continue from) at a checkpoint when so many minutes have passed since the last one; "
        "0: at every checkpoint, None: only at a stop", least=0,
    )  # fmt: skip
    save_every: int | None = option(None, "run", "updates between saved states, besides those [none]", least=1)
    keep_checkpoints: int = option(1, "run", "saved states kept, the newest ones", least=1)
    resume: str | None = option(None, "run", '"latest", or a folder states/step_*: go on from there')
    allow_changed_options: bool = option(False, "run", "resume though options, pictures or base model have changed")
    callback_size: int = option(1, "run", "updates between log lines", least=1)
    seed: int = option(3407, "run", "all random numbers follow from it", least=0)
    log_level: str = option("INFO", "run", "how much to log", choices=LOG_LEVELS)
    device: str = option("auto", "run", "where to run; auto: Ascend where there is one, else CPU", choices=DEVICES)
    mode: int = option(0, "run", "0 graph mode, 1 PyNative (for debugging)", aliases=("--ms_mode",), choices=(0, 1))
    compile_cache: bool = option(True, "run", "keep compiled graphs for the next start")
    use_parallel: bool = option(False, "run", "data parallel over the processes that mpirun or msrun started")
    use_lora: bool = option(False, "run", "LoRA: not available yet")
    lora_rank: int = option(4, "run", "LoRA rank: not available yet", least=1)
    lora_fp16: bool = option(True, "run", "LoRA in float16: not available yet")

    def __post_init__(self) -> None:
        if self.random_flip is None:
            object.__setattr__(self, "random_flip", self.random_crop)

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot work and for files that are not there."""
        _refuse_lora(self)
        if not self.lora_fp16:
            raise ConfigError("lora_fp16=False: this version has no LoRA yet; leave the option out")
        needed = ["instance_data_dir", "instance_prompt"]
        needed += ["class_data_dir", "class_prompt"] if self.with_prior_preservation else []
        for name in needed:
            if not getattr(self, name):
                why = " with prior preservation (or give --with_prior_preservation=False)" if name.startswith("class") else ""
                raise ConfigError(f"--{name} is missing: it is required{why}")
        if not Path(self.instance_data_dir).is_dir():
            raise ConfigError(f"instance_data_dir {self.instance_data_dir}: no such folder")
        if self.with_prior_preservation:
            instance, classes = Path(self.instance_data_dir).resolve(), Path(self.class_data_dir).resolve()
            if classes == instance or instance in classes.parents:
                raise ConfigError(f"class_data_dir {self.class_data_dir} lies in instance_data_dir: give a folder of its own")
            if Path(self.class_data_dir).exists() and not Path(self.class_data_dir).is_dir():
                raise ConfigError(f"class_data_dir {self.class_data_dir}: is a file, a folder is wanted")
        if self.end_learning_rate is not None and not self.decay_steps:
            raise ConfigError("end_learning_rate is set but decay_steps is 0: give --decay_steps too")
        require_file(self.checkpoint, "pretrained checkpoint", "see models/README.md for where to get it")

    def graph_facts(self) -> dict:
        """The options that may shape a compiled graph: all but those that surely do not."""
        outside = {"start_learning_rate", "end_learning_rate", "warmup_steps", "decay_steps", "epochs", "train_data_repeats"}
        outside |= {"seed", "num_class_images", "sampling_steps", "class_sampler", "random_flip"} | AROUND_THE_RUN
        return self._without(outside, ("_dir", "_path", "_file", "_prompt", "_config"))

    def training_facts(self) -> dict:
        """The options that a training's result follows from, in JSON's types, but for the files they name.

        How the samples of an update are cut into batches is left out: it changes roundings only.
        """
        outside = {"epochs", "sample_batch_size", "train_batch_size", "gradient_accumulation_steps", "recompute", "cache_latents"}
        outside |= {"mode", "device", "compile_cache", "use_parallel"} | AROUND_THE_RUN
        facts = self._without(outside, ("_dir", "_path", "_file", "_config"))
        return facts | {"betas": list(self.betas)}

    def _without(self, names: set[str], endings: tuple[str, ...]) -> dict:
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in names and not name.endswith(endings)}

    @property
    def samples_per_update(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def checkpoint(self) -> Path:
        """The base checkpoint. `pretrained_model_path` names the file itself in commands from September 2023 on."""
        path = Path(self.pretrained_model_path)
        return path if path.is_file() else path / self.pretrained_model_file


@dataclass(frozen=True)
class SampleOptions:
    """Draw pictures from prompts with a Stable Diffusion 2 checkpoint."""

    prompt: str = option("A cute wolf in winter forest", "prompts", "what to draw")
    negative_prompt: str = option("", "prompts", "what to keep away from")
    data_path: str | None = option(
        None, "prompts", "file with a prompt a line, instead of --prompt", aliases=("--from-file", "--from_file")
    )
    negative_data_path: str | None = option(None, "prompts", "file with a negative prompt a line: one, or as many as prompts")

    config: str = option("configs/train_dreambooth_sd_v2.yaml", "model", "YAML of the networks and the noise schedule")
    ckpt_path: str = option("models/sd_v2_base-57526ee4.ckpt", "model", "checkpoint, .ckpt or .safetensors")
    version: str = option("2.0", "model", "Stable Diffusion version; others come later", aliases=("-v",), choices=("2.0",))

    sampler: str = option("plms", "sampling", "how to sample", choices=SAMPLER_NAMES)
    plms: bool = option(False, "sampling", "the same as --sampler plms")
    ddim: bool = option(False, "sampling", "the same as --sampler ddim")
    dpm_solver: bool = option(False, "sampling", "the same as --sampler dpm_solver")
    dpm_solver_pp: bool = option(False, "sampling", "the same as --sampler dpm_solver_pp")
    uni_pc: bool = option(False, "sampling", "the same as --sampler uni_pc")
    sampling_steps: int = option(50, "sampling", "denoising steps", least=1)
    guidance_scale: float = option(9.0, "sampling", "classifier-free guidance scale; 1: none", aliases=("--scale",), least=0)
    ddim_eta: float = option(0.0, "sampling", "noise of DDIM: 0 none, 1 as much as DDPM", least=0)
    n_iter: int = option(2, "sampling", "rounds", least=1)
    n_samples: int = option(8, "sampling", "pictures a prompt and round", least=1)
    H: int | None = option(None, "sampling", "height in pixels [the configuration's]", least=8)
    W: int | None = option(None, "sampling", "width in pixels [the configuration's]", least=8)
    seed: int = option(42, "sampling", "the same seed draws the same pictures, whatever the batch", least=0)
    fixed_code: bool = option(False, "sampling", "start every prompt and round from the same noise")

    output_path: str = option("output", "output", "folder: samples/ is put there, and beside it a grid of them")
    n_rows: int = option(0, "output", "pictures a row of the grid; 0: n_samples", least=0)
    skip_grid: bool = option(False, "output", "no grid")
    skip_save: bool = option(False, "output", "no single pictures")

    log_level: str = option("INFO", "run", "how much to log", choices=LOG_LEVELS)
    device: str = option("auto", "run", "where to run; auto: Ascend where there is one, else CPU", choices=DEVICES)
    mode: int = option(0, "run", "0 graph mode, 1 PyNative (for debugging)", aliases=("--ms_mode",), choices=(0, 1))
    compile_cache: bool = option(True, "run", "keep compiled graphs for the next start")
    use_lora: bool = option(False, "run", "LoRA: not available yet")
    lora_rank: int = option(4, "run", "LoRA rank: not available yet", least=1)
    lora_ckpt_path: str | None = option(None, "run", "LoRA weights: not available yet")

    @property
    def sampler_name(self) -> str:
        return next((name for name in SAMPLER_NAMES if getattr(self, name)), self.sampler)

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot work and for files that are not there."""
        _refuse_lora(self)
        named = {name for name in SAMPLER_NAMES if getattr(self, name)}
        if len(named) > 1 or (named and self.sampler not in ("plms", *named)):
            raise ConfigError(f"one sampler is wanted, several are named: {', '.join(sorted(named | {self.sampler} - {'plms'}))}")
        if self.ddim_eta and self.sampler_name != "ddim":
            raise ConfigError(f"ddim_eta {self.ddim_eta:g} acts with the ddim sampler only, not with {self.sampler_name}: give --ddim")
        if self.skip_grid and self.skip_save:
            raise ConfigError("skip_grid and skip_save together leave nothing to write: leave one out")
        for name in ("data_path", "negative_data_path"):
            if getattr(self, name):
                require_file(Path(getattr(self, name)), name, "it holds a prompt a line")
        require_file(Path(self.ckpt_path), "checkpoint", "give --ckpt_path (see models/README.md)")


def _refuse_lora(options) -> None:
    if options.use_lora or options.lora_rank != 4 or getattr(options, "lora_ckpt_path", None):
        raise ConfigError("LoRA (use_lora, lora_rank, lora_ckpt_path): this version has none yet; leave the options out")


def _check_field(spec: dataclasses.Field, value):
    """Bounds and choices of one option."""
    meta, values = spec.metadata, value if isinstance(value, tuple) else (value,)
    if meta["choices"] and value not in meta["choices"]:
        wanted = ", ".join(map(str, meta["choices"]))
        hint = "" if str(value)[:1].isdigit() else nearest(str(value), list(map(str, meta["choices"])))  # 2.1 is no misspelt 2.0
        raise ConfigError(f"{spec.name}: one of {wanted} wanted, found {value!r}{hint}")
    for item in values:
        if item is None:
            continue
        if meta["least"] is not None and item < meta["least"]:
            raise ConfigError(f"{spec.name}: {meta['least']} or more wanted, found {item}")
        if meta["above"] is not None and item <= meta["above"]:
            raise ConfigError(f"{spec.name}: more than {meta['above']} wanted, found {item}")
        if meta["below"] is not None and item >= meta["below"]:
            raise ConfigError(f"{spec.name}: less than {meta['below']} wanted, found {item}")


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _make_parser(cls) -> argparse.ArgumentParser:
    parser = _Parser(usage="%(prog)s [options]", description=cls.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups = {}
    for spec in dataclasses.fields(cls):
        meta = spec.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        default = "none" if spec.default is None else " ".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
        choices = f" {{{','.join(map(str, meta['choices']))}}}" if meta["choices"] else ""
        text = f"{meta['text']}{choices} [{default}]" if not meta["text"].endswith("]") else meta["text"]
        extra = {"metavar": spec.name.rsplit("_", 1)[-1].upper()}
        if spec.type in (bool, bool | None):
            extra = {"metavar": "BOOL", "nargs": "?", "const": "True"}
        elif isinstance(spec.default, tuple):
            extra = {"metavar": "VALUE", "nargs": "+"}
        groups[meta["group"]].add_argument(f"--{spec.name}", *meta["aliases"], dest=spec.name, help=text.replace("%", "%%"), **extra)
    return parser


def _collect(cls, given: dict, source: str) -> dict:
    """`given` converted to the types of `cls`; a key that `cls` lacks is an error."""
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}
    names = {name: name for name in specs}
    names |= {alias.lstrip("-"): spec.name for spec in specs.values() for alias in spec.metadata["aliases"] if alias.startswith("--")}
    result = {}
    for key, value in given.items():
        name = names.get(key)
        if name is None:
            raise ConfigError(f"{source}: unknown option {key}{nearest(str(key), list(names))}")
        if name == "log_level" and isinstance(value, str):
            value = value.removeprefix("logging.").upper()
        result[name] = convert(value, specs[name].type, f"{source}: {name}")
        _check_field(specs[name], result[name])
    return result


def parse_options(cls, argv: Sequence[str] | None = None):
    """Options of type `cls` from the command line and, where it has `train_config`, from that file.

    Ends the process with one line and status 2 where something is wrong.
    """
    parser = _make_parser(cls)
    known, unknown = parser.parse_known_args(argv)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}")
    try:
        given = _collect(cls, vars(known), "command line")
        if "train_config" in cls.__dataclass_fields__:
            path = given.get("train_config", cls.train_config)
            given = _collect(cls, read_mapping(path), str(path)) | given
        options = cls(**given)
        options.check()
    except ConfigError as error:
        parser.error(str(error))
    return options
