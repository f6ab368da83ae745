"""What users of the 2023 example have: its commands, scripts and configuration files of July, August and
September, as facts.

Each is read as it stands, in a folder like theirs, and ends as stated: with these options, or with one line.
"""

import copy
import json

import pytest
from conftest import ROOT, write_pictures
from omegaconf import OmegaConf

from ldm.command_line import parse_options
from ldm.config import read_model_config
from ldm.mindone_config import say_what_is_new
from ldm.options import TrainOptions
from ldm.sample_options import SampleOptions
from ldm.values import ConfigError

JSON_OF_JULY = {
    "model_config": "configs/train_dreambooth_sd_v2.yaml", "pretrained_model_path": "models/",
    "pretrained_model_file": "sd_v2_base-57526ee4.ckpt", "train_batch_size": 1,
    "gradient_accumulation_steps": 1, "optim": "adamw",
    "epochs": 8, "betas": [0.9, 0.98], "warmup_steps": 200, "seed": 3407, "image_size": 512,
    "random_crop": True,
    "start_learning_rate": 5e-6, "num_class_images": 200,
}  # fmt: skip
YAML_OF_SEPTEMBER = {  # configs/train/train_config_dreambooth_v2.yaml; its paths are for the user to fill in
    "mode": 0, "use_parallel": False, "instance_data_dir": "dreambooth/dataset/dog",
    "instance_prompt": "a photo of sks dog",
    "class_data_dir": "temp_class_images/dog", "class_prompt": "a photo of a dog", "num_class_images": 200,
    "scale": 9.0,
    "random_crop": True, "image_size": 512, "train_batch_size": 1,
    "model_config": "configs/train_dreambooth_sd_v2.yaml",
    "pretrained_model_path": "models/sd_v2_base-57526ee4.ckpt", "output_path": "output/dreambooth",
    "ckpt_save_interval": 1, "epochs": 4,
    "train_text_encoder": True, "with_prior_preservation": True, "start_learning_rate": 2e-6,
    "optim": "adamw", "betas": [0.9, 0.98],
    "weight_decay": 0.01,
}  # fmt: skip
LORA_YAML_OF_SEPTEMBER = YAML_OF_SEPTEMBER | {
    "use_lora": True,
    "lora_rank": 64,
    "lora_ft_unet": True,
    "lora_ft_text_encoder": True,
}
VANILLA_JSON = {"data_path": "dataset", "train_batch_size": 3, "epochs": 20}
MODEL = {  # configs/train_dreambooth_sd_v2.yaml of July 2023
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusionDreamBooth",
        "params": {
            "linear_start": 0.00085, "linear_end": 0.0120, "num_timesteps_cond": 1, "log_every_t": 200,
            "timesteps": 1000,
            "first_stage_key": "image", "cond_stage_key": "caption", "cond_stage_trainable": False,
            "image_size": 64, "channels": 4,
            "conditioning_key": "crossattn", "monitor": "val/loss_simple_ema", "scale_factor": 0.18215,
            "use_fp16": True,
            "parameterization": "eps",
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
                    "attention_resolutions": [4, 2, 1],
                    "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_head_channels": 64,
                    "use_spatial_transformer": True,
                    "use_linear_in_transformer": True, "transformer_depth": 1, "context_dim": 1024,
                    "use_checkpoint": True,
                    "legacy": False, "use_fp16": True, "dropout": 0.1,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4, "monitor": "val/rec_loss", "use_fp16": True,
                    "ddconfig": {
                        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
                        "ch": 128,
                        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
                    },
                },
            },
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"use_fp16": True}},
        },
    }
}  # fmt: skip
TRAIN = [  # the README and script of July
    "--mode=0", "--use_parallel=False", "--instance_data_dir=dreambooth/dataset/dog",
    "--instance_prompt=a photo of sks dog",
    "--class_data_dir=temp_class_images/dog", "--class_prompt=a photo of a dog",
    "--train_config=configs/train_dreambooth_sd_v2.json",
    "--output_path=output//txt2img", "--pretrained_model_path=models/",
    "--pretrained_model_file=sd_v2_base-57526ee4.ckpt",
    "--image_size=512", "--train_batch_size=1", "--epochs=8", "--start_learning_rate=2e-6",
    "--train_text_encoder=True",
]  # fmt: skip
DRAW = [
    "--prompt",
    "a sks dog on the hill",
    "--output_path",
    "vis/output/dir",
    "--config",
    "configs/train_dreambooth_sd_v2.yaml",
]
SCRIPT_DRAW = [  # scripts/run_text_to_image_v2.sh of August
    "--version", "2.0", "--data_path", "prompts.txt", "--output_path", "output/pokemon", "--seed", "42",
    "--n_iter", "1", "--n_samples",
    "1", "--W", "512", "--H", "512", "--sampling_steps", "15", "--dpm_solver", "--scale", "9", "--ckpt_path",
    "models/sd_v2_base-57526ee4.ckpt",
]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's folder of 2023, with the example's configuration files."""
    write_pictures(tmp_path / "dreambooth/dataset/dog", 5)
    for folder in ("models", "configs/train"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models/sd_v2_base-57526ee4.ckpt").write_bytes(b"weights")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "configs/train_dreambooth_sd_v2.json").write_text(json.dumps(JSON_OF_JULY))
    (tmp_path / "configs/train_config_v2.json").write_text(json.dumps(VANILLA_JSON))
    for name, content in (("dreambooth", YAML_OF_SEPTEMBER), ("dreambooth_lora", LORA_YAML_OF_SEPTEMBER)):
        OmegaConf.save(content, tmp_path / f"configs/train/train_config_{name}_v2.yaml")
    OmegaConf.save(MODEL, tmp_path / "configs/train_dreambooth_sd_v2.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


JULY = {
    "epochs": 8,
    "start_learning_rate": 2e-6,
    "warmup_steps": 200,
    "betas": (0.9, 0.98),
    "random_crop": True,
    "random_flip": True,
}
TRAINING = {
    "July: README and script": (TRAIN, JULY),
    "August, September: script": (
        ["--version=2.0", *TRAIN, "--epochs=4"],
        JULY | {"epochs": 4, "version": "2.0"},
    ),
    "September: YAML": (
        ["--train_config=configs/train/train_config_dreambooth_v2.yaml"],
        {"epochs": 4, "random_flip": True, "warmup_steps": 0},
    ),
    "September: LoRA": (
        ["--train_config=configs/train/train_config_dreambooth_lora_v2.yaml"],
        {"epochs": 4, "use_lora": True, "lora_rank": 64, "train_text_encoder": True},
    ),
    "its values as text": (
        [*TRAIN, "--use_lora", "False", "--log_level", "logging.INFO", "--scale_window=200.0"],
        {"use_lora": False, "log_level": "INFO", "scale_window": 200},
    ),
    "the checkpoint named as a file": (
        [*TRAIN, "--pretrained_model_path=models/sd_v2_base-57526ee4.ckpt"],
        JULY,
    ),
    "without flips": ([*TRAIN, "--random_flip=False"], JULY | {"random_flip": False}),
}
REFUSED_TRAINING = {
    "the vanilla example's JSON": (
        [*TRAIN, "--train_config=configs/train_config_v2.json"],
        "unknown option data_path",
    ),
    "another version": ([*TRAIN, "-v", "1.6"], "version must be one of 1.4, 1.5, 2.0"),
    "jit_level": ([*TRAIN, "--jit_level=O2"], "unknown argument --jit_level"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_commands(home, case):
    words, wanted = TRAINING[case]
    options = parse_options(TrainOptions, words)
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert options.checkpoint.samefile(home / "models/sd_v2_base-57526ee4.ckpt")
    assert (options.class_sampler, options.guidance_scale, options.num_class_images) == ("ddim", 9.0, 200)


DRAWING = {
    "July: README": ([*DRAW, "--ckpt_path", "models/sd_v2_base-57526ee4.ckpt"], {"sampler_name": "plms",
    "n_iter": 2, "n_samples": 8}),
    "August: script": ([*SCRIPT_DRAW, "--config", "configs/train_dreambooth_sd_v2.yaml"],
    {"sampler_name": "dpm_solver", "sampling_steps": 15}),
    "September": (["--ckpt_path", "models/sd_v2_base-57526ee4.ckpt", "--plms", "--ms_mode=1"],
    {"sampler_name": "plms", "mode": 1}),
    "LoRA left out": ([*DRAW, "--use_lora", "False", "--lora_ckpt_path", "None", "--plms"],
    {"sampler_name": "plms"}),
}  # fmt: skip
REFUSED_DRAWING = {
    "v2-inference.yaml": ([*SCRIPT_DRAW, "--config=configs/v2-inference.yaml"],
    "configs/v2-inference.yaml: no such file; beside the program there are configs/"),
    "drawing with another version": ([*DRAW, "-v", "2.2"], "version must be one of 1.4, 1.5, "),
    "ddim_steps": ([*DRAW, "--ddim_steps=50"], "unknown argument --ddim_steps (here --sampling_steps)"),
}  # fmt: skip


def drawing(words):
    options = parse_options(SampleOptions, words)
    if options.config != "auto":
        read_model_config(options.config)  # as text_to_image.py does next
    return options


@pytest.mark.parametrize("case", DRAWING)
def test_drawing_commands(home, case):
    words, wanted = DRAWING[case]
    options = drawing(words)
    assert {name: getattr(options, name) for name in wanted} == wanted


@pytest.mark.parametrize("case", [*REFUSED_TRAINING, *REFUSED_DRAWING])
def test_refused_commands_end_with_one_line(home, case, capsys):
    words, wanted = (REFUSED_TRAINING | REFUSED_DRAWING)[case]
    with pytest.raises((SystemExit, ConfigError)) as stop:
        parse_options(TrainOptions, words) if case in REFUSED_TRAINING else drawing(words)
    line = capsys.readouterr().err if stop.type is SystemExit else f"{stop.value}\n"
    assert line.count("\n") == 1 and wanted in line


def test_the_models_configuration_of_2023_says_the_same_as_ours(home, caplog):
    """But for its precision and its dropout, which are taken."""
    old, ours = (
        read_model_config("configs/train_dreambooth_sd_v2.yaml"),
        read_model_config(ROOT / "configs/train_dreambooth_sd_v2.yaml"),
    )
    assert "in mindone's layout of 2023" in caplog.text
    assert (old.precision, old.unet.dropout) == ("float16", 0.1)
    assert sorted(old.unet.attention_resolutions) == sorted(ours.unet.attention_resolutions)
    for part in ("autoencoder", "text_encoder", "noise_schedule", "image_size"):
        assert getattr(old, part) == getattr(ours, part)
    for field in (
        "in_channels",
        "out_channels",
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "head_channels",
        "context_dim",
    ):
        assert getattr(old.unet, field) == getattr(ours.unet, field)


def test_what_its_files_bring_with_them_is_said(home, caplog):
    caplog.set_level("INFO")
    options, config = (
        parse_options(TrainOptions, TRAIN),
        read_model_config("configs/train_dreambooth_sd_v2.yaml"),
    )
    say_what_is_new(options.warmup_steps, config.unet.dropout)
    assert "warming up over the first 200 updates (the 2023 example ignored warmup_steps" in caplog.text
    assert "dropout 0.1: what it drops differs from run to run" in caplog.text
    caplog.clear()
    ours = ROOT / "configs/train_dreambooth_sd_v2"
    options = parse_options(TrainOptions, [*TRAIN, f"--train_config={ours}.json"])
    say_what_is_new(options.warmup_steps, read_model_config(f"{ours}.yaml").unet.dropout)
    assert not caplog.text


def changed(path: str, value) -> dict:
    """The model's configuration with one value changed, or taken away."""
    config = copy.deepcopy(MODEL)
    *folders, last = path.split(".")
    place = config["model"]
    for name in folders:
        place = place[name]
    place.pop(last) if value is None else place.__setitem__(last, value)
    return config


@pytest.mark.parametrize("path, value, wanted", [
    ("params.parameterization", "velocity", "v_prediction"), ("params.parameterization", "v", "v_prediction"),
    ("params.parameterization", None, "epsilon"), ("params.parameterization", "x0", "parameterization is x0"),
    ("params.unet_config.params.num_head_channels", None, "its UNet has no number of heads"),
    # of June 2023
    ("params.cond_stage_config.target", "ldm.modules.encoders.modules.FrozenCLIPEmbedder_ZH", "epsilon"),
    ("params.cond_stage_config.target", "ldm.modules.encoders.modules.FrozenCnCLIPEmbedder",
    "FrozenCnCLIPEmbedder"),
    ("params.unet_config.target", "ldm.modules.diffusionmodules.openaimodel.ControlledUnetModel",
    "ControlledUnetModel"),
    ("params.scale_factor", None, "scale_factor is missing"), ("params.unet_config", 3,
    "missing or not as expected"),
])  # fmt: skip
def test_other_configurations_of_mindone(home, path, value, wanted):
    OmegaConf.save(changed(path, value), home / "model.yaml")
    if wanted in ("epsilon", "v_prediction"):
        assert read_model_config("model.yaml").noise_schedule.prediction_type == wanted
    else:
        with pytest.raises(
            ConfigError, match=f"model.yaml: a configuration of mindone for other networks .*{wanted}"
        ) as error:
            read_model_config("model.yaml")
        assert "leave it out" in str(error.value) and "\n" not in str(error.value)


def test_configurations_are_looked_for_beside_the_program_too(home):
    """The command is started from a folder that has none; one that is there comes first."""
    (home / "configs").rename(home / "other")
    options, model = parse_options(TrainOptions, TRAIN), "configs/train_dreambooth_sd_v2.yaml"
    assert options.warmup_steps == 0 and read_model_config(model).unet.dropout == 0  # ours
    (home / "other").rename(home / "configs")
    assert (
        parse_options(TrainOptions, TRAIN).warmup_steps == 200
        and read_model_config(model).unet.dropout == 0.1
    )
