"""The judges against transformers' networks and processors, and LPIPS's own code, with random weights."""

import sys
import types

import numpy as np
import pytest
import torch
from conftest import write_pictures
from judges import randomise, save_clip, save_dino
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ldm.evaluation.judges import ClipJudge, DinoJudge, in_batches
from ldm.evaluation.lpips import CONVOLUTIONS, load_lpips
from ldm.tokenizer import Tokenizer

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Image.Image]:
    """Of several shapes, smaller and larger than what the networks see."""
    sizes, folder = [(48, 40), (30, 51), (20, 20), (150, 47)], tmp_path_factory.mktemp("pictures")
    paths = [write_pictures(folder / str(n), 1, seed=n, size=size)[0] for n, size in enumerate(sizes)]
    return [Image.open(path).convert("RGB") for path in paths]


def unit(x: torch.Tensor) -> np.ndarray:
    return (x / x.norm(dim=-1, keepdim=True)).detach().numpy()


def test_clip(tmp_path, pictures):
    theirs, judge = save_clip(tmp_path), ClipJudge(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    ours = np.stack([judge.pixels(picture) for picture in pictures])
    print(f"pixels: max |a-b| {np.abs(ours - pixels.numpy()).max():.1e}")
    assert np.abs(ours - pixels.numpy()).max() < 1e-6
    with torch.no_grad():
        wanted = unit(theirs.visual_projection(theirs.vision_model(pixels).pooler_output))
    error = np.abs(judge.images(pictures) - wanted).max()
    prompts = ["a dog", "", "a dog " * 60]
    token_ids = torch.from_numpy(Tokenizer(padding="end")(prompts)).long()
    with torch.no_grad():
        wanted = unit(theirs.text_projection(theirs.text_model(token_ids).pooler_output))
    text_error = np.abs(judge.texts(prompts) - wanted).max()
    print(f"images: max |a-b| {error:.1e}, texts {text_error:.1e}")
    assert error < 1e-4 and text_error < 1e-4


def old_names(state: dict) -> dict:
    """Of transformers before version 5, as the published file has them, behind a classifier's prefix."""
    old = {
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.k_proj.": ".attention.attention.key.",
        ".attention.v_proj.": ".attention.attention.value.", ".attention.o_proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense.",
    }  # fmt: skip
    found = {}
    for name, values in state.items():
        for new, its in old.items():
            name = name.replace(new, its)
        found["vit." + name.replace("layers.", "encoder.layer.", 1)] = values
    return found


def own_names(state: dict) -> dict:
    """Of DINO's own file: query, key and value joined."""
    found = {
        "cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"],
    }  # fmt: skip
    for part in ("weight", "bias"):
        found[f"patch_embed.proj.{part}"] = state[f"embeddings.patch_embeddings.projection.{part}"]
        found[f"norm.{part}"] = state[f"layernorm.{part}"]
        for n in range(3):
            its, block = f"layers.{n}", f"backbone.blocks.{n}"
            qkv = [state[f"{its}.attention.{name}_proj.{part}"] for name in "qkv"]
            found[f"{block}.attn.qkv.{part}"] = torch.cat(qkv)
            pairs = {"attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
            for new, old in (pairs | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
                found[f"{block}.{new}.{part}"] = state[f"{its}.{old}.{part}"]
    return found


def test_dino(tmp_path, pictures):
    theirs = save_dino(tmp_path)
    judge = DinoJudge(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, **IMAGENET)
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    ours = np.stack([judge.pixels(picture) for picture in pictures])
    print(f"pixels: max |a-b| {np.abs(ours - pixels.numpy()).max():.1e}")
    assert np.abs(ours - pixels.numpy()).max() < 1e-6
    with torch.no_grad():
        wanted = unit(theirs(pixels).last_hidden_state[:, 0])
    found = judge.images(pictures)
    print(f"images: max |a-b| {np.abs(found - wanted).max():.1e}")
    assert np.abs(found - wanted).max() < 1e-4
    state = theirs.state_dict()
    for name, renamed in (("old", old_names(state)), ("own", own_names(state))):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(renamed, folder / "pytorch_model.bin")
        (folder / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
        assert np.array_equal(DinoJudge(folder).images(pictures), found), name
    cropped = DinoJudge(tmp_path, "original").pixels(pictures[0])  # the shorter side on 36, 32 of it
    wanted = pictures[0].resize((43, 36), Image.BICUBIC).crop((5, 2, 37, 34))
    mean, std = (np.reshape(IMAGENET[its], (3, 1, 1)) for its in ("image_mean", "image_std"))
    assert np.abs(cropped - (np.asarray(wanted).transpose(2, 0, 1) / 255 - mean) / std).max() < 1e-5


def test_what_is_no_judge_is_said(tmp_path):
    save_clip(tmp_path / "clip")
    save_dino(tmp_path / "dino")
    with pytest.raises(ValueError, match="no CLIP in transformers' names; openai/clip-vit-base-patch32"):
        ClipJudge(tmp_path / "dino")
    with pytest.raises(ValueError, match="no vision transformer in known names; facebook/dino-vits16 is one"):
        DinoJudge(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: has none of model.safetensors, pytorch_model.bin"):
        DinoJudge(tmp_path / "empty")
    state = save_dino(tmp_path / "dino").state_dict()
    state.pop("layernorm.weight")
    torch.save(state, tmp_path / "empty/pytorch_model.bin")
    with pytest.raises(ValueError, match="missing: 1"):
        DinoJudge(tmp_path / "empty")


def alexnet() -> torch.nn.Module:
    """The convolutions of torchvision's."""
    layers = []
    for _, before, after, kernel, stride, padding, pools in CONVOLUTIONS:
        layers += [torch.nn.MaxPool2d(3, 2)] * pools
        layers += [torch.nn.Conv2d(before, after, kernel, stride, padding), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def test_lpips(tmp_path, monkeypatch):
    """Against the paper's own code, and its own linear weights."""
    features = alexnet()
    torch.manual_seed(0)
    randomise(features)
    models = types.SimpleNamespace(alexnet=lambda pretrained=False: types.SimpleNamespace(features=features))
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    import lpips

    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    torch.save(
        {f"features.{name}": its for name, its in features.state_dict().items()}, tmp_path / "alexnet.pth"
    )
    first, second = np.random.default_rng(0).uniform(-1, 1, (2, 3, 3, 96, 80)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(first), torch.from_numpy(second)).flatten().numpy()
    found = in_batches(load_lpips(tmp_path / "alexnet.pth"), first, second)
    print(f"max |a-b| {np.abs(found - wanted).max():.1e} of {wanted.max():.2f}")
    assert np.abs(found - wanted).max() < 1e-5 * wanted.max() + 1e-6
    save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="no features.0.weight in it; torchvision's AlexNet is wanted"):
        load_lpips(tmp_path / "clip/model.safetensors")
