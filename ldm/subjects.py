"""What a training learns from: the images of each subject and of each class, with their prompts and masks.
Knows no network.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.captions import prompts_of
from ldm.concepts import classes_of
from ldm.image_files import FORMATS, MASK, list_images, mask_of, require_usable, where_images_lie
from ldm.options import TrainOptions
from ldm.tokenizer import token_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """A training image, its prompt, and whether a mask says where in it the subject is."""

    path: Path
    prompt: str
    has_mask: bool = False


@dataclass(frozen=True)
class Subject:
    """What is learned from: images, how often each is used per epoch, and the number of the class. Its length
    is that of an epoch, in samples.
    """

    pictures: list[Picture]
    repeats: int
    class_number: int = 0

    def __len__(self) -> int:
        return len(self.pictures) * self.repeats


def load_instance_images(folder: Path) -> list[Path]:
    """The images of a folder, each of them opened once.

    Raises:
        ValueError: the folder has none, or one is damaged, too small or too narrow.
    """
    paths = list_images(folder)
    if not paths:
        where = where_images_lie(folder) or f"put 3-5 of the subject there ({', '.join(FORMATS)})"
        raise ValueError(f"instance_data_dir {folder}: no images found; {where}")
    for path in paths:
        require_usable(path)
    return paths


def load_subjects(options: TrainOptions) -> list[Subject]:
    """The subjects that the options name, with their images and prompts.

    Raises:
        ValueError: as `load_instance_images`; or captions or masks are not as asked for.
    """
    if options.concepts:
        text = "%s: %d subjects; what other options say of folders and prompts is not used"
        logger.info(text, options.concepts, len(options.subjects))
    subjects = []
    for concept, class_number in zip(options.subjects, classes_of(options.subjects)[1]):
        folder = Path(concept.instance_data_dir)
        paths = load_instance_images(folder)
        prompts = prompts_of(folder, paths, concept.instance_prompt, options.captions)
        masked = [options.masked_loss and mask_of(path) is not None for path in paths]
        pictures = [Picture(*each) for each in zip(paths, prompts, masked)]
        subjects.append(Subject(pictures, concept.train_data_repeats, class_number))
    every = [picture for subject in subjects for picture in subject.pictures]
    if options.masked_loss and options.image_fit == "crop" and not any(its.has_mask for its in every):
        raise ValueError(
            f"masked_loss: none of {len(every)} images is transparent or has a NAME{MASK} beside it"
        )
    if options.train_token is not None:
        token_of(options.train_token, [picture.prompt for picture in every])
    return subjects


def with_prompts(options: TrainOptions, class_images: Sequence[Sequence[Path]]) -> list[list[Picture]]:
    """The images of each class, with its prompt or captions of their own."""
    found = []
    for concept, paths in zip(classes_of(options.subjects)[0], class_images):
        folder, prompt = Path(concept.class_data_dir), concept.class_prompt
        prompts = prompts_of(folder, paths, prompt, options.captions, is_class=True)
        found.append([Picture(path, prompt) for path, prompt in zip(paths, prompts)])
    return found
