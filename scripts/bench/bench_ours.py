"""A job of scripts/bench/bench.py or scripts/bench/profile_step.py on this project's side; prints its result
as one JSON line.

    python scripts/bench/bench_ours.py JOB.json

The job's fields are explained in scripts/bench/bench.py, which writes the file.
"""

import contextlib
import csv
import json
import re
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.config import read_model_config
from ldm.device import start_device
from ldm.options import TrainOptions
from ldm.run.compile_cache import CompileCache


def random_weights(model) -> None:
    """Fill the networks from one block of random numbers: the values are not what is measured."""
    import mindspore as ms

    block = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02
    for parameter in model.get_parameters():
        is_norm = parameter.name.endswith("gamma")
        parameter.set_data(
            ms.Tensor(np.ones(parameter.shape, np.float32) if is_norm else np.resize(block, parameter.shape))
        )


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def timed(function, times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def training(job, model, config, graphs):
    """A function that makes one training step and waits for its loss.

    The moments, which a user's run has in its cache, are random.
    """
    from dataclasses import replace

    from mindspore import Tensor

    from ldm.networks.autoencoder import posterior_sample
    from ldm.run.checkpoints import Checkpoints
    from ldm.subjects import Picture, Subject
    from ldm.training.inputs import Inputs, encode_prompts
    from ldm.training.lora import plan_lora
    from ldm.training.samples import DreamBoothSamples
    from ldm.training.trained import count_values, settle_recompute
    from ldm.training.trainer import build_trainer

    size, batch = config.image_size, job["batch"]
    options = TrainOptions(
        instance_prompt=job["prompts"][0], class_prompt=job["prompts"][1], image_size=size,
        train_batch_size=batch,
        train_text_encoder=job["train_text_encoder"], clip_grad=not job["train_text_encoder"],
        max_grad_norm=1.0, use_lora=job["lora_rank"] > 0, lora_rank=job["lora_rank"] or None,
    )  # fmt: skip
    options, lora = plan_lora(options, config, model)
    values = count_values(model, options, lora)
    options = replace(options, recompute=settle_recompute(
        None, values.bytes_needed, config.unet.dropout, options.use_lora
    ))  # fmt: skip
    latent_channels, side = config.autoencoder.latent_channels, size // config.autoencoder.downsampling
    shape = (2 * batch, latent_channels, side, side)
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((2 * batch, 2 * latent_channels, side, side), dtype=np.float32)
    instance, of_class = (Picture(Path("never_read.png"), prompt) for prompt in job["prompts"][:2])
    samples = DreamBoothSamples.of(options, [Subject([instance], 1)], [[of_class]])
    text = encode_prompts(options, config, model.cond_stage_model, samples.prompts())
    inputs = Inputs(samples, lambda _: moments, text, config)
    with tempfile.TemporaryDirectory() as folder:
        aside = Checkpoints(Path(folder), keep=1)
        aside.take_frozen_from(model, options, lora and lora.writer(options, model))
    trainer = build_trainer(model, inputs, options, config, lora=lora)
    graphs.restart_if_large(trainer.compile, trainer.bytes_needed)  # as train_dreambooth.py
    text = Tensor(np.repeat(list(text.values()), batch, axis=0))
    one, done = Tensor(np.float32(1)), 0

    def step() -> None:
        nonlocal done
        done += 1
        latents = posterior_sample(moments, rng.standard_normal(shape, dtype=np.float32), inputs.latent_scale)
        t = rng.integers(config.noise_schedule.timesteps, size=2 * batch).astype(np.int32)
        noise = rng.standard_normal(shape, dtype=np.float32)
        scalars = trainer.optimizer.scalars(done, options.start_learning_rate)
        losses = trainer.update.step(
            Tensor(latents), text, Tensor(t), Tensor(noise), one, one, *scalars
        ).asnumpy()
        assert np.isfinite(losses).all(), f"losses {losses}"

    return step


def drawing(job, model, config, graphs):
    """One denoising step with guidance (`denoise`), one decoding (`decode`), or whole pictures (`sample`)."""
    from ldm.sampling.text_to_image import Sampling, TextToImage

    pipeline, size, count = TextToImage(model, config), config.image_size, job["pictures"]
    seeds = [(0, number) for number in range(count)]
    latents = pipeline.initial_noise(seeds, size, size).astype(np.float32)
    if job["task"] == "decode":
        return lambda: pipeline.decode(latents)
    prompts, negatives = [job["prompts"][0]] * count, [""] * count
    if job["task"] == "denoise":
        denoise = pipeline.denoiser(pipeline.encode_prompts(prompts), pipeline.encode_prompts(negatives), 9.0)
        return lambda: denoise(latents, 500)
    settings = Sampling("plms", job["sampling_steps"], guidance_scale=9.0, height=size, width=size)
    return lambda: pipeline(prompts, negatives, seeds, settings)


GROUPS = {
    "convolution": {"Convolution", "ConvolutionAndBias", "UpsampledConvolution", "Conv2D",
    "Conv2DBackpropInput", "Conv2DBackpropFilter", "Im2Col", "Col2Im", "Pad"},
    "matrix product": {"Product", "ProductAndBias", "MatMul", "BatchMatMul"},
    "attention": {"Attention"},
    "clipping, optimizer": {"GlobalNorm"},
    "bias": {"BiasAdd", "BiasAddGrad"},
    "normalisation": {"Norm", "GroupNorm", "GroupNormGrad", "LayerNorm", "LayerNormGrad", "BatchNorm",
    "BatchNormGrad"},
    "layout": {"Transpose", "Concat", "Slice", "StridedSlice", "StridedSliceGrad", "Split", "Reshape",
    "BroadcastTo", "Tile"},
    "element-wise": {
        "Activation",
        "Mul", "Add", "AddN", "Sub", "Neg", "Pow", "Erf", "Exp", "RealDiv", "Cast", "Sigmoid", "SigmoidGrad",
        "SiLU", "SiLUGrad",
        "Square", "ZerosLike", "OnesLike",
    },
}  # fmt: skip


def group_of(kind: str, where: str) -> str:
    """What an operator works for.

    MindSpore merges equal scopes, so the names in gradients tell little beyond the kind.
    """
    if "SoftmaxAttention" in where:
        return "attention"
    if "MatmulConv" in where:
        return "convolution"
    # The clipping's sums of squares lose their scope; the loss has two squares of its own, of small tensors.
    if (
        kind in ("Adam", "ApplyGradientDescent", "Square")
        or "optimizer-" in where
        or "update-" in where
        or "_SumExt" in where
    ):
        return "clipping, optimizer"
    return next((group for group, kinds in GROUPS.items() if kind in kinds), "other")


def profile(step, steps: int) -> dict:
    """MindSpore's own operator times over `steps` steps, a row for each operator of the graph, and the time
    on the clock.
    """
    import mindspore as ms

    with tempfile.TemporaryDirectory() as folder:
        profiler = ms.Profiler(output_path=folder, start_profile=False)
        profiler.start()
        profiled = 1000 * sum(timed(step, steps)) / steps
        profiler.stop()
        with contextlib.redirect_stdout(sys.stderr):
            profiler.analyse()
        (files,) = Path(folder).rglob("FRAMEWORK")
        return {"profiled_ms": profiled, "operators": read_profile(files, steps)}


def kind_of(row: dict) -> str:
    """MindSpore calls this project's own operators by one name: here each has that of its cell, which a graph
    of the compile cache no longer knows.
    """
    cell = row["full_op_name"].split("/")[-2].rpartition("-")[2]
    return cell if row["op_type"] == "Custom" and cell != "Default" else row["op_type"]


def read_profile(folder: Path, steps: int) -> list[dict]:
    """The operators in the CPU profiler's files: their time, and the shapes of their inputs."""
    started, shapes = defaultdict(list), defaultdict(list)
    for line in next(folder.glob("cpu_op_execute_timestamp_*.txt")).read_text().splitlines():
        where, _, runs = line.split(";")
        started[where.rpartition("/")[2]].append((int(runs.split(",")[0]), where))
    for line in next(folder.glob("cpu_framework_*.txt")).read_text().splitlines():
        _, name, _, inputs = line.split(";", 3)
        shapes[name].append(" ".join(re.findall(r"\[[\d, ]+\]", inputs)))
    # The shapes come in the order of the launches under names without a scope; within a name, the first
    # launch tells.
    inputs = {
        where: shape
        for name, runs in started.items()
        for (_, where), shape in zip(sorted(runs), shapes[name])
    }
    with open(next(folder.glob("cpu_op_detail_info_*.csv"))) as file:
        return [
            {
                "kind": kind_of(row), "group": group_of(kind_of(row), row["full_op_name"]),
                "where": row["full_op_name"],
                "shapes": inputs.get(row["full_op_name"], ""), "calls": int(row["op_occurrences"]) / steps,
                "ms": float(row["op_total_time(ms)"]) / steps,
            }
            for row in csv.DictReader(file)
        ]  # fmt: skip


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = read_model_config(job["model_config"])
    from ldm.networks.latent_diffusion import build_model

    start_device("CPU", 0)
    facts = {name: job[name] for name in ("task", "train_text_encoder", "lora_rank", "batch", "pictures")} | {
        "config": config
    }
    graphs = CompileCache.open(True, facts)
    model = build_model(config)
    random_weights(model)
    start = time.perf_counter()
    work = (training if job["task"] in ("train", "memory", "profile") else drawing)(
        job, model, config, graphs
    )
    work()
    graphs.mark_complete()
    result = {"first": time.perf_counter() - start}
    if job["task"] == "memory":
        resident = {}
        for done in range(2, job["memory_steps"][1] + 1):
            work()
            resident[done] = resident_gib()
        result["resident_gib"] = [resident[number] for number in job["memory_steps"]]
    else:
        result["seconds"] = timed(work, job["steps"])
    if job["task"] == "profile":
        result |= profile(work, job["steps"])
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(result))


if __name__ == "__main__":
    main()
