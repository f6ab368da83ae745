"""Small models with random weights, and the same weights in PyTorch's networks as the reference."""

import ctypes
import dataclasses
import gc
import gzip
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from ldm.config import (  # noqa: E402
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ldm.networks import layer_set  # noqa: E402
from ldm.networks.latent_diffusion import build_model  # noqa: E402
from ldm.sampling.text_to_image import TextToImage  # noqa: E402
from ldm.training import other_optimizers, train_step, trainer  # noqa: E402
from ldm.weights.arrays import ArraysInMemory  # noqa: E402
from ldm.weights.checkpoint import weights_of  # noqa: E402
from ldm.weights.diffusers_folder import as_diffusers, diffusers_configs  # noqa: E402
from ldm.weights.source import open_weights  # noqa: E402
from ldm.weights.writing import save_weights  # noqa: E402

gc.freeze()  # MindSpore collects before it compiles, which takes long with PyTorch's objects about
gc.set_threshold(100_000, 20, 100)
ms.set_context(mode=ms.GRAPH_MODE)
torch.set_num_threads(2)

# Two models that differ in widths, depths, levels, heads, norm groups and prediction type. The shallow one,
# which most tests compile, has a transformer in the middle alone, the deep one has them at two levels.
SHALLOW = ModelConfig(
    image_size=32,
    unet=UNetConfig(4, 4, 32, (1, 2), 1, (), 16, 48, norm_groups=8),
    autoencoder=AutoencoderConfig(3, 4, 16, (1, 2), 1, 0.5, norm_groups=4),
    text_encoder=TextEncoderConfig(49408, 77, 48, 3, 2),
    noise_schedule=ScheduleConfig(1000, 0.00085, 0.012, "epsilon"),
)
DEEP = ModelConfig(
    image_size=64,
    unet=UNetConfig(4, 4, 32, (1, 2, 3), 2, (1, 2), 32, 40, norm_groups=16),
    autoencoder=AutoencoderConfig(3, 4, 24, (1, 2, 2), 2, 0.18215, norm_groups=8),
    text_encoder=TextEncoderConfig(49408, 77, 40, 2, 3),
    noise_schedule=ScheduleConfig(1000, 0.00085, 0.012, "v_prediction"),
)
# Stable Diffusion 1 made small: heads by number, 1x1 convolutions around transformers, OpenAI's CLIP.
V1 = dataclasses.replace(
    SHALLOW,
    unet=dataclasses.replace(
        SHALLOW.unet, head_channels=None, num_heads=2, use_linear_projection=False, upcast_attention=True
    ),
    text_encoder=dataclasses.replace(SHALLOW.text_encoder, activation="quick_gelu", padding="end"),
)


def random_model(config: ModelConfig, seed: int = 0):
    """The networks with random weights, norms and biases among them: a zero bias would hide a missing one."""
    model, rng = build_model(config, initialise=True), np.random.default_rng(seed)
    for parameter in model.get_parameters():
        shape = parameter.shape
        if parameter.name.endswith("gamma"):
            values = 1 + 0.2 * rng.standard_normal(shape)
        elif len(shape) == 1:
            values = 0.1 * rng.standard_normal(shape)
        elif "embedding" in parameter.name:
            values = 0.3 * rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        parameter.set_data(ms.Tensor(values.astype(np.float32)))
    return model


def weights_as_arrays(model) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}


def torch_networks(weights: dict[str, np.ndarray], config: ModelConfig):
    """diffusers' UNet and VAE and transformers' text encoder with the given weights (official names)."""
    configs, parts = diffusers_configs(config), as_diffusers(ArraysInMemory(weights), config)
    networks = (
        UNet2DConditionModel.from_config(configs["unet"]),
        AutoencoderKL.from_config(configs["vae"]),
        CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
    )
    for network, part in zip(networks, ("unet", "vae", "text_encoder")):
        names = network.state_dict().keys()
        given = {
            k if k in names else k.removeprefix("text_model."): torch.from_numpy(v.copy())
            for k, v in parts[part].items()
        }
        network.load_state_dict(given, strict=True)
        network.eval()
    return networks


def official_table(version: str) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Of Stable Diffusion `v1` or `v2_base`: official name to shape, and the names in Stability's file."""
    table = gzip.decompress((ROOT / f"tests/data/sd_{version}_parameters.tsv.gz").read_bytes()).decode()
    rows = [line.split("\t") for line in table.splitlines()[1:]]
    return {name: (tuple(map(int, shape.split(","))), names.split(",")) for name, shape, names in rows}


def read_checkpoint(path: str | Path) -> Mapping[str, np.ndarray]:
    """Name to array, under the names in the file."""
    return open_weights(Path(path)).arrays


def relative_error(ours, reference) -> float:
    """max |a - b| / max |b|."""
    ours, reference = (
        np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (ours, reference)
    )
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def write_pictures(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (48, 40)) -> list[Path]:
    """Random smooth PNG pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, paths = np.random.default_rng(seed), []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        paths.append(folder / f"picture_{number}.png")
        small.resize(size, Image.BICUBIC).save(paths[-1])
    return paths


# Files that take minutes, the longest first: two processes then end at about the same time.
LONG = (
    "test_demo",
    "test_ranks",
    "test_dry_run",
    "test_trainer",
    "test_lora",
    "test_lora_commands",
    "test_networks",
    "test_stopping",
    "test_states",
)


def pytest_collection_modifyitems(items) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> None:
    """Nothing that a test runs writes into the user's own cache; tests that run side by side have one."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-cache"
    shared.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(shared)


@pytest.fixture(scope="module", autouse=True)
def freed_memory() -> Iterator[None]:
    """What the C library keeps of freed memory, a hundred MB a compilation, goes back to the system."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A user's folder: a model, its configuration, an options file and five pictures."""
    folder = tmp_path_factory.mktemp("user")
    OmegaConf.save(dataclasses.asdict(SHALLOW), folder / "model.yaml")
    save_weights(weights_of(random_model(SHALLOW)), folder / "models/base.ckpt")
    write_pictures(folder / "my dog", 5)
    (folder / "train.yaml").write_text(
        "sampling_steps: 2\nsample_batch_size: 2\nimage_size: 32\ntrain_data_repeats: 1\n"
    )
    return folder


@pytest.fixture(scope="module")
def own_cache(place) -> None:
    """The commands that run in `place` find an empty cache."""
    (place / "cache").mkdir()


@pytest.fixture
def files(tmp_path):
    """A complete set of arguments; the options file is empty."""
    write_pictures(tmp_path / "instance", 1)
    (tmp_path / "base.ckpt").write_bytes(b"x")
    (tmp_path / "train.yaml").write_text("{}\n")
    return tmp_path


@pytest.fixture(scope="session")
def pipeline() -> TextToImage:
    """Of a small random model; its graphs are compiled once."""
    return TextToImage(random_model(SHALLOW), SHALLOW)


@pytest.fixture(params=[SHALLOW, DEEP, V1], ids=["shallow", "deep", "v1"])
def config(request) -> ModelConfig:
    return request.param


@pytest.fixture
def accelerator(monkeypatch) -> None:
    """The layers and the joined float32 masters of an accelerator; of the first Ascend 910, for a CPU has no
    kernels of newer ones.
    """
    for module in (layer_set, other_optimizers, train_step, trainer):
        monkeypatch.setattr(module, "is_on_cpu", lambda: False)


def in_half(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, precision="float16")
