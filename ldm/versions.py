"""The version of this program; those of Stable Diffusion: the configuration of each, and the file that
MindSpore published of it.

Must not import mindspore.
"""

import os
from dataclasses import dataclass

from ldm.config import PROGRAM


@dataclass(frozen=True)
class Version:
    """`model_config` is relative to this program, `file` a name in models/."""

    model_config: str
    file: str


PROGRAM_VERSION = "0.1.0"
V1, BASE = "configs/train_dreambooth_sd_v1.yaml", "configs/train_dreambooth_sd_v2.yaml"
V = "configs/train_dreambooth_sd_v2_768_v.yaml"
VERSIONS = {
    "1.4": Version(V1, "sd-v1-4.ckpt"),  # CompVis's own: MindSpore published none
    "1.5": Version(V1, "sd_v1.5-d0ab7146.ckpt"),
    "2.0": Version(BASE, "sd_v2_base-57526ee4.ckpt"),
    "2.0-v": Version(V, "sd_v2_768_v-e12e3a9b.ckpt"),
    "2.1": Version("configs/train_dreambooth_sd_v2-1.yaml", "sd_v2-1_base-7c8d09ce.ckpt"),
    "2.1-v": Version(V, "sd_v2-1_768_v-061732d1.ckpt"),
}
DEFAULT = "2.0"


def version_from_environment() -> str | None:
    """What SD_VERSION says, which the 2023 example read."""
    return os.environ.get("SD_VERSION") or None


def official_file(version: str | None) -> str:
    """The name of the published checkpoint; of 2.0 where no version is given."""
    return VERSIONS[version or DEFAULT].file


def configurations() -> list[str]:
    """All there are beside the program; where several fit a file, the first that is named is meant."""
    known = [BASE, *(version.model_config for version in VERSIONS.values())]
    there = sorted(str(path.relative_to(PROGRAM)) for path in PROGRAM.glob("configs/*.yaml"))
    return list(dict.fromkeys([*known, *there]))
