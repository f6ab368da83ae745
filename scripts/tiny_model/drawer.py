"""Pictures by the tiny networks under any checkpoint of them, a whole model or a LoRA."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from ldm import images
from ldm.config import read_model_config

CONFIG = ROOT / "configs/train_dreambooth_tiny"  # .json of a training, .yaml of the networks
BASE = ROOT / "models/tiny_sd_v2.safetensors"


class Drawer:
    """Draws with the tiny networks under any checkpoint; compiles once."""

    def __init__(self, batch: int = 16, steps: int = 25, guidance_scale: float = 3.0) -> None:
        from ldm.networks.latent_diffusion import build_model
        from ldm.sampling.text_to_image import Sampling, TextToImage

        self.config = read_model_config(CONFIG.with_suffix(".yaml"))
        self.model, self.loaded = build_model(self.config), None
        self.pipeline = TextToImage(self.model, self.config)
        size = self.config.image_size
        self.batch, self.settings = batch, Sampling("ddim", steps, guidance_scale, size, size)

    def __call__(self, checkpoint: Path, prompts: Sequence[str], seed: int) -> np.ndarray:
        """(N, 64, 64, 3) uint8; picture n is drawn from (seed, n), whatever the checkpoint."""
        self._load(checkpoint)
        drawn = []
        for start in tqdm(range(0, len(prompts), self.batch), checkpoint.name, leave=False, disable=None):
            part = list(prompts[start : start + self.batch])
            padded = part + [part[-1]] * (self.batch - len(part))  # one shape, one graph
            seeds = [(seed, start + n) for n in range(self.batch)]
            drawn.append(self.pipeline(padded, [""] * self.batch, seeds, self.settings)[: len(part)])
        return np.concatenate(drawn)

    def _load(self, checkpoint: Path) -> None:
        """A whole model, or a LoRA, which is added to the base model."""
        from ldm.weights.checkpoint import load_checkpoint
        from ldm.weights.lora_files import is_lora
        from ldm.weights.lora_merge import read_loras
        from ldm.weights.source import read_file

        if checkpoint == self.loaded:
            return
        if is_lora(read_file(checkpoint)):
            added = read_loras([str(checkpoint)], self.model.parameter_shapes(), self.config)
            load_checkpoint(self.model, BASE, added=added)
        else:
            load_checkpoint(self.model, checkpoint)
        self.loaded = checkpoint

    def psnr(self, checkpoint: Path, real: np.ndarray) -> float:
        """How well the VAE gives pictures (N, 64, 64, 3) uint8 back, in dB, mean over them; N a multiple of
        the batch.
        """
        from mindspore import Tensor

        from ldm.networks.autoencoder import Encode

        self._load(checkpoint)
        encoder, scale = Encode(self.model.first_stage_model), self.config.autoencoder.scale_factor
        batches = [
            images.to_pixels(real[start : start + self.batch]) for start in range(0, len(real), self.batch)
        ]
        means = [np.split(encoder(Tensor(pixels)).asnumpy(), 2, axis=1)[0] for pixels in batches]
        back = np.concatenate([self.pipeline.decode(mean * scale) for mean in means])
        return float((-10 * np.log10(np.square((back - real.astype(float)) / 255).mean((1, 2, 3)))).mean())
