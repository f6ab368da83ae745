"""Flags and configuration files: what is accepted, and the one line that a mistake ends with."""

import ast
import dataclasses
import json
import re

import pytest
from conftest import ROOT, SHALLOW
from given_options import error_of, train

from ldm.command_line import parse_options
from ldm.config import read_mapping, read_model_config
from ldm.fields import SAMPLER_NAMES, lora_target_names
from ldm.options import TrainOptions
from ldm.other_names import DRAWING, NOTHING, TRAINING
from ldm.sample_options import SampleOptions
from ldm.values import ConfigError

REFERENCE_DEFAULTS = dict(
    mode=0, use_parallel=False, train_config="configs/train_dreambooth_sd_v2.json", output_path="output",
    model_config="auto", pretrained_model_path="models/", pretrained_model_file=None,
    with_prior_preservation=True, prior_loss_weight=1.0,
    num_class_images=200, train_data_repeats=40, sampling_steps=50, sample_batch_size=4, guidance_scale=9.0,
    random_crop=False, image_size=None, train_text_encoder=True, train_batch_size=2, epochs=8,
    start_learning_rate=5e-6,
    warmup_steps=0, decay_steps=0, end_learning_rate=None, optim="adamw", betas=(0.9, 0.999),
    weight_decay=1e-2,
    gradient_accumulation_steps=1, version=None, class_sampler="ddim", keep_weights=10, clip_grad=False,
    max_grad_norm=1.0, init_loss_scale=512, loss_scale_factor=2,
    scale_window=200, use_ema=False, use_lora=False, lora_fp16=True, ckpt_save_interval=1,
    callback_size=1,
    seed=3407, log_level="INFO",
)  # fmt: skip


def test_defaults_are_the_documented_ones():
    defaults = TrainOptions()
    assert {name: getattr(defaults, name) for name in REFERENCE_DEFAULTS} == REFERENCE_DEFAULTS
    sample = parse_options(SampleOptions, [f"--ckpt_path={ROOT / 'README.md'}"])
    assert (sample.prompt, sample.sampling_steps, sample.guidance_scale) == (
        "A cute wolf in winter forest",
        50,
        9.0,
    )
    assert (sample.n_iter, sample.n_samples, sample.seed, sample.sampler_name) == (2, 8, 42, "plms")


def test_default_then_file_then_flag(files):
    (files / "train.json").write_text(json.dumps({"epochs": 3, "seed": 5, "betas": [0.8, 0.9], "scale": 7}))
    options = train(files, "--seed=9", config="train.json")
    assert (options.epochs, options.seed, options.betas, options.guidance_scale) == (3, 9, (0.8, 0.9), 7.0)
    assert options.num_class_images == 200


@pytest.mark.parametrize(
    "text, value", [("True", True), ("no", False), ("1", True), ("0", False), ("YES", True), ("false", False)]
)
def test_booleans(files, text, value):
    assert train(files, f"--use_ema={text}").use_ema is value
    assert train(files, "--use_ema").use_ema is True
    assert train(files, f"--recompute={text}").recompute is value


def test_spellings(files):
    assert train(files, "--seed=9007199254740993").seed == 2**53 + 1  # no float has room for it
    assert train(files, "--scale=3").guidance_scale == 3
    assert train(files, "--log_level=logging.WARNING").log_level == "WARNING"
    assert train(files, "--betas", "0.5", "0.6").betas == train(files, "--betas=0.5,0.6").betas == (0.5, 0.6)
    (files / "rate.yaml").write_text("start_learning_rate: 5e-6\n")
    assert train(files, config="rate.yaml").start_learning_rate == 5e-6
    checkpoint = f"--ckpt_path={files / 'base.ckpt'}"
    prompts = files / "train.yaml"
    assert parse_options(SampleOptions, [checkpoint, "--from-file", str(prompts)]).data_path == str(prompts)
    for name in ("plms", "ddim", "dpm_solver", "dpm_solver_pp", "uni_pc"):
        assert parse_options(SampleOptions, [checkpoint, f"--{name}"]).sampler_name == name
        assert parse_options(SampleOptions, [checkpoint, "--sampler", name]).sampler_name == name


MISTAKES = {
    "--epohcs=3": "did you mean --epochs?",
    "--epochs=3.5": "must be a whole number, got '3.5'",
    "--epochs=0": "must be 1 or more, got 0",
    "--use_ema=maybe": "must be True or False",
    "--start_learning_rate=fast": "must be a number, got 'fast'",
    "--train_batch_size=0": "must be 1 or more",
    "--epochs=1e400": "must be a whole number",
    "--seed=-1": "must be 0 or more",
    "--optim=sgd": "must be one of adamw, adam",
    "--log_level=__import__('os')": "must be one of DEBUG, INFO",
    "--lora_rank=8": "lora_rank acts with LoRA only: give --use_lora=True",
    "--lora_targets=attention+convs": "lora_targets",
    "--lora_ft_unet=False": "the UNet is always trained",
    "--instance_prompt=": "--instance_prompt is missing",
    "--instance_prompt=  ": "--instance_prompt is missing",
    "--resume=Latest": "resume must be latest, or a folder states/step_* of a run, got Latest",
    "--start_learning_rate": "a value that begins with a dash is given as --NAME=VALUE",
    "--instance_data_dir=/nowhere": "no such folder",
    "--pretrained_model_file=other.ckpt": "no such file or folder; see models/README.md",
    "--end_learning_rate=1e-7": "give --decay_steps too, or an --lr_schedule",
    "--lr_cycles=3": "lr_cycles acts with --lr_schedule=cosine_with_restarts only",
    "--lr_power=2": "lr_power acts with --lr_schedule=polynomial only",
    "--lr_schedule=exponential": "must be one of constant, linear, cosine",
    "--token_learning_rate=1e-3": "token_learning_rate acts with --train_token only",
    "--train_token=nosuchdog": "train_token: must be a word of one token, 'nosuchdog' has 4",
    "--train_token=ohwx": "train_token: 'ohwx' is in no instance prompt",
    "--caption_dropout=1.5": "must be 1 or less, got 1.5",
    "--text_encoder_stop=0": "must be more than 0",
    "--captions=txt": "must be one of none, text_files, file_names, table",
    "--concepts=/nowhere.json": "no such file",
    "--train_config=/nowhere.json": "no such file",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistaken_flag_ends_with_one_line(files, capsys, flag):
    assert MISTAKES[flag] in error_of(capsys, lambda: train(files, flag))


@pytest.mark.parametrize("flag, wanted", [
    ("--resolution=512", "(here --image_size)"),
    ("--learning_rate=1e-6", "(here --start_learning_rate)"), ("--output_dir=out", "(here --output_path)"),
    ("--mixed_precision=fp16", "(here --precision (float32, float16 or bfloat16))"),
    ("--gradient_checkpointing", "(here --recompute)"),
    ("--pretrained_model_name_or_path=x", "(here --pretrained_model_path"),
    ("--caption_extension=.txt", "(here --captions=text_files"),
    ("--checkpointing_steps=500", "(here --save_every"), ("--resume_from_checkpoint=x", "(here --resume)"),
    ("--num_validation_images=2", "(here --validation_images)"),
    ("--network-dim=4", "(here --lora_rank)"),
])  # fmt: skip
def test_names_of_other_programs_are_known(files, capsys, flag, wanted):
    error = error_of(capsys, lambda: train(files, flag))
    assert f"unknown argument {flag.split('=')[0]} {wanted}" in error


def test_what_other_programs_options_are_called_here_exists():
    for names, cls in ((TRAINING, TrainOptions), (DRAWING, SampleOptions)):
        own = {spec.name for spec in dataclasses.fields(cls)}
        for name, here in names.items():
            assert name not in own, name
            if not here.startswith(NOTHING):
                words = re.split(r" or |, or | and ", re.sub(r" \(.*?\)", "", here))
                assert {re.split(r"[=,( ]", word.removeprefix("--"))[0] for word in words} <= own, name


def test_all_that_is_unknown_is_said_at_once(files, capsys):
    flags = ["--max_train_epochs", "800", "--epohcs=3", "--push_to_hub", "--betas", "0.9", "0.98"]
    assert error_of(capsys, lambda: train(files, *flags)).endswith(
        "unknown arguments --max_train_epochs (here --epochs), --epohcs; did you mean --epochs?, "
        "--push_to_hub (leave it out)\n"
    )
    (files / "bad.json").write_text('{"resolution": 512, "epohcs": 3, "adam_beta1": 0.9}')
    assert error_of(capsys, lambda: train(files, config="bad.json")).endswith(
        "unknown options resolution (here image_size), epohcs; did you mean epochs?, adam_beta1 (here betas "
        "(two values))\n"
    )


def test_text_of_a_terminal_whose_locale_python_does_not_know(files, capsys):
    """As Python gives it under LANG=C without its UTF-8 mode: bytes, each a surrogate."""
    given = "--instance_prompt=a sks café".encode().decode("ascii", "surrogateescape")
    assert train(files, given).instance_prompt == "a sks café"
    given = "--instance_prompt=a sks café".encode("latin-1").decode("ascii", "surrogateescape")
    assert "instance_prompt must be text in UTF-8, got" in error_of(capsys, lambda: train(files, given))


@pytest.mark.parametrize("text, wanted", [
    ("epohcs: 3", "unknown option epohcs; did you mean epochs?"), ("epochs: [1]", "must be a whole number"),
    ("- 1", "must hold `key: value` pairs"), ("epochs: 1\nepochs: 2", "duplicate key epochs"),
    ("scale: 1\nguidance_scale: 2", "guidance_scale is given twice, 1.0 and, as guidance_scale, 2.0: leave"),
    ("a: [", "not readable"), ("seed: !!python/object/apply:os.system ['true']", "not readable"),
    ("seed: ${oc.env:NOWHERE}", "not readable"),
])  # fmt: skip
def test_a_mistaken_file_ends_with_one_line(files, capsys, text, wanted):
    (files / "bad.yaml").write_text(text)
    assert wanted in error_of(capsys, lambda: train(files, config="bad.yaml"))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize("text, wanted", [
    (BOMB, "references (*name) are not read"), ("[" * 3000, "not readable"), ("epochs: " + "9" * 5000,
    "not readable"),
    ("x" * 2**21, "larger than"), ("epochs: \0", "line 1 holds bytes that are no text"),
    ("a: x\nb: ${a}${a}${a}",
    "references (${name}) are not read"),
    ('epochs: 1\nseed: "\\x24{epochs}"', "must be a whole number, got '${epochs}'"),
])  # fmt: skip
def test_files_that_would_take_all_memory_or_time_are_refused(files, capsys, text, wanted):
    """Nested references of 9^9 values; 3,000 brackets; a number of 5,000 digits; 2 MB."""
    (files / "bad.yaml").write_text(text)
    assert wanted in error_of(capsys, lambda: train(files, config="bad.yaml"))


def test_no_class_folder_is_needed_without_prior_preservation(files, capsys):
    assert "class_prompt is missing" in error_of(capsys, lambda: train(files, "--class_prompt="))
    assert train(files, "--class_prompt=", "--with_prior_preservation=False").class_prompt == ""


@pytest.mark.parametrize("flags, wanted", [
    (["--ddim", "--uni_pc"], "give one sampler only"), (["--ddim", "--sampler=uni_pc"],
    "give one sampler only"), (["--plms", "--ddim"], "give one sampler only"),
    (["--ddim_eta=1"], "ddim sampler only"),
    (["-v", "2.2"], "one of 1.4, 1.5, 2.0, 2.0-v, 2.1, 2.1-v, got '2.2'\n"),
    (["--skip_grid", "--skip_save"], "nothing to write"),
    (["--sampling_steps=1500"], "sampling_steps must be 1000 or less, got 1500"),
    (["--outdir=x", "--ddim_steps", "50"], "arguments --outdir (here --output_path), --ddim_steps (here"),
    (["--n_samples=0"], "1 or more"), (["--use_lora"], "give the LoRA with --lora_ckpt_path"),
    (["--lora_rank=8"], "lora_rank: give the LoRA with"), (["stray"], "unknown argument stray"),
])  # fmt: skip
def test_mistaken_sampling_flags(files, capsys, flags, wanted):
    assert wanted in error_of(
        capsys, lambda: parse_options(SampleOptions, [f"--ckpt_path={files / 'base.ckpt'}", *flags])
    )


def test_lora_options(files, capsys):
    given = train(files, "--use_lora", "--lora_targets=+feed_forward", "--lora_ft_text_encoder=False")
    assert lora_target_names(given.lora_targets) == ("attention", "feed_forward")
    assert not given.train_text_encoder
    assert train(files, "--lora_rank=4").lora_rank == 4  # files of 2023 have it without LoRA, too
    for flags, words in (
        (["--lora_targets=attention+convolution"], "did you mean convolutions?"),
        (["--save_format=stability"], "with LoRA give --lora_format"),
        (["--lora_dropout=1"], "must be less than 1"),
        (["--lora_alpha=0"], "must be more than 0"),
    ):
        assert words in error_of(capsys, lambda flags=flags: train(files, "--use_lora", *flags))
    base = f"--ckpt_path={files / 'base.ckpt'}"
    two = ["--lora_ckpt_path", "a b.safetensors", "c,d.safetensors:0.5"]
    drawn = parse_options(SampleOptions, [base, *two])
    assert drawn.loras == ("a b.safetensors", "c,d.safetensors:0.5")
    assert parse_options(SampleOptions, [base, *two, "--use_lora=False"]).loras == ()


def test_shipped_configurations_are_readable():
    for path in (ROOT / "configs").glob("*.yaml"):
        read_model_config(path)
    for path in (ROOT / "configs").glob("*.json"):
        assert read_mapping(path).keys() <= {field.name for field in dataclasses.fields(TrainOptions)}
    assert read_mapping(ROOT / "configs/train_dreambooth_sd_v2.json")["betas"] == [0.9, 0.98]


@pytest.mark.parametrize("old, new, wanted", [
    ("model_channels: 320", "model_chanels: 320", "did you mean model_channels"), ("context_dim: 1024",
    "context_dim: 768", "text encoder's width"),
    ("heads: 16", "heads: 7", "7 heads"), ("image_size: 512", "image_size: 500", "multiple of 8"),
    ("epsilon", "noise", "epsilon or v_prediction"),
    ("  layers: 23\n", "", "layers is missing"), ("[1, 2, 4, 4]", "[2, 4, 4]", "begin with 1"),
    ("beta_end: 0.012", "beta_end: high", "must be a number"),
])  # fmt: skip
def test_mistaken_model_configurations(tmp_path, old, new, wanted):
    text = (ROOT / "configs/train_dreambooth_sd_v2.yaml").read_text()
    assert old in text
    (tmp_path / "model.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        read_model_config(tmp_path / "model.yaml")


def test_every_option_is_read_somewhere():
    """An accepted flag must act: each field is used as an attribute outside its definition."""
    used = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "ldm").rglob("*.py")]:
        used |= {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
    # read by name, see test_spellings
    used |= {
        "plms",
        "ddim",
        "dpm_solver",
        "dpm_solver_pp",
        "uni_pc",
    }
    for cls in (TrainOptions, SampleOptions):
        # read while parsing
        unused = {field.name for field in dataclasses.fields(cls)} - used - {"train_config"}
        assert not unused


def test_a_new_sampler_needs_no_flag_of_its_own(tmp_path, monkeypatch):
    """CONTRIBUTING's row: the names of 2023 have flags, others are `--sampler` only."""
    (tmp_path / "a.ckpt").touch()
    monkeypatch.setattr("ldm.sample_options.SAMPLER_NAMES", ("new", *SAMPLER_NAMES))
    for options, name in ((SampleOptions(sampler="new"), "new"), (SampleOptions(ddim=True), "ddim")):
        options = dataclasses.replace(options, ckpt_path=str(tmp_path / "a.ckpt"))
        options.check()
        assert options.sampler_name == name


def test_what_depends_on_an_option_is_said_by_its_field():
    """All others change a training's result: a new one is compared at resume unless said otherwise."""
    free = {spec.name for spec in dataclasses.fields(TrainOptions) if not spec.metadata["changes_result"]}
    files = {"instance_data_dir", "class_data_dir", "train_config", "model_config", "output_path"}
    files |= {"accept_class_images", "concepts", "embedding_path"}
    files |= {"pretrained_model_path", "pretrained_model_file", "variant", "use_ema_weights", "train_config"}
    batches = {
        "train_batch_size",
        "gradient_accumulation_steps",
        "sample_batch_size",
        "recompute",
        "cache_latents",
    }
    saving = {
        "ckpt_save_interval",
        "keep_weights",
        "save_state_minutes",
        "save_every",
        "save_weights_every",
        "save_format",
        "save_dtype",
        "keep_states",
        "epochs",
        "max_updates",
    }
    run = {"resume", "allow_changed_options", "callback_size", "log_level", "version", "dry_run"}
    run |= {"report_to", *(name for name in free if name.startswith("validation_"))}
    machine = {"device", "mode", "compile_cache", "use_parallel", "flash_attention", "deterministic"}
    machine |= {"precision", "force_precision"}  # the model configuration is compared, with what it became
    lora = {"lora_fp16", "lora_format", "lora_ckpt_path", "lora_ft_unet"}
    assert free == files | batches | saving | run | machine | lora
    specs = dataclasses.fields(TrainOptions)
    names = {spec.name for spec in specs} - free
    later = {spec.name for spec in specs if spec.metadata["group"] in ("captions", "recipes")} - free
    assert TrainOptions.facts_of_before() == {
        spec.name: spec.default for spec in specs if spec.name in later
    }  # which a state of an older version does not know
    names |= {"concepts"}
    assert TrainOptions(use_lora=True).training_facts().keys() == names
    of_lora = {"lora_rank", "lora_alpha", "lora_targets", "lora_dropout"}
    assert TrainOptions().training_facts().keys() == names - of_lora


@pytest.mark.parametrize("flags, wanted", [
    (["--train_text_encoder=False", "--text_encoder_learning_rate=1e-6"], "the text encoder is frozen"),
    (["--train_text_encoder=False", "--text_encoder_stop=0.5"], "the text encoder is frozen anyway"),
    (["--optim=prodigy", "--start_learning_rate=1e-6"], "give --start_learning_rate=1, got 1e-06"),
    (["--optim=prodigy", "--text_encoder_learning_rate=1"], "prodigy finds one rate for all"),
    (["--lr_schedule=constant", "--decay_steps=5"], "decay_steps contradicts --lr_schedule=constant"),
])  # fmt: skip
def test_recipes_that_contradict_themselves_are_refused(files, capsys, flags, wanted):
    assert wanted in error_of(capsys, lambda: train(files, *flags))


def test_recipes_that_go_together(files):
    options = train(files, "--train_text_encoder=False", "--train_token=sks", "--text_encoder_stop=0.5",
                    "--lr_schedule=linear", "--end_learning_rate=1e-7", "--max_train_steps=80")  # fmt: skip
    assert options.trains_text and not options.train_text_encoder and options.max_updates == 80
    assert not train(files, "--train_text_encoder=False").trains_text


def test_time_steps_are_those_of_the_model(files):
    config = dataclasses.replace(
        SHALLOW, noise_schedule=dataclasses.replace(SHALLOW.noise_schedule, timesteps=50)
    )
    assert train(files, "--sampling_steps=20").for_model(config).max_timestep == 50
    with pytest.raises(ConfigError, match="min_timestep must be less than 40, got 45"):
        train(files, "--min_timestep=45", "--max_timestep=40").for_model(SHALLOW)
