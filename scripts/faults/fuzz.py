"""Damage small files of every kind that is read, at random, and see that each is read or refused in words.

    python scripts/faults/fuzz.py                # 2,000 mutations of each of sixteen kinds of files, a few
    minutes python scripts/faults/fuzz.py --count 100 --seed 1 --kind ckpt

A mutation cuts, flips bits, moves or repeats parts, or puts extreme numbers where lengths may be. It passes
if the file is read, or refused by this project's own error of one line, within 10 s and with no more memory
than twice the file and 200 MB. "Other values" are damage to the values alone: the .ckpt and safetensors
formats have no checksum of their own, checkpoints.sha256 beside those that are trained here has;
configurations and pictures have none. Prints a table; exit status 1 where a mutation did not pass, whose file
is kept.
"""

import argparse
import contextlib
import io
import json
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CONFIG = ROOT / "configs/train_dreambooth_tiny.yaml"
SECONDS, MEMORY = 10, 200 * 2**20
EXTREMES = [
    b"\0",
    b"\xff",
    b"\x7f" + b"\xff" * 7,
    b"\xff" * 8,
    b"\x80" * 9 + b"\x01",
    b"\0" * 8,
    b"99999999999",
    b"-1",
    b"1e999",
    b'"',
    b"[" * 2000,
]
OUTCOMES = ("read, the same", "read, other values", "refused", "FAILED")


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
    save_file(arrays, path, {"format": "pt", "lora_adapter_metadata": scales})


def read(kind: str, path: Path):
    """What the program makes of a file, as something that can be compared.

    Raises ValueError, its own error.
    """
    from ldm.command_line import parse_options
    from ldm.config import ConfigError, read_model_config
    from ldm.images import read_image
    from ldm.options import TrainOptions
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


NEEDED = [
    "--pretrained_model_file=tiny_sd_v2.safetensors", f"--instance_data_dir={ROOT / 'examples/penguin'}",
    "--class_data_dir=none",
    "--class_prompt=a dog",
]  # fmt: skip
RUN = "a command was run"
WEIGHT_FILES = ("ckpt", "safetensors", "bfloat16", "torch", "lightning", "command", "legacy")
KINDS = (*WEIGHT_FILES, "lora", "folder", "json", "yaml", "png", "jpeg", "webp", "gif", "tiff")


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to three kinds of damage."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 16, 64))
        how = rng.randrange(6)
        if how == 0:
            del data[at:]
        elif how == 1:
            for _ in range(rng.randint(1, 8)):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == 2:
            start = rng.randrange(len(data) + 1)
            data[at : at + length * rng.randrange(2)] = data[start : start + length]
        elif how == 3:
            extreme = rng.choice(EXTREMES)
            data[at : at + len(extreme)] = extreme
        elif how == 4:
            del data[at : at + length]
        else:
            data[at:at] = rng.randbytes(length)
    return bytes(data)


def address_space() -> int:
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )


class TooSlow(BaseException):
    pass


def on_alarm(*_) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def work(kind: str, seed: int, first: int, count: int, folder: Path) -> None:
    """Try mutations, printing an outcome a line: in a process of its own, which may crash."""
    path = folder / f"sound.{kind}"
    make(kind, path)
    sound, expected = path.read_bytes(), read(kind, path) if kind != "command" else None
    signal.signal(signal.SIGALRM, on_alarm)
    damaged = folder / f"damaged.{kind}"
    for number in range(first, count):
        data = mutate(sound, random.Random(f"{seed} {kind} {number}"))
        damaged.write_bytes(data)
        print(number, end=" ", flush=True)
        limit = address_space() + 2 * len(data) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        signal.alarm(SECONDS)
        try:
            outcome = OUTCOMES[0] if read(kind, damaged) == expected else OUTCOMES[1]
        except ValueError as error:
            words = str(error)
            own = words.strip() and "Traceback" not in words and "\n" not in words.strip()
            outcome = OUTCOMES[2] if own else f"FAILED {words!r}"
        except BaseException as error:
            outcome = f"FAILED {type(error).__name__}: {error}"
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        outcome = f"FAILED {RUN}" if (folder / RUN).exists() else outcome
        print(" ".join(outcome.split()), flush=True)


def fuzz(kind: str, seed: int, count: int, folder: Path) -> tuple[Counter, list[str]]:
    """Outcomes and their number, and what failed."""
    outcomes, failures, first = Counter(), [], 0
    while first < count:
        command = [sys.executable, __file__, "--work", kind, str(seed), str(first), str(count), str(folder)]
        errors = open(folder / "errors.txt", "w+")
        process, before = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True), first
        for line in tqdm(process.stdout, kind, total=count - first, leave=False, disable=None):
            number, _, outcome = line.strip().partition(" ")
            first = int(number) + 1
            outcomes[outcome.split(" ")[0] if outcome.startswith("FAILED") else outcome or "FAILED"] += 1
            if outcome.startswith("FAILED") or not outcome:
                kept = folder / f"failed-{number}.{kind}"
                (folder / f"damaged.{kind}").replace(kept)
                failures.append(f"{kept}: {outcome or 'the process crashed'}")
        if process.wait() and first == before:  # it did not come to its first mutation
            errors.seek(0)
            sys.exit(errors.read())
    return outcomes, failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="mutations of each kind [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations [%(default)s]")
    parser.add_argument(
        "--kind", choices=KINDS, action="append", help="only this one; may be given several times"
    )
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        kind, seed, first, count, folder = options.work
        work(kind, int(seed), int(first), int(count), Path(folder))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"| file | mutations | {' | '.join(OUTCOMES)} |\n|---|---|{'---|' * len(OUTCOMES)}")
    failures = []
    for kind in options.kind or KINDS:
        outcomes, failed = fuzz(kind, options.seed, options.count, folder)
        failures += failed
        print(
            f"| {kind} | {options.count} | {' | '.join(str(outcomes[outcome]) for outcome in OUTCOMES)} |",
            flush=True,
        )
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
