"""What text_to_image.py is to draw: its prompts, image by image, and in batches. No mindspore."""

import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.command_line import collect, make_parser
from ldm.fields import SAMPLER_NAMES
from ldm.sample_options import SampleOptions
from ldm.text_files import read_lines
from ldm.values import ConfigError, nearest

OF_A_LINE = (
    "negative_prompt", "seed", "sampler", "sampling_steps", "guidance_scale", "ddim_eta", "H", "W",
    "init_image", "strength",
)  # fmt: skip
FIRST_FLAG = re.compile(r"\s+(?=--\w)")


@dataclass(frozen=True)
class Drawing:
    """One image to generate.

    Attributes:
        number: of its noise, which follows from the seed and this.
        options: how to draw it, with those of its line.
    """

    prompt: str
    negative_prompt: str
    number: int
    options: SampleOptions

    @property
    def settings(self) -> tuple:
        """What the images of a batch have in common."""
        return tuple(
            getattr(self.options, name) for name in OF_A_LINE if name not in ("negative_prompt", "seed")
        )


@dataclass(frozen=True)
class Line:
    """A prompt, and the options that its images are drawn with."""

    prompt: str
    negative_prompt: str
    options: SampleOptions
    has_own_seed: bool = False


def read_prompts(options: SampleOptions) -> list[Line]:
    """From the flags or the files, line n with line n; a line without a prompt is left out.

    Raises:
        ConfigError: the files have no prompts, do not fit together, or an option of a line is not one.
    """
    prompts, negatives = [options.prompt], [options.negative_prompt]
    if options.data_path:
        prompts = read_lines(Path(options.data_path))
        if not any(prompts):
            raise ConfigError(f"data_path {options.data_path} must hold one prompt per line, got none")
        while not prompts[-1]:
            prompts.pop()
    if options.negative_data_path:
        negatives = read_lines(Path(options.negative_data_path))
        while len(negatives) > 1 and len(negatives) != len(prompts) and not negatives[-1]:
            negatives.pop()  # blank lines at the end
    if len(negatives) not in (1, len(prompts)):
        required = f"1 line or {len(prompts)} (line n belongs to line n of the prompts)"
        raise ConfigError(f"negative_data_path must have {required}, got {len(negatives)}")
    pairs = zip(prompts, negatives * (len(prompts) // len(negatives)))
    if not options.data_path:
        return [Line(prompt, negative, options) for prompt, negative in pairs]
    numbered = enumerate(pairs, 1)
    return [_line(number, *pair, options) for number, pair in numbered if pair[0]]


def _line(number: int, text: str, negative: str, options: SampleOptions) -> Line:
    """A line of a file: a prompt, and perhaps options behind it. Raises ConfigError."""
    prompt, *rest = FIRST_FLAG.split(f" {text}", maxsplit=1)
    if not rest:
        return Line(text, negative, options)
    try:
        given = _options_in(rest[0])
        if "sampler" in given:  # a flag of the command, say --ddim, is for the other lines
            given |= {name: False for name in SAMPLER_NAMES if hasattr(options, name)}
        its = replace(options, **given)
        its.check()
    except ValueError as error:
        raise ConfigError(f"{options.data_path}: line {number}: {error}") from None
    return Line(prompt.strip(), given.get("negative_prompt", negative), its, "seed" in given)


def _options_in(text: str) -> dict:
    """Flags as a dictionary. Raises ValueError where they are not those of a line."""
    parser = make_parser(SampleOptions)
    parser.error = _refuse
    words = shlex.split(text)
    if {"-h", "--help"} & set(words):
        _refuse("--help is no option of a line")
    known, unknown = parser.parse_known_args(words)
    given = collect(SampleOptions, vars(known), "option")
    for name in [*(word for word in unknown if word.startswith("-")), *unknown, *given]:
        if name not in OF_A_LINE:
            flags = [f"--{own}" for own in OF_A_LINE]
            hint = nearest(name if name.startswith("-") else f"--{name}", flags)
            _refuse(f"{name} is no option of a line{hint}; these are: {', '.join(flags)}")
    return given


def _refuse(message: str) -> None:
    raise ConfigError(message)


def drawings_of(lines: Sequence[Line], options: SampleOptions) -> list[Drawing]:
    """All images in the order of their files: prompt by prompt, for programs that judge images give each a
    block of the numbered files.

    Numbers go on from line to line, but for lines with a seed of their own: what such a one draws does not
    depend on the others.
    """
    count, found = options.n_samples, []
    for row, line in enumerate(lines):
        for round_ in range(options.n_iter):
            first = round_ * count if line.has_own_seed else (round_ * len(lines) + row) * count
            first = options.image_number + (0 if options.fixed_code else first)
            found += [
                Drawing(line.prompt, line.negative_prompt, first + place, line.options)
                for place in range(count)
            ]
    return found


def batches_of(
    drawings: Sequence[Drawing], size: int, chunks: Callable[[Drawing], int] = lambda _: 1
) -> Iterator[list[Drawing]]:
    """Images that can be drawn together, at most `size` at a time, in their order.

    Args:
        chunks: how many parts the text of one has: a long prompt would make others of its batch long.
    """
    for _, alike in itertools.groupby(drawings, lambda drawing: (drawing.settings, chunks(drawing))):
        group = list(alike)
        for start in range(0, len(group), size):
            yield group[start : start + size]
