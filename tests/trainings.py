"""A small training within the test's own process."""

from conftest import write_pictures

from ldm.options import TrainOptions
from ldm.training.latent_cache import Encoding
from ldm.training.samples import DreamBoothData
from ldm.training.trainer import Trainer

OPTIONS = TrainOptions(
    instance_prompt="a photo of sks dog", class_prompt="a photo of a dog", train_batch_size=2, image_size=32, epochs=1,
    train_data_repeats=20, start_learning_rate=1e-4, prior_loss_weight=0.7, random_crop=True,
)  # fmt: skip


def make_data(folder, options, with_class=True) -> DreamBoothData:
    instance = write_pictures(folder / "instance", 4, seed=1)
    classes = write_pictures(folder / "class", 7, seed=2) if with_class else []
    return DreamBoothData(
        instance, classes, options.train_data_repeats, options.image_size, options.random_crop, options.seed, options.random_flip
    )


def make_trainer(model, config, options, data) -> Trainer:
    return Trainer(model, config, options, data, Encoding(model.first_stage_model, data))
