"""What an image was drawn with, as its file carries it: for AUTOMATIC1111 and the many programs that read its
`parameters`, and as JSON, from which the command follows that draws it again. Must not import mindspore.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config import find_configuration
from ldm.drawings import Drawing
from ldm.fields import beside_program
from ldm.files import fingerprint, sha256_of
from ldm.sample_options import SampleOptions
from ldm.versions import PROGRAM_VERSION

PARAMETERS, OWN = "parameters", "dreambooth"  # the texts' names in a PNG
PROGRAM = "dreambooth-mindspore"
SAMPLERS_THERE = {
    "plms": "PLMS", "ddim": "DDIM", "dpm_solver": "DPM-Solver", "dpm_solver_pp": "DPM++ 2M",
    "uni_pc": "UniPC",
}  # fmt: skip
ALWAYS = ("seed", "image_number", "batch_size", "H", "W", "sampler", "sampling_steps", "guidance_scale")
WHERE_THEY_ACT = (
    "version", "variant", "use_ema_weights", "zero_terminal_snr", "prompt_weights",
    "support_long_prompts", "timestep_spacing", "guidance_rescale", "ddim_eta", "strength", "precision",
    "device", "force_precision", "flash_attention", "deterministic", "mode",
)  # fmt: skip
LEFT_OPEN = ("device", "precision")  # auto would do where it is the same, but elsewhere be another


@dataclass(frozen=True)
class File:
    """A file that an image follows from. Its folder is nobody's business."""

    name: str
    sha256: str
    weight: float | None = None

    @classmethod
    def of(cls, path: Path, files: Sequence[Path] = (), weight: float | None = None) -> "File":
        """Of a file; or a folder, of which `files` are read."""
        digest = sha256_of(path) if path.is_file() else fingerprint(files)
        name = path.resolve().name if path.name in ("", "..") else path.name
        return cls(name.encode(errors="replace").decode(), digest, weight)

    def facts(self) -> dict:
        return {"name": self.name, "sha256": self.sha256} | (
            {} if self.weight is None else {"weight": self.weight}
        )


@dataclass(frozen=True)
class Origin:
    """The files that a drawing follows from."""

    checkpoint: File
    loras: Sequence[File] = ()
    embeddings: Sequence[File] = ()


def texts_of(drawing: Drawing, batch_size: int, origin: Origin, mindspore: str) -> dict[str, str]:
    """The texts of an image's file, the one for AUTOMATIC1111 first."""
    options, image = drawing.options, None
    if options.init_image:
        image = File.of(Path(options.init_image))
    return {
        PARAMETERS: _parameters(drawing, origin),
        OWN: json.dumps(_facts(drawing, batch_size, origin, image) | {"mindspore": mindspore}),
    }


def _facts(drawing: Drawing, batch_size: int, origin: Origin, image: File | None) -> dict:
    options = drawing.options
    # SD_VERSION is a default of this process alone
    defaults = {spec.name: spec.default for spec in dataclasses.fields(SampleOptions)}
    values = {name: getattr(options, name) for name in (*ALWAYS, *WHERE_THEY_ACT)}
    values |= {"sampler": options.sampler_name, "image_number": drawing.number, "batch_size": batch_size}
    used = {
        name: value
        for name, value in values.items()
        if name in (*ALWAYS, *LEFT_OPEN) or value != defaults[name]
    }
    config = None
    if options.config != "auto":
        config = File.of(find_configuration(options.config))
    found = {
        "program": f"{PROGRAM} {PROGRAM_VERSION}",
        "prompt": drawing.prompt,
        "negative_prompt": drawing.negative_prompt,
        "options": used,
        "checkpoint": origin.checkpoint.facts(),
        "loras": [its.facts() for its in origin.loras],
        "embeddings": [its.facts() for its in origin.embeddings],
        "init_image": image and image.facts(),
        "config": config and config.facts(),
    }
    return {name: value for name, value in found.items() if value not in ([], None)}


def _parameters(drawing: Drawing, origin: Origin) -> str:
    """As AUTOMATIC1111's create_infotext writes them. Its noise is another: its seed gives another image."""
    options, checkpoint = drawing.options, origin.checkpoint
    tags = "".join(f" <lora:{Path(its.name).stem}:{its.weight:g}>" for its in origin.loras)
    lines = [drawing.prompt + tags]
    if drawing.negative_prompt:
        lines.append(f"Negative prompt: {drawing.negative_prompt}")
    fields = {
        "Steps": options.sampling_steps,
        "Sampler": SAMPLERS_THERE[options.sampler_name],
        "CFG scale": f"{options.guidance_scale:g}",
        "Seed": options.seed,
        "Image number": drawing.number,
        "Size": f"{options.W}x{options.H}",
        "Model hash": checkpoint.sha256[:10],
        "Model": Path(checkpoint.name).stem,
    }
    if options.init_image:
        fields["Denoising strength"] = f"{options.strength:g}"
    if origin.loras:
        hashes = ", ".join(f"{Path(its.name).stem}: {its.sha256[:10]}" for its in origin.loras)
        fields["Lora hashes"] = f'"{hashes}"'
    fields["Version"] = f"{PROGRAM} {PROGRAM_VERSION}"
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in fields.items())])


def facts_of(texts: Mapping[str, str]) -> dict:
    """The JSON of an image's file. Raises ValueError where there is none that this program wrote."""
    try:
        facts = json.loads(texts.get(OWN, ""))
        if not str(facts["program"]).startswith(PROGRAM) or not isinstance(facts["options"], dict):
            raise ValueError
        return facts
    except (ValueError, KeyError, TypeError):
        raise ValueError("holds nothing that text_to_image.py has written") from None


def files_of(facts: Mapping) -> list[Mapping]:
    """The files that the image follows from: name and sha256 of each."""
    return [
        facts["checkpoint"], *facts.get("loras", []), *facts.get("embeddings", []),
        *filter(None, [facts.get("init_image"), facts.get("config")]),
    ]  # fmt: skip


def command_of(facts: Mapping, found: Mapping[str, Path]) -> str:
    """The command that draws an image again: the same, bit by bit, on the same machine and versions.

    Args:
        facts: the JSON of its file.
        found: where files lie now, by SHA-256; of others the name stands there.
    """

    def path(file: Mapping) -> str:
        where = str(found.get(file["sha256"], file["name"]))
        return f"{where}:{file['weight']:g}" if "weight" in file else where

    flags = [f"--prompt={facts['prompt']}"]
    if facts.get("negative_prompt"):
        flags.append(f"--negative_prompt={facts['negative_prompt']}")
    flags.append(f"--ckpt_path={path(facts['checkpoint'])}")
    for name, option in (("loras", "--lora_ckpt_path"), ("embeddings", "--embedding_path")):
        if facts.get(name):
            flags += [option, *map(path, facts[name])]
    if facts.get("init_image"):
        flags.append(f"--init_image={path(facts['init_image'])}")
    if facts.get("config"):
        flags.append(f"--config={path(facts['config'])}")
    flags += [f"--{name}={value}" for name, value in facts["options"].items()]
    program = beside_program("text_to_image.py")
    return f"python {program} {shlex.join([*flags, '--n_iter=1', '--n_samples=1'])}"
