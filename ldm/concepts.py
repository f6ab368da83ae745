"""The subjects of a training: one, of the options, or several, of a file. Must not import mindspore."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.config import read_values
from ldm.values import ConfigError, nearest, parse_value, require_file

# of other programs that read such files, and of no meaning here
IGNORED = ("class_negative_prompt", "save_sample_prompt", "save_sample_negative_prompt", "instance_token",
           "class_token")  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """A subject and its class. Field names are the keys of a file of concepts, and options of the command."""

    instance_data_dir: str | None = None
    instance_prompt: str | None = None
    class_data_dir: str | None = None
    class_prompt: str | None = None
    num_class_images: int = 200
    train_data_repeats: int = 40

    def missing(self, has_prior: bool) -> list[str]:
        """Which of the keys that a training needs are not given."""
        names = SUBJECT_KEYS[:4] if has_prior else SUBJECT_KEYS[:2]
        return [name for name in names if not (getattr(self, name) or "").strip()]

    def facts(self) -> dict:
        """What a training's result follows from, but for the images."""
        return {name: getattr(self, name) for name in SUBJECT_KEYS if not name.endswith("_dir")}


SUBJECT_KEYS = tuple(spec.name for spec in dataclasses.fields(Concept))


def read_concepts(path: Path, num_class_images: int, train_data_repeats: int) -> tuple[Concept, ...]:
    """The subjects in a JSON or YAML list, with the keys of ShivamShrirao's DreamBooth.

    Args:
        num_class_images, train_data_repeats: of those that do not say.

    Raises:
        ConfigError: it cannot be read, or two subjects contradict each other.
    """
    require_file(path, "concepts", "give a JSON or YAML list of subjects")
    listed = read_values(path)
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise ConfigError(f"{path}: must be a list of subjects, each with {', '.join(SUBJECT_KEYS[:4])}")
    defaults = {"num_class_images": num_class_images, "train_data_repeats": train_data_repeats}
    concepts = tuple(_concept(entry, f"{path}: subject {n}", defaults) for n, entry in enumerate(listed, 1))
    prompts, folders = {}, {}
    for concept in concepts:
        before = folders.setdefault(_place(concept.instance_data_dir), concept)
        if before is not concept and concept.instance_data_dir:
            raise ConfigError(f"{path}: {concept.instance_data_dir} is given for two subjects")
        before = prompts.setdefault(_place(concept.class_data_dir), concept.class_prompt)
        if concept.class_data_dir and before != concept.class_prompt:
            raise ConfigError(
                f"{path}: class_data_dir {concept.class_data_dir} is given for {before!r} and for "
                f"{concept.class_prompt!r}: give each class a folder of its own"
            )
    return concepts


def classes_of(subjects: Sequence[Concept]) -> tuple[list[Concept], list[int]]:
    """The classes, each once, with as many images as the subject that asks for the most; and the number of
    each subject's class among them.
    """
    classes: dict[Path | None, Concept] = {}
    for concept in subjects:
        place = _place(concept.class_data_dir)
        before = classes.setdefault(place, concept)
        if concept.num_class_images > before.num_class_images:
            classes[place] = concept
    places = list(classes)
    return list(classes.values()), [places.index(_place(concept.class_data_dir)) for concept in subjects]


def _place(folder: str | None) -> Path | None:
    return Path(folder).resolve() if folder else None


def _concept(entry: dict, where: str, defaults: dict) -> Concept:
    values = dict(defaults)
    for spec in dataclasses.fields(Concept):
        if spec.name not in entry:
            continue
        values[spec.name] = value = parse_value(entry[spec.name], spec.type, f"{where}: {spec.name}")
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{where}: {spec.name} must be 1 or more, got {value}")
        if spec.name.endswith("_dir") and value:
            values[spec.name] = str(Path(value).expanduser())
    for key in entry:
        if key not in (*SUBJECT_KEYS, *IGNORED):
            raise ConfigError(f"{where}: unknown key {key}{nearest(str(key), SUBJECT_KEYS)}")
    return Concept(**values)
