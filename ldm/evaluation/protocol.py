"""DreamBooth's protocol (Ruiz et al. 2022, sections 4.1 to 4.3): what is drawn, and how it is scored.

Its figures depend on the networks that judge, on what is cut from an image, and on the prompts of CLIP-T:
they compare models that were judged alike, and the paper's only about.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldm.config import read_mapping
from ldm.files import short_names
from ldm.subjects import load_instance_images
from ldm.text_files import read_lines
from ldm.values import ConfigError, absent, nearest

SCORES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "pres": "PRES", "div": "DIV"}
LOWER_IS_BETTER = ("pres",)
# tables 1 and 3 of the paper; PRES and DIV of 15 of its 30 subjects
PAPER = {
    "real images": {"dino": 0.774, "clip_i": 0.885},
    "DreamBooth, Stable Diffusion": {"dino": 0.668, "clip_i": 0.803, "clip_t": 0.305},
    "DreamBooth, Imagen": {"dino": 0.696, "clip_i": 0.812, "clip_t": 0.306, "pres": 0.493, "div": 0.391},
    "Textual Inversion, Stable Diffusion": {"dino": 0.569, "clip_i": 0.780, "clip_t": 0.255},
}
LISTS = {"objects": "configs/prompts_objects.txt", "living": "configs/prompts_living.txt"}
KEYS = ("name", "instance_data_dir", "subject", "class_word", "prompts", "ckpt_path")


@dataclass(frozen=True)
class Case:
    """A subject that was learned.

    Attributes:
        images: of it.
        subject: how prompts call it, "sks dog"; `class_word` is "dog".
        prompts: with {} for it.
        checkpoints: of models that have learned it, by label.
    """

    name: str
    images: list[Path]
    subject: str
    class_word: str
    prompts: list[str]
    checkpoints: dict[str, Path] = field(default_factory=dict)


def read_templates(given: str, program: Path) -> list[str]:
    """Prompts with {} for the subject: a list of the paper's, or a file of the user's.

    Raises ConfigError.
    """
    path = program / LISTS[given] if given in LISTS else Path(given)
    if not path.is_file():
        raise ConfigError(f"prompts must be {', '.join(LISTS)} or a file, got {given}: {absent(path)}")
    found = [line for line in read_lines(path) if line]
    for line in found:
        if line.count("{}") != 1:
            raise ConfigError(f"{path}: each line must have {{}} for the subject, got {line!r}")
    if not found:
        raise ConfigError(f"{path}: has no prompts")
    return found


def case_of(values: Mapping, program: Path, where: str) -> Case:
    """A subject from a file's or the command line's values. Raises ConfigError where one is missing, and
    as `load_instance_images` does.
    """
    for key in values:
        if key not in KEYS:
            raise ConfigError(f"{where}: unknown key {key}{nearest(str(key), KEYS)}")
    for key in ("instance_data_dir", "subject", "class_word", "ckpt_path"):
        if not values.get(key):
            raise ConfigError(f"{where}: {key} is missing")
    folder, class_word, subject = Path(values["instance_data_dir"]), values["class_word"], values["subject"]
    name = values.get("name") or folder.resolve().name
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"{where}: name must be one to call a folder by, got {name!r}")
    if class_word not in subject:
        raise ConfigError(f"{where}: subject {subject!r} must have the class_word {class_word!r} in it")
    if not folder.is_dir():
        raise ConfigError(f"{where}: instance_data_dir {folder}: {absent(folder, 'no such folder')}")
    images = load_instance_images(folder)
    given = values["ckpt_path"]
    paths = [Path(path) for path in ([given] if isinstance(given, str) else given)]
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{where}: ckpt_path {path}: {absent(path)}")
    templates = read_templates(str(values.get("prompts") or "objects"), program)
    return Case(name, images, subject, class_word, templates, labels_of(paths))


def read_cases(path: Path, program: Path) -> list[Case]:
    """Subjects of a JSON or YAML file: a list `subjects` of mappings, each with KEYS. Raises ConfigError."""
    entries = read_mapping(path).get("subjects")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path} must have a list `subjects` of mappings with {', '.join(KEYS)}")
    cases = [case_of(entry, program, f"{path}: subject {n}") for n, entry in enumerate(entries, 1)]
    if len({case.name for case in cases}) < len(cases):
        raise ConfigError(f"{path}: two subjects have one name: give each a `name`")
    return cases


def labels_of(paths: Sequence[Path]) -> dict[str, Path]:
    """A short name for each: the file's, with its folder's before it where files of several have one."""
    labels = short_names(paths)
    if len(set(labels)) < len(labels):
        raise ConfigError("ckpt_path: two checkpoints have the same name: rename one's folder")
    return dict(zip(labels, paths))


def similarity(images: np.ndarray, others: np.ndarray) -> float:
    """Mean cosine over all pairs of unit vectors (N, D) and (M, D)."""
    return float((images.astype(np.float64) @ others.astype(np.float64).T).mean())


def among(images: np.ndarray) -> float:
    """Mean cosine over pairs of different unit vectors (N, D); of one alone not a number."""
    count = len(images)
    if count < 2:
        return float("nan")
    values = images.astype(np.float64) @ images.astype(np.float64).T
    return float((values.sum() - np.trace(values)) / (count * (count - 1)))


def pairs_of(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each score that all rows have."""
    shared = [name for name in SCORES if rows and all(name in row for row in rows)]
    return {name: float(np.mean([row[name] for row in rows])) for name in shared}


def rows_of(results: Mapping[str, Mapping]) -> dict[str, dict[str, float]]:
    """Means over subjects, of their own images and of each checkpoint; checkpoints of other names belong
    together by their places.
    """
    places: dict[int, list[tuple[str, dict]]] = {}
    for of_subject in results.values():
        for place, pair in enumerate(of_subject.items()):
            places.setdefault(place, []).append(pair)
    found = {}
    for place, pairs in places.items():
        if len(pairs) == len(results):
            names = {label for label, _ in pairs}
            found[names.pop() if len(names) == 1 else f"checkpoint {place}"] = mean_of(
                [its for _, its in pairs]
            )
    return found


def finite(values):
    """As JSON has it: what is not a number is null."""
    if isinstance(values, Mapping):
        return {name: finite(its) for name, its in values.items()}
    return None if isinstance(values, float) and values != values else values


def table(rows: Mapping[str, Mapping[str, float]], marked: Sequence[str] = ()) -> str:
    """Scores as a Markdown table; of several `marked` rows the best of each is in bold."""
    shown = [name for name in SCORES if any(name in row for row in rows.values())]
    best = {}
    for name in shown:
        values = [rows[label][name] for label in marked if name in rows[label]]
        if len(values) > 1:
            best[name] = min(values) if name in LOWER_IS_BETTER else max(values)

    def cell(label: str, name: str) -> str:
        value = rows[label].get(name)
        if value is None or value != value:
            return "–"
        is_best = label in marked and best.get(name) == value
        return f"**{value:.3f}**" if is_best else f"{value:.3f}"

    arrows = {name: f"{SCORES[name]} {'↓' if name in LOWER_IS_BETTER else '↑'}" for name in shown}
    lines = ["| | " + " | ".join(arrows.values()) + " |", "|---" * (len(shown) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(cell(label, name) for name in shown) + " |" for label in rows]
    return "\n".join(lines)
