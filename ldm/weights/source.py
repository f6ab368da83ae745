"""Opening what users have: single files of any format, folders of diffusers; recognised by content, not by
name. Nothing but names, shapes and configurations is read at first.
"""

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.config import ModelConfig, check_model_config
from ldm.files import sha256_of
from ldm.precision import settle_precision
from ldm.values import absent
from ldm.weights.arrays import Arrays, Joined
from ldm.weights.digests import DIGESTS, recorded_digests
from ldm.weights.mindspore_ckpt import read_ckpt
from ldm.weights.safetensors_files import is_safetensors, read_safetensors
from ldm.weights.torch_pickle import is_torch_file, read_torch_file

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
LARGEST_JSON = 2**22  # bytes; an index of shards names every parameter
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model's weights, wherever they are.

    Attributes:
        arrays: by the names in the file; in a folder of diffusers with the subfolder before them.
        configs: of such a folder, its JSON configurations by subfolder; else None.
        global_step: how long the model was trained, where the file says so.
        files: that the weights are read from.
        config: of the model, once it is known; `known_by` says how.
        is_mended: whether the noise schedule ends in pure noise only now, see `ending_in_noise`.
        is_stated: whether it was said by what lies beside the weights, what the UNet predicts above all.
    """

    path: Path
    files: list[Path]
    arrays: Arrays
    configs: dict[str, dict] | None = None
    global_step: int | None = None
    config: ModelConfig | None = None
    known_by: str = ""
    is_stated: bool = False
    is_mended: bool = False

    def on_this_device(self, precision: str = "auto", is_forced: bool = False) -> "Source":
        """With the precision settled that its model computes in, see ldm.precision.settle_precision."""
        settled = settle_precision(precision, self.config.precision, is_forced)
        return replace(self, config=replace(self.config, precision=settled))

    def ending_in_noise(self) -> "Source":
        """With a noise schedule of zero terminal SNR. Raises ConfigError where the model cannot have one."""
        schedule = replace(self.config.noise_schedule, zero_terminal_snr=True)
        config = check_model_config(replace(self.config, noise_schedule=schedule), str(self.path))
        return replace(self, config=config, is_mended=not self.config.noise_schedule.zero_terminal_snr)

    @property
    def own_config(self) -> ModelConfig:
        """The configuration with the noise schedule that the weights were trained with."""
        if not self.is_mended:
            return self.config
        return replace(
            self.config, noise_schedule=replace(self.config.noise_schedule, zero_terminal_snr=False)
        )


def is_diffusers_folder(path: Path) -> bool:
    return (path / "model_index.json").is_file() or (path / "unet").is_dir()


def open_weights(path: Path, variant: str | None = None, use_averages: bool = False) -> Source:
    """Find out what is where in a file or folder.

    Where a file `checkpoints.sha256` lies beside a file and names it, its SHA-256 is compared first.
    MindSpore's published files have the first eight digits of theirs in their name
    (sd_v2_base-57526ee4.ckpt): a warning says where they differ.

    Args:
        variant: of the files in a folder: fp16, bf16, non_ema.
        use_averages: of a folder: `unet_ema/` instead of `unet/`, where it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no weight file, damaged, or not what was written.
    """
    if path.is_dir():
        return _open_folder(path, variant, use_averages)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path}: {absent(path)}; see models/README.md for where to get it"
        )
    compare_digest(path)
    arrays = read_file(path)
    return Source(path, [path], arrays, global_step=getattr(arrays, "global_step", None))


def read_file(path: Path) -> Arrays:
    """Name to array of a single file of whatever format. Raises ValueError."""
    with open(path, "rb") as file:
        head = file.read(512)
    is_web_page = head.lstrip()[:2] == b'{"'
    # first, since its first bytes are a number, which may look like the beginning of anything
    may_be_safetensors = is_safetensors(path) and not is_web_page
    if not may_be_safetensors and (reason := _what_else(head)):
        raise ValueError(f"{path}: {reason}")
    try:
        if may_be_safetensors:
            return read_safetensors(path)
        if not is_torch_file(head):
            return read_ckpt(path)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if "file not fully covered" in reason:
            reason = "it is not as long as its header says"
        advice = "" if "not read" in reason or "not supported" in reason else "; get it again"
        raise ValueError(f"{path}: not a readable weight file ({reason}){advice}") from None
    return read_torch_file(path)


def _what_else(head: bytes) -> str | None:
    """What a file that begins so is, if it has no weights."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "is empty: the download was cut off; get it again"
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d+)", head)
        much = f" of {int(size[1]) / 1e9:.2f} GB" if size else ""
        return (
            f"is a Git-LFS pointer in the place of a file{much}: run `git lfs pull` in its folder, or "
            f"download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b'{"error"')):
        return (
            "is a web page, not a weight file: the site answered with an error or wants you to log in or to "
            "accept a licence; download it again in a browser"
        )
    if re.match(rb'.{8}\{"[^"]+": ?\{', head, re.DOTALL):
        return "is the beginning of a safetensors file: the download was cut off; get it again"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, whose numbers are quantized: get the model as safetensors"
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and not is_torch_file(head):
        return "is a bare Python pickle, not a weight file of PyTorch: not run; get the model as safetensors"
    return None


def compare_digest(path: Path) -> None:
    """Raises ValueError where a file is not what was recorded of it; a warning where its name says other."""
    recorded = recorded_digests(path.parent).get(path.name)
    if recorded and sha256_of(path) != recorded:
        raise ValueError(
            f"{path}: not what was written, its SHA-256 differs from the one in {DIGESTS}; it is "
            f"damaged, or was replaced: if you did that, remove its line there"
        )
    published = re.search(r"-(?!\d{8})([0-9a-f]{8})\.ckpt$", path.name)  # eight decimal digits are a date
    if published and not recorded and not (digest := sha256_of(path)).startswith(published[1]):
        logger.warning(
            "%s: its SHA-256 begins with %s, not with %s as its name says: damaged, changed, or another "
            "file; if in doubt, get it again",
            path, digest[:8], published[1],
        )  # fmt: skip


def _open_folder(path: Path, variant: str | None, use_averages: bool) -> Source:
    if not is_diffusers_folder(path):
        raise FileNotFoundError(
            f"{path}: a folder without model_index.json or unet/, so none of diffusers; give a weight file, "
            f"or a folder that has them"
        )
    recorded, files, opened = recorded_digests(path.parent), [], []
    for part in PARTS:
        folder = path / part
        if part == "unet" and use_averages and not (folder := path / "unet_ema").is_dir():
            raise ValueError(f"{path}: has no averaged weights (unet_ema/): leave --use_ema_weights out")
        for file in _files_of(folder, PARTS[part], variant):
            digest = recorded.get(str(file.relative_to(path.parent)))
            if digest and sha256_of(file) != digest:
                raise ValueError(f"{file}: not what was written, its SHA-256 differs from {DIGESTS}")
            files.append(file)
            opened.append((f"{part}/", read_file(file)))
    configs = {part: read_json(path / part / "config.json") for part in PARTS}
    configs["scheduler"] = read_json(path / "scheduler/scheduler_config.json")
    for name in ("model_index", "tokenizer/special_tokens_map", "tokenizer/tokenizer_config"):
        if (path / f"{name}.json").is_file():
            configs[name] = read_json(path / f"{name}.json")
    return Source(path, files, Joined(opened), configs)


def _files_of(folder: Path, base: str, variant: str | None) -> list[Path]:
    """The weight file of a part, or its shards; safetensors before PyTorch's .bin."""
    bases = f"(?:{base}|pytorch_{base})" if base == "model" else base
    single = re.compile(rf"{bases}(?:\.(\w+))?\.(safetensors|bin)")
    index = re.compile(rf"{bases}(?:\.(\w+))?\.(safetensors|bin)(?:\.(\w+))?\.index(?:\.(\w+))?\.json")
    found: dict[str, dict[tuple, Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := single.fullmatch(path.name):
            found.setdefault(match[1] or "", {})[match[2] == "bin", 0] = path
        elif match := index.fullmatch(path.name):
            name = match[1] or match[3] or match[4] or ""
            found.setdefault(name, {})[match[2] == "bin", 1] = path
    if not found:
        raise FileNotFoundError(
            f"{folder}: no weights ({base}.safetensors, or .bin); it must be in the layout of diffusers"
        )
    names = sorted(found)
    chosen = variant if variant in found else "" if "" in found else names[0]
    if chosen != variant and (variant or (chosen and len(names) > 1)):
        if chosen and len(names) > 1:
            raise ValueError(f"{folder}: has the variants {', '.join(names)}: choose one with --variant")
        logger.warning("%s: has no variant %s; taken: %s", folder, variant, chosen or "the plain weights")
    (_, is_index), path = min(found[chosen].items())
    return _shards(path) if is_index else [path]


def _shards(index: Path) -> list[Path]:
    files = read_json(index).get("weight_map")
    names = set(files.values()) if isinstance(files, dict) else None
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{index}: not an index of shards")
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise FileNotFoundError(f"{index.parent / missing[0]}: no such file, which {index.name} names")
    return [index.parent / name for name in sorted(names)]


def read_json(path: Path) -> dict:
    """A JSON file's top-level mapping. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the folder must be in the layout of diffusers")
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"larger than {LARGEST_JSON} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold `key: value` pairs, got a {type(content).__name__}")
    return content
