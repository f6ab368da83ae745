"""Fine-tune Stable Diffusion on a few images of a subject (DreamBooth). `--help` lists the options."""
# NumPy and MindSpore are imported within functions: typing errors come at once, signals are seen to first

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ldm.command_line import Ending, parse_options, progress_bar
from ldm.mindone_config import say_what_is_new
from ldm.options import TrainOptions
from ldm.run.stopping import StopSignals

if TYPE_CHECKING:
    from ldm.networks.latent_diffusion import LatentDiffusion
    from ldm.ranks import Ranks
    from ldm.run.folder import RunFolder
    from ldm.run.recipe import Start
    from ldm.training.inputs import Inputs
    from ldm.training.lora import LoraPlan
    from ldm.training.progress import Progress
    from ldm.weights.source import Source


@dataclass
class Plan:
    """What a run does. `options` as used, `origin` as far as known, `model` without values until prepared."""

    options: TrainOptions
    source: Source
    start: Start
    subjects: list
    progress: Progress
    origin: dict
    model: LatentDiffusion
    lora: LoraPlan | None
    draws: object = None


def main(argv: list[str] | None = None) -> None:
    stop = StopSignals()
    with Ending("train_dreambooth.py", can_be_resumed=True) as ending:
        options = parse_options(TrainOptions, argv).kept_apart()
        from ldm.device import log_device
        from ldm.ranks import check_launch, join
        from ldm.run.folder import RunFolder
        from ldm.weights.choice import open_model, put_on_device

        check_launch(options.use_parallel)
        source = open_model(options)
        options, source = put_on_device(options.for_model(source.config), source)
        ranks = join(options.device, options.use_parallel)  # in which msrun's scheduler serves, and exits
        ending.joined(ranks.rank, ranks.size)
        folder = RunFolder.open(options, ranks)
        log_device(options.precision)
        if work := plan(options, source, folder, ranks):
            train(work, folder, prepare(work, folder, ranks), ranks, stop)


def plan(options: TrainOptions, source: Source, folder: RunFolder, ranks: Ranks) -> Plan | None:
    """Read and decide; None where nothing is left to do. Loads no weights, generates and encodes nothing."""
    from ldm.networks.latent_diffusion import build_model
    from ldm.run.forecast import Forecast
    from ldm.run.recipe import origin_of
    from ldm.subjects import load_subjects
    from ldm.training.lora import plan_lora
    from ldm.training.progress import Progress
    from ldm.training.trained import count_values, settle_recompute

    start, config = folder.find_start(), source.config
    model = build_model(config, fuses_attention=options.flash_attention != "off")
    options, lora = plan_lora(options, config, model)
    subjects = load_subjects(options)
    progress = Progress.of(options, sum(map(len, subjects)), ranks.size)
    options = options.until(progress.total_updates)
    origin = origin_of(options, config, source.files, subjects, progress)
    if not start.leaves_work(progress.total_updates, origin, options.allow_changed_options, folder.path):
        return progress.say_that_all_is_done()
    dropout = max(config.unet.dropout, options.lora_dropout)
    say_what_is_new(options.warmup_steps, dropout)
    values = count_values(model, options, lora)
    space = folder.space(values, progress.checkpoints_to_come(start.global_step), start)
    if options.dry_run:
        forecast = Forecast(options, subjects, progress, values, space, ranks, start.global_step)
        return forecast.say(model, source)
    recompute = settle_recompute(options.recompute, values.bytes_needed, dropout, options.use_lora)
    return Plan(replace(options, recompute=recompute), source, start, subjects, progress, origin, model, lora)


def prepare(work: Plan, folder: RunFolder, ranks: Ranks) -> Inputs:
    """Load weights, make class images, latents, frozen text features; take the frozen out of the model."""
    from ldm.run.recipe import origin_of_class_images
    from ldm.sampling.class_images import complete_class_images
    from ldm.sampling.prediction import check_prediction
    from ldm.training.inputs import Inputs, encode_prompts
    from ldm.training.latent_cache import Encoding
    from ldm.training.samples import DreamBoothSamples
    from ldm.training.validation import ValidationImages
    from ldm.weights.checkpoint import load_checkpoint

    options, config, model = work.options, work.source.config, work.model
    folder.note_options(options, config)
    load_checkpoint(model, work.source, options.use_ema_weights)
    check_prediction(model, work.source)
    show = progress_bar("class images", ranks.is_first)
    classes = complete_class_images(options, work.source.own_config, model, ranks, show)
    work.origin |= (origin := origin_of_class_images(classes, options))
    work.start.require_same(origin, options.allow_changed_options)
    samples = DreamBoothSamples.of(options, work.subjects, classes)
    moments = Encoding(model.first_stage_model, samples)
    if options.cache_latents:
        count, show = work.progress.total_samples, progress_bar("latents", ranks.is_first)
        moments = moments.cached(config, folder.latents, count, options.train_batch_size, ranks, show)
    text = encode_prompts(options, config, model.cond_stage_model, samples.prompts())
    work.draws = ValidationImages.of(options, config, model, folder.checkpoints.brought_back)
    folder.checkpoints.take_frozen_from(model, options, work.lora and work.lora.writer(options, model))
    return Inputs.of(options, samples, moments, text, config)


def train(work: Plan, folder: RunFolder, inputs: Inputs, ranks: Ranks, stop: StopSignals) -> None:
    from ldm.run.compile_cache import CompileCache
    from ldm.run.recorder import Recorder
    from ldm.training.trainer import build_trainer

    options, progress, config = work.options, work.progress, work.source.config
    facts = {"config": config, "rank": (ranks.rank, ranks.size), "lora": work.lora and work.lora.sizes}
    facts["text encoder is frozen"] = progress.is_past_text_stop(start := work.start.global_step)
    graphs = CompileCache.open(options.caches_graphs, options.graph_facts() | facts, after=inputs)
    trainer = build_trainer(work.model, inputs, options, config, ranks, work.lora, progress.text_stop, start)
    is_alone = options.device == "CPU" and ranks.size == 1
    graphs.restart_if_large(trainer.compile, trainer.bytes_needed, is_alone)
    recorder = Recorder(folder, trainer, progress, work.origin, work.draws, lambda: bool(stop.received))
    recorder.resume(work.start.state)
    if trainer.global_step >= progress.total_updates:
        return recorder.say_that_all_is_done()
    recorder.begin(options, work.subjects)
    bar = progress_bar("training", ranks.is_first, "step")(progress.total_updates, trainer.global_step)
    with stop.postponed(), bar, recorder.failures():
        for report in trainer.updates(progress):
            graphs.mark_complete()
            recorder.write(report)
            bar.update()
            stops = report.global_step < progress.total_updates and stop.requested(ranks)
            recorder.finish(report.global_step, stops)
            stop.exit_if(stops, ranks)
    recorder.end()


if __name__ == "__main__":
    main()
