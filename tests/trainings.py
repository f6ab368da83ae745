"""A small training within the test's own process."""

import numpy as np
from conftest import write_pictures

from ldm.options import TrainOptions
from ldm.subjects import Picture, Subject
from ldm.training.inputs import Inputs, encode_prompts
from ldm.training.latent_cache import Encoding
from ldm.training.lora import plan_lora
from ldm.training.progress import Progress
from ldm.training.samples import Cropping, DreamBoothSamples
from ldm.training.trainer import Trainer, build_trainer
from ldm.weights.arrays import as_numpy

OPTIONS = TrainOptions(
    instance_prompt="a photo of sks dog", class_prompt="a photo of a dog", train_batch_size=2, image_size=32,
    epochs=1,
    train_data_repeats=20, start_learning_rate=1e-4, prior_loss_weight=0.7, random_crop=True,
)  # fmt: skip


def pictures(paths, prompt=OPTIONS.instance_prompt) -> list[Picture]:
    return [Picture(path, prompt) for path in paths]


def samples_of(instance, classes, repeats, cropping: Cropping, seed=0) -> DreamBoothSamples:
    """Of one subject, by the paths of its images and of its class's."""
    of_class = [pictures(classes, OPTIONS.class_prompt)] if classes else []
    return DreamBoothSamples([Subject(pictures(instance), repeats)], of_class, cropping, seed)


def make_samples(folder, options=OPTIONS, with_class=True) -> DreamBoothSamples:
    instance = pictures(write_pictures(folder / "instance", 4, seed=1), options.instance_prompt)
    classes = pictures(write_pictures(folder / "class", 7, seed=2), options.class_prompt)
    subjects = [Subject(instance, options.train_data_repeats)]
    return DreamBoothSamples.of(options, subjects, [classes] if with_class else [])


def make_inputs(model, config, options, samples, moments=None) -> Inputs:
    """As train_dreambooth.py prepares them; the VAE encodes in every step where no `moments` are given."""
    text = encode_prompts(options, config, model.cond_stage_model, samples.prompts())
    moments = moments or Encoding(model.first_stage_model, samples)
    return Inputs.of(options, samples, moments, text, config)


def make_trainer(model, config, options, samples, start=0) -> Trainer:
    options, lora = plan_lora(options, config, model)
    stop = progress_of(options, samples).text_stop
    inputs = make_inputs(model, config, options, samples)
    return build_trainer(model, inputs, options, config, lora=lora, text_stop=stop, start=start)


def progress_of(options, samples, processes=1) -> Progress:
    return Progress.of(options, samples.samples_per_epoch, processes)


def weights_of_trainer(trainer) -> dict[str, np.ndarray]:
    return {name: as_numpy(parameter) for name, parameter in trainer.weights().items()}
