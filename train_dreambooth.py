"""Fine-tune Stable Diffusion 2 on a few pictures of one subject (DreamBooth). `--help` lists the options."""

import dataclasses
import json
import logging
import sys
from pathlib import Path

from tqdm.auto import tqdm

from ldm import runtime
from ldm.config import ConfigError, ModelConfig, fail, read_model_config
from ldm.options import TrainOptions, parse_options

logger = logging.getLogger("train_dreambooth")


def prepare(argv: list[str] | None) -> tuple[TrainOptions, ModelConfig]:
    """Options and model configuration, checked; the output folder, with the effective configuration in it."""
    options = parse_options(TrainOptions, argv)
    config = read_model_config(options.model_config)
    config.check_size(image_size=options.image_size)
    output = Path(options.output_path)
    output.mkdir(parents=True, exist_ok=True)
    earlier = sorted(output.glob("dreambooth_epoch_*"))
    if earlier:
        raise ConfigError(f"output_path {output}: holds {earlier[0].name} of an earlier run; give another folder or remove it")
    runtime.start_logging(options.log_level, output / "train.log")
    effective = {"options": dataclasses.asdict(options), "model": dataclasses.asdict(config)}
    runtime.write_text(output / "effective_config.json", json.dumps(effective, indent=2) + "\n")
    return options, config


def moments_of(autoencoder, options: TrainOptions, config: ModelConfig, samples):
    """Where the trainer gets the moments of the samples from: the latent cache, filled, or the VAE in every step."""
    from ldm.latent_cache import Encoding, LatentCache, encoder_digest
    from ldm.trainer import total_updates

    if not options.cache_latents:
        return Encoding(autoencoder, samples)
    cache = LatentCache(samples, config, encoder_digest(autoencoder, config), runtime.cache_folder() / "latents")
    found, missing = cache.load(total_updates(options, samples) * options.samples_per_update)
    logger.info("latents: %d there, encoding %d", found, missing)
    batch_size = options.train_batch_size * (2 if samples.class_paths else 1)
    with tqdm(total=missing, desc="latents", unit="picture", disable=None if missing else True) as bar:
        for count in cache.encode(autoencoder, batch_size):
            bar.update(count)
    return cache


def run(options: TrainOptions, config: ModelConfig) -> None:
    # Only now: importing mindspore takes seconds, which a typing error need not wait for.
    from ldm import checkpoint, data, pipeline
    from ldm.models.latent_diffusion import build_model
    from ldm.trainer import MetricsFile, Trainer, settle_recompute

    output = Path(options.output_path)
    instance_paths = data.load_instance_images(Path(options.instance_data_dir))
    class_paths, missing = [], 0
    if options.with_prior_preservation:
        class_folder = Path(options.class_data_dir)
        class_folder.mkdir(parents=True, exist_ok=True)
        class_paths = pipeline.valid_class_images(class_folder)
        missing = max(0, options.num_class_images - len(class_paths))
    device = runtime.start_device(options.device, options.mode)
    model = build_model(config)
    checkpoint.load_weights(model, checkpoint.read_checkpoint(options.checkpoint), str(options.checkpoint))
    if missing:
        logger.info("class pictures: %d there, %d wanted; sampling %d", len(class_paths), options.num_class_images, missing)
        new = pipeline.sample_class_images(
            pipeline.TextToImage(model, config), class_folder, options.class_prompt, missing, seed=options.seed,
            batch_size=options.sample_batch_size, steps=options.sampling_steps, guidance_scale=options.guidance_scale,
            size=options.image_size,
        )  # fmt: skip
        class_paths += list(tqdm(new, "class pictures", total=missing, unit="picture", disable=None))
    class_paths = sorted(class_paths)

    samples = data.DreamBoothData(
        instance_paths, class_paths, options.train_data_repeats, options.image_size, options.random_crop, options.seed
    )
    options = settle_recompute(options, model, config)
    moments = moments_of(model.first_stage_model, options, config, samples)
    # Only now: the cache numbers the graphs in their order, and which ones sampling and encoding have compiled up to here depends
    # on the class pictures and latents that were on the disk. What is compiled before this line is neither kept nor numbered.
    # `missing` remains a fact: a frozen text encoder is not compiled again below if sampling has already done so.
    if options.compile_cache and options.mode == 0:
        runtime.enable_compile_cache("train", options.graph_facts(), config, bool(missing) and not options.train_text_encoder)
    trainer = Trainer(model, config, options, samples, moments)
    if options.cache_latents:
        trainer.release_frozen(output)
    if options.compile_cache and options.mode == 0 and device == "CPU" and runtime.memory_is_short(4 * trainer.trained_values):
        logger.info("memory is short: compiling, then starting again without what preparing and compiling leave in it")
        trainer.compile()
        runtime.start_again()
    metrics = MetricsFile(output / "metrics.jsonl")
    logger.info("training %.1fM values on %d pictures: %d updates", trainer.trained_values / 1e6, len(instance_paths), trainer.total_steps)
    logger.info("compiling; the first step takes a while")
    with tqdm(total=trainer.total_steps, desc="training", unit="step", disable=None) as bar:
        for report in trainer.run():
            metrics.write(report)
            bar.update()
            if report.global_step % options.callback_size == 0 or report.skipped:
                logger.info(report.line())
            epoch = trainer.finished_epoch()
            if epoch and (epoch % options.ckpt_save_interval == 0 or epoch == options.epochs):
                for path in trainer.save(output, epoch):
                    logger.info("saved %s", path)
    logger.info("done; draw with: python text_to_image.py --config %s --ckpt_path %s --prompt ...", options.model_config, path)


def main(argv: list[str] | None = None) -> None:
    try:
        options, config = prepare(argv)
        run(options, config)
    except (ValueError, FloatingPointError, OSError) as error:
        fail("train_dreambooth.py", error)
    except KeyboardInterrupt:
        sys.exit("train_dreambooth.py: interrupted")


if __name__ == "__main__":
    main()
