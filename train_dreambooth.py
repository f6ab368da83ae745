"""Fine-tune Stable Diffusion 2 on a few pictures of one subject (DreamBooth). `--help` lists the options."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ldm import device as runtime
from ldm.config import ConfigError, ModelConfig, fail, read_model_config
from ldm.options import TrainOptions, parse_options

if TYPE_CHECKING:  # imports numpy, whose threads must not start before `main` has seen to the signals
    from ldm.ranks import Ranks

logger = logging.getLogger("train_dreambooth")


def read_options(argv: list[str] | None) -> tuple[TrainOptions, ModelConfig]:
    from ldm.ranks import check_launch

    options = parse_options(TrainOptions, argv)
    config = read_model_config(options.model_config)
    config.check_size(image_size=options.image_size)
    check_launch(options.use_parallel)
    return options, config


def take_output_folder(options: TrainOptions) -> None:
    """Lock the output folder and log into it. Raises ConfigError where another run has used it."""
    from ldm.run.recipe import results

    output = Path(options.output_path)
    output.mkdir(parents=True, exist_ok=True)
    runtime.lock_folder(output)
    earlier = results(output)
    goes_on = options.resume == "latest" or (options.resume and Path(options.resume).resolve().parent == (output / "states").resolve())
    if earlier and not goes_on:
        raise ConfigError(
            f"output_path {output}: holds {earlier[-1]} of an earlier run; give another folder, or --resume=latest to go on with it"
        )
    runtime.start_logging(options.log_level, output / "train.log")


def prepare_class_images(options: TrainOptions, model, config: ModelConfig, ranks: Ranks) -> tuple[list[Path], bool]:
    """The class pictures, as many as wanted, after sampling the missing ones; and whether this process sampled any."""
    from ldm.sampling import text_to_image as pipeline

    folder = Path(options.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    there = pipeline.valid_class_images(folder)
    numbers = pipeline.missing_class_numbers(folder, options.num_class_images - len(there))
    ranks.wait()  # all have looked before one writes
    if not numbers:
        if ranks.is_first and len(there) > options.num_class_images:
            logger.info("class pictures: %d there, the first %d by name are used", len(there), options.num_class_images)
        return there[: options.num_class_images], False
    if ranks.is_first:
        logger.info("class pictures: %d there, %d wanted; sampling %d", len(there), options.num_class_images, len(numbers))
    share = ranks.share(numbers)
    new = pipeline.sample_class_images(
        pipeline.TextToImage(model, config), folder, options.class_prompt, share, seed=options.seed,
        batch_size=options.sample_batch_size, sampler=options.class_sampler, steps=options.sampling_steps,
        guidance_scale=options.guidance_scale, size=options.image_size,
    )  # fmt: skip
    for _ in tqdm(new, "class pictures", total=len(share), unit="picture", disable=None if ranks.is_first else True):
        pass
    ranks.wait()
    return sorted(there + [pipeline.class_image_path(folder, number) for number in numbers]), bool(share)


def moments_of(autoencoder, options: TrainOptions, config: ModelConfig, samples, ranks: Ranks):
    """Where the trainer gets the moments of the samples from: the latent cache, filled, or the VAE in every step."""
    from ldm.training.latent_cache import Encoding, LatentCache, encoder_digest
    from ldm.training.trainer import total_updates

    if not options.cache_latents:
        return Encoding(autoencoder, samples)
    count = total_updates(options, samples.samples_per_epoch, ranks) * options.samples_per_update * ranks.size
    cache = LatentCache(samples, config, encoder_digest(autoencoder, config), runtime.cache_folder() / "latents")
    found, missing = cache.load(count)
    ranks.wait()  # all have looked before one writes
    if ranks.is_first:
        logger.info("latents: %d there, encoding %d", found, missing)
    batch_size = options.train_batch_size * (2 if samples.class_paths else 1)
    with tqdm(total=missing, desc="latents", unit="picture", disable=None if missing and ranks.is_first else True) as bar:
        for encoded in cache.encode(autoencoder, batch_size, ranks.share):
            bar.update(encoded * ranks.size)
    ranks.wait()
    if ranks.size > 1 and missing and (unseen := cache.load(count)[1]):  # of what the other processes have encoded
        logger.warning("%s: latents of other processes are not all there; encoding %d more", runtime.cache_folder() / "latents", unseen)
        for _ in cache.encode(autoencoder, batch_size):
            pass
    samples.forget_pictures()
    return cache


def run(options: TrainOptions, config: ModelConfig, ranks: Ranks, device: str, signals: runtime.StopSignals) -> None:
    import numpy as np

    from ldm.networks.latent_diffusion import build_model
    from ldm.run.recipe import find_start, origin_of, write_record
    from ldm.run.states import States, fingerprint, own_weights, space_needed
    from ldm.training import samples as data
    from ldm.training.trainer import TooManyOverflows, Trainer, bytes_on_disk, checkpoints_to_come, settle_recompute, total_updates
    from ldm.weights import checkpoint

    output = Path(options.output_path)
    states = States(output / "states", options.keep_checkpoints, options.save_state_minutes)
    if ranks.is_first:
        take_output_folder(options)
        states.remove_litter()
        for folder in (output, Path(options.class_data_dir or output), runtime.cache_folder() / "latents"):
            runtime.remove_litter(folder)
    else:
        runtime.start_logging("WARNING", who=f"rank {ranks.rank} ")
    ranks.wait()
    start = find_start(options, states)
    where = np.array([start.global_step if start.state else -1, start.ended or -1, start.origin is None])
    ranks.require_equal([where], "the states to continue from")
    instance_paths = data.load_instance_images(Path(options.instance_data_dir))
    samples_per_epoch = len(instance_paths) * options.train_data_repeats
    total_steps = total_updates(options, samples_per_epoch, ranks)
    origin = origin_of(options, config, instance_paths, ranks)
    start.compare(origin, options.allow_changed_options)  # before class pictures are drawn for it
    start.require_a_way_on(total_steps, output)
    if start.is_done(total_steps) and not start.changes(origin):
        logger.info("all %d updates are done already; --epochs says how many there are", total_steps)
        return
    model = build_model(config)
    if ranks.is_first:
        effective = {"options": dataclasses.asdict(options), "model": dataclasses.asdict(config)}
        runtime.write_text(output / "effective_config.json", json.dumps(effective, indent=2) + "\n")
        to_come = checkpoints_to_come(options, samples_per_epoch, ranks, start.global_step)
        there = (len(own_weights(output)), len(states.paths())) if start.state else (0, 0)
        warn_of_a_full_disk(output, space_needed(options, bytes_on_disk(model, options), to_come, *there))
    checkpoint.load_weights(model, checkpoint.read_checkpoint(options.checkpoint), str(options.checkpoint))
    class_paths, sampled = prepare_class_images(options, model, config, ranks) if options.with_prior_preservation else ([], False)
    class_pictures = {"class pictures": fingerprint(class_paths)}
    start.compare(class_pictures, options.allow_changed_options)
    origin |= class_pictures

    samples = data.DreamBoothData(
        instance_paths, class_paths, options.train_data_repeats, options.image_size, options.random_crop, options.seed,
        options.random_flip,
    )  # fmt: skip
    options = settle_recompute(options, model, config)
    moments = moments_of(model.first_stage_model, options, config, samples, ranks)
    # Only now: the cache numbers the graphs in their order, and which ones sampling and encoding have compiled up to here depends
    # on the class pictures and latents that were on the disk. What is compiled before this line is neither kept nor numbered.
    # `sampled` remains a fact: a frozen text encoder is not compiled again below if sampling has already done so.
    if options.compile_cache and options.mode == 0:
        runtime.enable_compile_cache("train", options.graph_facts(), config, sampled and not options.train_text_encoder, ranks)
    trainer = Trainer(model, config, options, samples, moments, ranks)
    if options.cache_latents:
        trainer.release_frozen(output)
    compiles_first = options.compile_cache and options.mode == 0 and device == "CPU" and ranks.size == 1
    if compiles_first and runtime.memory_is_short(4 * trainer.trained_values):
        logger.info("memory is short: compiling, then starting again without what preparing and compiling leave in it")
        trainer.compile()
        runtime.start_again()
    if start.state:
        trainer.restore(start.state.arrays, start.state.progress, str(start.state.path))
        logger.info("resumed from %s: %d of %d updates done", start.state.path, trainer.global_step, trainer.total_steps)
        epoch = trainer.epoch_to_save()
        if epoch and ranks.is_first and not all(is_newer(path, start.state.path) for path in trainer.checkpoint_paths(output, epoch)):
            trainer.save(output, epoch)  # the run was stopped between the state and this
        start = None  # closes its file
        ranks.wait()
    if trainer.global_step >= trainer.total_steps:
        logger.info("all %d updates are done already; --epochs says how many there are", trainer.total_steps)
        return
    if ranks.is_first:
        write_record(output, origin)
    trainer.require_equal_weights()
    logger.info("training %.1fM values on %d pictures: %d updates", trainer.trained_values / 1e6, len(instance_paths), trainer.total_steps)
    tell_of_surprises(options, config)
    with signals.postponed():
        try:
            train(trainer, states, origin, signals)
        except FloatingPointError as error:
            if isinstance(error, TooManyOverflows):  # on all ranks in the same update
                if ranks.is_first:
                    states.save(*trainer.state(), origin)
                ranks.wait()  # the first that ends would end the others
            raise FloatingPointError(f"{error}{last_good(states)}") from None
    if ranks.is_first:
        write_record(output, origin, trainer.total_steps)
    path = trainer.checkpoint_paths(output, options.epochs)[-1]  # with EMA the averaged weights
    logger.info("done; draw with: python text_to_image.py --config %s --ckpt_path %s --prompt ...", options.model_config, path)


def tell_of_surprises(options: TrainOptions, config: ModelConfig) -> None:
    """What configuration files of 2023 bring with them."""
    if options.warmup_steps:
        text = "warming up over the first %d updates (the 2023 example ignored warmup_steps: its rate was constant, as with 0)"
        logger.info(text, options.warmup_steps)
    if config.unet.dropout:
        text = "dropout %g in the UNet: what it drops differs from run to run, so that no run is repeated or resumed bit by bit"
        logger.warning(text, config.unet.dropout)


def is_newer(checkpoint: Path, state: Path) -> bool:
    """Whether a checkpoint is there and was written after a state."""
    return checkpoint.exists() and checkpoint.stat().st_mtime_ns >= (state / "manifest.json").stat().st_mtime_ns


def warn_of_a_full_disk(output: Path, needed: int) -> None:
    """Say before hours are spent where the checkpoints and states to come will not fit."""
    free = shutil.disk_usage(output).free
    if needed > free:
        logger.warning(
            "%s: checkpoints and states to come need up to %.1f GB, %.1f GB are free: make room, or give --keep_weights=1, or "
            "--save_state_minutes=None (a state at a stop only)", output, needed / 1e9, free / 1e9,
        )  # fmt: skip


def last_good(states) -> str:
    paths = states.paths()
    return (
        f"; the last good state is {paths[-1]}: go on from it with --resume={paths[-1]} --allow_changed_options=True"
        if paths
        else "; no state was saved before"
    )


def train(trainer, states, origin: dict, signals: runtime.StopSignals) -> None:
    """Train to the end, or until a signal; rank 0 writes reports, checkpoints and states."""
    from ldm.run.states import MetricsFile, remove_old_weights

    options, ranks, output = trainer.options, trainer.ranks, Path(trainer.options.output_path)
    metrics = MetricsFile(output / "metrics.jsonl", trainer.global_step) if ranks.is_first else None
    logger.info("compiling; the first step takes a while")
    first = trainer.global_step + 1
    disable = None if ranks.is_first else True
    states.start_clock()
    with tqdm(total=trainer.total_steps, initial=trainer.global_step, desc="training", unit="step", disable=disable) as bar:
        for report in trainer.run():
            if report.global_step == first:
                runtime.keep_compiled_graphs()
            if metrics:
                metrics.write(dataclasses.asdict(report))
            bar.update()
            if report.global_step % options.callback_size == 0 or report.skipped:
                logger.info(report.line())
            epoch, ends = trainer.epoch_to_save(), report.global_step == trainer.total_steps
            stops = ranks.any(signals.received is not None) and not ends
            keeps_state = stops or (options.save_every and report.global_step % options.save_every == 0)
            if keeps_state or epoch:
                trainer.require_equal_weights()
                trainer.require_finite_weights()
                if ranks.is_first and (keeps_state or states.is_due(ends)):
                    logger.info("saved %s", states.save(*trainer.state(), origin))
            if epoch and ranks.is_first:  # after the state: resumed from it, a run that is killed here writes its checkpoint first
                trainer.save(output, epoch)
                for path in remove_old_weights(output, epoch, options.keep_weights):
                    logger.info("removed %s (--keep_weights)", path)
            if stops:
                ranks.wait()  # until the state is on the disk
                raise runtime.Interrupted(128 + (signals.received or signal.SIGTERM))


def main(argv: list[str] | None = None) -> None:
    signals = runtime.StopSignals()
    from ldm.ranks import ALONE, join

    name, ranks = "train_dreambooth.py", ALONE
    try:
        options, config = read_options(argv)
        # After that: importing mindspore takes seconds, which a typing error need not wait for. Before anything is written: msrun runs
        # this in its scheduler, too, which ends in `join`.
        device = runtime.start_device(options.device, options.mode)
        if options.use_parallel:
            ranks = join(device)
            name = f"{name}: rank {ranks.rank}"
        run(options, config, ranks, device, signals)
    except (ValueError, FloatingPointError, OverflowError, MemoryError, OSError) as error:
        fail(name, error, at_once=ranks.size > 1)
    except runtime.Interrupted:
        if ranks.is_first:
            again = f": python {shlex.join([*sys.argv, '--resume=latest'])}" if ranks.size == 1 else " the same command and --resume=latest"
            print(f"stopped; go on with{again}", file=sys.stderr, flush=True)
        raise
    except BaseException:
        if ranks.size == 1:
            raise
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
