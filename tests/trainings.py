"""A small training within the test's own process."""

import numpy as np
from conftest import write_pictures

from ldm.options import TrainOptions
from ldm.training.inputs import Inputs, encode_prompts
from ldm.training.latent_cache import Encoding
from ldm.training.lora import plan_lora
from ldm.training.progress import Progress
from ldm.training.samples import DreamBoothSamples
from ldm.training.trainer import Trainer, build_trainer

OPTIONS = TrainOptions(
    instance_prompt="a photo of sks dog", class_prompt="a photo of a dog", train_batch_size=2, image_size=32,
    epochs=1,
    train_data_repeats=20, start_learning_rate=1e-4, prior_loss_weight=0.7, random_crop=True,
)  # fmt: skip


def make_samples(folder, options=OPTIONS, with_class=True) -> DreamBoothSamples:
    instance = write_pictures(folder / "instance", 4, seed=1)
    classes = write_pictures(folder / "class", 7, seed=2) if with_class else []
    return DreamBoothSamples.of(options, instance, classes)


def make_inputs(model, config, options, samples, moments=None) -> Inputs:
    """As train_dreambooth.py prepares them; the VAE encodes in every step where no `moments` are given."""
    text = encode_prompts(options, config, model.cond_stage_model)
    return Inputs(samples, moments or Encoding(model.first_stage_model, samples), text, config)


def make_trainer(model, config, options, samples) -> Trainer:
    options, lora = plan_lora(options, config, model)
    return build_trainer(model, make_inputs(model, config, options, samples), options, config, lora=lora)


def progress_of(options, samples, processes=1) -> Progress:
    return Progress.of(options, len(samples.instance_paths), processes)


def weights_of_trainer(trainer) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy() for name, parameter in trainer.weights().items()}
