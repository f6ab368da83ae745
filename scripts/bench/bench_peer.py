"""A job of scripts/bench/bench.py or scripts/bench/profile_step.py in PyTorch with diffusers; prints its
result as one JSON line.

    python scripts/bench/bench_peer.py JOB.json

The job's fields are explained in scripts/bench/bench.py, which writes the file. Does what diffusers'
train_dreambooth.py and its StableDiffusionPipeline do. Imports nothing of ldm, which sets variables for
MindSpore's sake.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

RULES = (
    ("clipping, optimizer", r"Optimizer\.step|clipping"),
    ("attention", r"scaled_dot_product|ScaledDotProduct"),
    ("convolution", r"conv2d|convolution|Convolution"),
    ("matrix product", r"aten::(linear|addmm|mm|bmm|matmul)$|(Addmm|Mm|Bmm|T)Backward"),
    ("normalisation", r"group_norm|layer_norm|(Group|Layer)NormBackward"),
)
OWN_RULES = (
    ("layout",
    r"aten::(cat|copy_|clone|contiguous|transpose|t|permute|reshape|_reshape_alias|view|slice|narrow|chunk|split|expand|as_strided|upsample.*|fill_|zero_|zeros.*)$"),
    ("element-wise", r"aten::(silu|gelu|mul|add|sub|neg|div|pow|mse_loss|sum|mean|sin|cos|exp).*"),
)  # fmt: skip


class Networks:
    """UNet, VAE and text encoder, each with weights of its own initialisation, float32."""

    def __init__(self, configs: dict[str, dict], precision: str) -> None:
        self.dtype = torch.float32 if precision == "auto" else getattr(torch, precision)
        self.scheduler_config = configs["scheduler"]
        self.unet = UNet2DConditionModel.from_config(configs["unet"]).eval()
        self.vae = AutoencoderKL.from_config(configs["vae"]).eval().requires_grad_(False)
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).eval()

    def cast(self) -> None:
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(self.dtype)

    def use_layout(self, channels_last: bool) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.unet.to(memory_format=layout)
        self.vae.to(memory_format=layout)

    def use_faster_layout(self, function) -> dict:
        """Time two calls in either memory layout, keep the faster; what was measured."""
        seconds = {}
        for channels_last in (False, True):
            self.use_layout(channels_last)
            seconds[channels_last] = min(timed(function, 2))
        faster = seconds[True] < seconds[False]
        self.use_layout(faster)
        return {"channels_last": faster, "contiguous_s": seconds[False], "channels_last_s": seconds[True]}


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


class Training:
    """diffusers' train_dreambooth.py: encode, add_noise, UNet, both loss terms, backward, clipping, AdamW.

    With `encode` the VAE works in every step, else latents are made beforehand. A text encoder that is not
    trained encodes the prompts once; one that is trained comes with gradient checkpointing in both networks,
    but for LoRA. In bfloat16 trained weights stay float32, under autocast, as accelerate has it.
    """

    def __init__(self, job: dict, networks: Networks) -> None:
        self.unet, self.vae, self.text_encoder = networks.unet.train(), networks.vae, networks.text_encoder
        self.encodes, self.trains_text = job["encode"], job["train_text_encoder"]
        self.ids = torch.tensor(job["token_ids"][:2]).repeat_interleave(job["batch"], 0)
        self.autocast = torch.autocast("cpu", networks.dtype, enabled=networks.dtype != torch.float32)
        if job["lora_rank"]:
            self.add_adapters(job["lora_rank"])
        elif self.trains_text:
            self.text_encoder.train()
            self.text_encoder.gradient_checkpointing_enable()
            self.unet.enable_gradient_checkpointing()
        if not self.trains_text:
            self.text_encoder.requires_grad_(False)
            self.context = self.text_encoder(self.ids)[0]
        self.parameters = [
            p for n in (self.unet, self.text_encoder) for p in n.parameters() if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-6)
        self.scheduler = DDPMScheduler.from_config(networks.scheduler_config)
        side = self.vae.config.sample_size
        self.pixels = torch.rand(len(self.ids), self.vae.config.in_channels, side, side) * 2 - 1
        if not self.encodes:
            with torch.no_grad():
                self.posterior = self.vae.encode(self.pixels).latent_dist

    def add_adapters(self, rank: int) -> None:
        """As train_dreambooth_lora.py does, which has no gradient checkpointing unless it is asked for."""
        from peft import LoraConfig

        for network, targets in (
            (self.unet, ["to_k", "to_q", "to_v", "to_out.0"]),
            (self.text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj"]),
        ):
            network.requires_grad_(False)
            config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
            if network is self.unet or self.trains_text:
                network.add_adapter(config)

    def backward(self) -> None:
        with self.autocast:
            prediction, target = self.predict()
        (instance, prior), (instance_target, prior_target) = prediction.float().chunk(2), target.chunk(2)
        loss = functional.mse_loss(instance, instance_target) + 1.0 * functional.mse_loss(prior, prior_target)
        loss.backward()
        assert torch.isfinite(loss)

    def predict(self):
        posterior = self.vae.encode(self.pixels).latent_dist if self.encodes else self.posterior
        latents = posterior.sample().float() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),))
        noisy = self.scheduler.add_noise(latents, noise, t)
        context = self.text_encoder(self.ids)[0] if self.trains_text else self.context
        is_epsilon = self.scheduler.config.prediction_type == "epsilon"
        target = noise if is_epsilon else self.scheduler.get_velocity(latents, noise, t)
        return self.unet(noisy, t, context).sample, target

    def forward_backward(self) -> None:
        self.backward()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.backward()
        if not self.trains_text:
            with torch.profiler.record_function("clipping"):
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Drawing:
    """StableDiffusionPipeline and its parts: a denoising step with guidance, decoding, whole pictures."""

    def __init__(self, job: dict, networks: Networks) -> None:
        networks.cast()
        self.unet, self.vae, self.text_encoder = networks.unet, networks.vae, networks.text_encoder
        self.scheduler_config, self.sampling_steps = networks.scheduler_config, job["sampling_steps"]
        self.count = job["pictures"]
        side = self.unet.config.sample_size
        self.latents = torch.randn(self.count, self.unet.config.in_channels, side, side, dtype=networks.dtype)
        prompt, _, negative = (torch.tensor([ids] * self.count) for ids in job["token_ids"])
        self.ids = torch.cat([negative, prompt])
        self.context = self.encode_prompts()

    @torch.no_grad()
    def encode_prompts(self):
        return self.text_encoder(self.ids)[0]

    @torch.no_grad()
    def denoise(self):
        negative, positive = self.unet(torch.cat([self.latents] * 2), 500, self.context).sample.chunk(2)
        return negative + 9.0 * (positive - negative)

    @torch.no_grad()
    def decode(self):
        pixels = self.vae.decode(self.latents / self.vae.config.scaling_factor).sample.float()
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()

    def sample(self):
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            self.vae, self.text_encoder, None, self.unet, PNDMScheduler.from_config(self.scheduler_config),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        negative, positive = self.encode_prompts().chunk(2)
        return pipeline(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            num_inference_steps=self.sampling_steps,
            guidance_scale=9.0,
        )


def group_of(event) -> str:
    """The group of the outermost operator around an event that has one, else by the event's own name."""
    names = [event.name]
    while event.cpu_parent:
        event = event.cpu_parent
        names.append(event.name)
    for name in reversed(names):
        for group, pattern in RULES:
            if re.search(pattern, name):
                return group
    return next((group for group, pattern in OWN_RULES if re.match(pattern, names[0])), "other")


def profile(step, steps: int) -> dict:
    """torch.profiler's operator times over `steps` steps, without those of the operators they call, and the
    time on the clock.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profiler:
        seconds = timed(step, steps)
    operators = {}
    for event in profiler.events():
        shapes = " ".join(str(shape) for shape in event.input_shapes or () if shape)
        row = operators.setdefault((event.name, group_of(event), shapes), [0, 0.0])
        row[0] += 1
        row[1] += event.self_cpu_time_total / 1000
    rows = [
        {
            "kind": kind.removeprefix("aten::"),
            "group": group,
            "shapes": shapes,
            "calls": calls / steps,
            "ms": ms / steps,
        }
        for (kind, group, shapes), (calls, ms) in operators.items()
    ]
    return {"profiled_ms": 1000 * sum(seconds) / steps, "operators": rows}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    task = job["task"]
    networks = Networks(job["diffusers"], job["precision"])
    result = {}
    if job["channels_last"] is not None:
        networks.use_layout(job["channels_last"])
    start = time.perf_counter()
    if task in TRAINING:
        training = Training(job, networks)
        probe, work = training.forward_backward, training.step
    else:
        drawing = Drawing(job, networks)
        probe, work = getattr(drawing, PROBES[task]), getattr(drawing, task)
    making = time.perf_counter() - start
    if job["channels_last"] is None:
        result |= networks.use_faster_layout(probe)
    if task != "layout":
        result["first"] = making + timed(work, 1)[0]
    if task == "memory":
        resident = {}
        for done in range(2, job["memory_steps"][1] + 1):
            work()
            resident[done] = resident_gib()
        result["resident_gib"] = [resident[number] for number in job["memory_steps"]]
    elif task != "layout":
        result["seconds"] = timed(work, job["steps"])
    if task == "profile":
        result |= profile(work, job["steps"])
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(result))


TRAINING = ("train", "memory", "profile", "layout")
# what tells the faster memory layout
PROBES = {
    "denoise": "denoise",
    "decode": "decode",
    "sample": "denoise",
}

if __name__ == "__main__":
    main()
