"""The kinds of files that `fuzz` damages: how each is made, and how the program reads it."""

import contextlib
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CONFIG = ROOT / "configs/train_dreambooth_tiny.yaml"
NEEDED = [
    "--pretrained_model_file=tiny_sd_v2.safetensors", f"--instance_data_dir={ROOT / 'examples/penguin'}",
    "--class_data_dir=none",
    "--class_prompt=a dog",
]  # fmt: skip
RUN = "a command was run"
WEIGHT_FILES = ("ckpt", "safetensors", "bfloat16", "torch", "lightning", "command", "legacy")
KINDS = (*WEIGHT_FILES, "lora", "folder", "json", "yaml", "png", "jpeg", "webp", "gif", "tiff")


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"unet.{n}.weight": rng.standard_normal((n + 1, 4, 3)).astype((np.float32, np.float16)[n % 2])
        for n in range(5)
    }


def text(word: str) -> bytes:
    """A string in a pickle."""
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def numbers(values: Sequence[int]) -> bytes:
    """A tuple of small numbers in a pickle."""
    return b"(" + b"".join(b"K" + bytes([v]) for v in values) + b"t"


def state_dictionary(more: bytes = b"") -> bytes:
    """The weights as torch.save pickles them, without the beginning and the end; `more` of a reference."""
    state = b"}("
    for number, (name, value) in enumerate(weights().items()):
        storage = b"ctorch\n" + (b"HalfStorage" if value.dtype == np.float16 else b"FloatStorage") + b"\n"
        key, size = text(str(number)) + text("cpu"), b"K" + bytes([value.size])
        reference = b"(" + text("storage") + storage + key + size + more + b"tQ"
        strides = numbers([step // value.itemsize for step in value.strides])
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"K\0" + numbers(value.shape) + strides
        state += text(name) + tensor + b"\x89ccollections\nOrderedDict\n)RtR"
    return state + b"u"


def torch_archive(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        for number, value in enumerate(weights().values()):
            archive.writestr(f"archive/data/{number}", value.tobytes())


def legacy_torch_file(path: Path) -> None:
    """As before PyTorch 1.6."""
    keys = [str(number) for number in range(len(weights()))]
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [b"\x80\x02" + state_dictionary(b"N") + b".", pickle.dumps(keys, 2)]
    parts += [value.size.to_bytes(8, "little") + value.tobytes() for value in weights().values()]
    path.write_bytes(b"".join(parts))


# what PyTorch Lightning puts beside the weights: a class as a key, a scalar of NumPy
CALLBACKS = (
    text("callbacks") + b"}(cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}("
    + text("score") + b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + text("f8") + b"\x89\x88tR"
    + b"c_codecs\nencode\n(" + text("0") + text("latin1") + b"tRtRuu"
)  # fmt: skip


def make(kind: str, path: Path) -> None:
    """A sound file of a kind."""
    if kind == "ckpt":
        from ldm.weights.mindspore_ckpt import write_ckpt

        with open(path, "wb") as file:
            write_ckpt(file, weights().items())
    elif kind in ("safetensors", "bfloat16"):
        from ldm.weights.arrays import BFLOAT16, ArraysInMemory, cast
        from ldm.weights.safetensors_files import write_safetensors

        dtype = BFLOAT16 if kind == "bfloat16" else None
        arrays = {name: cast(values, dtype) for name, values in weights().items()}
        with open(path, "wb") as file:
            write_safetensors(file, ArraysInMemory(arrays))
    elif kind == "torch":  # as torch.save writes it
        torch_archive(path, state_dictionary())
    elif kind == "lightning":
        inner = text("state_dict") + state_dictionary() + CALLBACKS
        torch_archive(path, b"}(" + inner + text("global_step") + b"K\x07u")
    elif kind == "command":  # beside the weights, in the place of what Lightning puts there
        run = b"cposix\nsystem\n(" + text(f"touch '{path.parent / RUN}'") + b"tR"
        torch_archive(path, b"}(" + text("state_dict") + state_dictionary() + text("callbacks") + run + b"u")
    elif kind == "legacy":
        legacy_torch_file(path)
    elif kind == "lora":
        make_lora(path)
    elif kind == "folder":  # the configuration of the UNet in a folder of diffusers
        from ldm.config import read_model_config
        from ldm.weights.diffusers_folder import folder_files

        path.write_text(folder_files(read_model_config(CONFIG))["unet/config.json"])
    elif kind == "json":
        path.write_text(
            json.dumps(
                {
                    "train_batch_size": 2,
                    "betas": [0.9, 0.98],
                    "epochs": 3,
                    "instance_prompt": "a sks dog",
                    "seed": 7,
                }
            )
        )
    elif kind == "yaml":
        path.write_bytes(CONFIG.read_bytes())
    else:
        array = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        Image.fromarray(array).save(path, kind.upper(), exif=exif, icc_profile=profile)


@lru_cache
def units():
    """What the tiny model can have additions to."""
    from ldm.config import read_model_config
    from ldm.networks.latent_diffusion import build_model
    from ldm.weights.lora_units import units_of

    config = read_model_config(CONFIG)
    return units_of(build_model(config).parameter_shapes(), config)


def make_lora(path: Path) -> None:
    """Two additions, one in kohya's names with an alpha, one in PEFT's with diffusers' metadata."""
    from safetensors.numpy import save_file

    rng, arrays = np.random.default_rng(0), {}
    first, second = [unit for unit in units().values() if unit.target == "attention"][:2]
    for name, unit, endings in (
        (first.kohya, first, (".lora_down.weight", ".lora_up.weight")),
        (second.diffusers, second, (".lora_A.weight", ".lora_B.weight")),
    ):
        for ending, shape in zip(endings, unit.shapes(2)):
            arrays[name + ending] = rng.standard_normal(shape).astype(np.float16)
    arrays[f"{first.kohya}.alpha"] = np.array(1, np.float16)
    scales = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {}})
    save_file(arrays, path, {"lora_adapter_metadata": scales})  # one: the library writes several in any order


def read(kind: str, path: Path):
    """What the program makes of a file, as something that can be compared.

    Raises ValueError, its own error.
    """
    from ldm.command_line import parse_options
    from ldm.config import read_model_config
    from ldm.image_files import read_image
    from ldm.options import TrainOptions
    from ldm.values import ConfigError
    from ldm.weights.diffusers_folder import config_of_folder, folder_files
    from ldm.weights.source import read_file, read_json

    if kind in WEIGHT_FILES:
        found = read_file(path)
        return {name: (str(found[name].dtype), found[name].shape, found[name].tobytes()) for name in found}
    if kind == "lora":
        from ldm.weights.lora_files import read_lora

        pairs = read_lora(path, units()).pairs
        return {name: (p.down.tobytes(), p.up.tobytes(), p.alpha) for name, p in pairs.items()}
    if kind == "folder":
        files = folder_files(read_model_config(CONFIG))
        parts = ("vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
        configs = {name.split("/")[0]: json.loads(files[name]) for name in parts}
        return config_of_folder(configs | {"unet": read_json(path)}, path)
    if kind == "json":
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                return parse_options(
                    TrainOptions,
                    [f"--train_config={path}", f"--pretrained_model_path={ROOT / 'models'}", *NEEDED],
                )
            except SystemExit as end:
                if end.code != 2:
                    raise
        raise ConfigError(said.getvalue())
    if kind == "yaml":
        return read_model_config(path)
    picture = read_image(path)
    # a copy is no part of reading
    return (
        picture.size,
        picture.tobytes() if picture.width * picture.height < 10**6 else None,
    )
