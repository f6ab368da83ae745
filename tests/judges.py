"""Small judges with random weights, as folders of transformers."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel


def randomise(network) -> None:
    """Weights that make every part count; a fresh network has zeros in places."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        spread = 0.3 if parameter.ndim < 2 or "embed" in name else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1


def save_clip(folder: Path) -> CLIPModel:
    common = dict(num_hidden_layers=2, hidden_act="quick_gelu")
    text = dict(vocab_size=49408, hidden_size=48, intermediate_size=96, num_attention_heads=3, **common)
    vision = dict(
        hidden_size=64, intermediate_size=80, num_attention_heads=2, image_size=32, patch_size=8, **common
    )
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    randomise(network)
    network.save_pretrained(folder)
    return network


def save_dino(folder: Path) -> ViTModel:
    network = ViTModel(
        ViTConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32,
            patch_size=8, layer_norm_eps=1e-12,
        )
    ).eval()  # fmt: skip
    randomise(network)
    network.save_pretrained(folder)
    return network
