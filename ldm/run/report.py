"""`report.html` in a run's folder: what a training learns from, draws, and how it goes, in one file that
needs nothing else. It is made of the files of the run alone.
"""

import base64
import dataclasses
import html
import io
import json
import logging
import math
import re
import shlex
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.concepts import classes_of
from ldm.files import write_text
from ldm.image_files import read_image
from ldm.options import TrainOptions
from ldm.run.charts import chart
from ldm.run.validation import facts_of, grids_in, rows_of
from ldm.subjects import Subject
from ldm.versions import PROGRAM_VERSION

TEMPLATE = Path(__file__).with_name("report.html")
MOST_PICTURES, PICTURE_SIDE = 24, 256  # of the subjects' images, and the side of what is shown of one
MARK = '<meta name="generator" content="dreambooth-mindspore">'  # of a report
LARGEST = 3_500_000  # bytes of validation images, as text
MOST_GRIDS, SMALLEST_SIDE = 40, 64  # of those; the side of one image, where they must become small
MOST_WARNINGS = 20
LOG_LINE = re.compile(r"\S+ \S+ (WARNING|ERROR) (.*)")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Commands:
    """What one does with a run, each as a line for a shell; None: there is nothing yet to do it with."""

    draw: str | None = None
    resume: str | None = None
    convert: str | None = None


class RunReport:
    """The report of a run.

    Args:
        folder: of the run.
        options: as they are used; `given` as they were given.
        subjects: what is learned from.
        epochs, total_updates: of the run.
    """

    def __init__(
        self, folder: Path, options: TrainOptions, given: TrainOptions, subjects: Sequence[Subject],
        epochs: int, total_updates: int,
    ) -> None:  # fmt: skip
        self.folder, self.options, self.given, self.subjects = folder, options, given, subjects
        self.epochs, self.total = epochs, total_updates
        self.pictures: str | None = None  # which stay as they are

    def write(self, state: str, said: str, commands: Commands) -> None:
        """Write it anew. Where that fails a warning is logged: the training has more important files.

        Args:
            state: running, stopped, failed or complete; `said` is the same in words.
        """
        path = self.folder / "report.html"
        try:
            if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
                raise ValueError("a file of that name is there, and is no report")
            text = self.text(state, said, commands)
            write_text(path, text.encode(errors="replace").decode())
        except (OSError, ValueError) as error:
            logger.warning("report.html could not be written: %s", error)

    def text(self, state: str, said: str, commands: Commands) -> str:
        reports = read_reports(self.folder / "metrics.jsonl")
        grids = self._grids()
        prompts = " · ".join(dict.fromkeys(its.instance_prompt or "" for its in self.options.subjects))
        return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=_text(f"{prompts}: {said}"),
            heading=_text(prompts),
            state=state,
            said=_text(said),
            subtitle=_text(self._subtitle()),
            facts=_facts(self._figures(reports)),
            warnings=_warnings(self.folder / "train.log"),
            data=self._data(),
            drawn=_drawn(grids) if grids else _no_grids(),
            charts=_charts(reports),
            commands=_commands(commands),
            options=_table(changed_options(self.given)),
            grids=json.dumps(grids).replace("<", "\\u003c"),
        )

    def _subtitle(self) -> str:
        options = self.options
        what = f"LoRA of rank {options.lora_rank}" if options.use_lora else "all weights"
        return (
            f"DreamBooth of {options.checkpoint.name}, {what}, "
            f"{'with' if options.train_text_encoder else 'without'} text encoder; {options.image_size} x "
            f"{options.image_size} pixels, {options.precision} on {options.device}; MindSpore "
            f"{version('mindspore')}, this program {PROGRAM_VERSION}; written "
            f"{time.strftime('%Y-%m-%d %H:%M')}"
        )

    def _figures(self, reports: Sequence[dict]) -> dict[str, str]:
        """What one wants to know first."""
        if not reports:
            return {"updates": f"0 of {self.total}"}
        last, tail = reports[-1], reports[-max(1, len(reports) // 20) :]
        skipped = sum(its["skipped"] for its in reports)
        found = {
            "updates": f"{last['global_step']} of {self.total}",
            "epoch": f"{last['epoch']} of {self.epochs}",
            "loss lately": f"{np.mean([its['loss'] or np.nan for its in tail]):.4f}",
            "learning rate": f"{last['learning_rate']:.3g}",
            "images per second": f"{last['images_per_second'] or 0:.3g}",
        }
        if last.get("memory_gb"):
            found["memory"] = f"{max(its.get('memory_gb') or 0 for its in reports):.1f} GB at most"
        if skipped or last["loss_scale"] != 1:
            found["updates skipped"] = f"{skipped} (float16 overflows)"
        return found

    def _data(self) -> str:
        options, parts = self.options, []
        for concept, subject in zip(options.subjects, self.subjects):
            count = len(subject.pictures)
            parts.append(
                f"<p><b>{_text(concept.instance_prompt)}</b> <span class=faint>{count} images, each "
                f"{subject.repeats} times per epoch</span></p>"
            )
        if self.pictures is None:
            paths = [picture.path for subject in self.subjects for picture in subject.pictures]
            self.pictures = "".join(map(_picture, paths[:MOST_PICTURES]))
            if len(paths) > MOST_PICTURES:
                self.pictures += f"<p class=faint>and {len(paths) - MOST_PICTURES} more</p>"
        parts.append(f"<div class=pictures>{self.pictures}</div>")
        if options.with_prior_preservation:
            for its in classes_of(options.subjects)[0]:
                count = f"{its.num_class_images} images, weight {options.prior_loss_weight:g}"
                parts.append(
                    f"<p>So that the class is not forgotten: <b>{_text(its.class_prompt)}</b> <span "
                    f"class=faint>{count}</span></p>"
                )
        else:
            note = "Without class images: the class may come to look like the subject."
            parts.append(f"<p class=faint>{note}</p>")
        return "".join(parts)

    def _grids(self) -> list[dict]:
        """The validation images: for each update its label, and for each prompt an image as a URL."""
        every = [(update, path, facts_of(path)) for update, path in grids_in(self.folder / "validation")]
        # of a start with other prompts nothing
        there = [its[:2] for its in every if its[2]["prompts"] == every[-1][2]["prompts"]]
        if len(there) > MOST_GRIDS:
            kept = np.unique(np.linspace(0, len(there) - 1, MOST_GRIDS).round().astype(int))
            there = [there[place] for place in kept]
        side = PICTURE_SIDE
        while True:
            found = [_grid(update, path, side) for update, path in there]
            size = sum(len(row) for grid in found for row in grid["rows"])
            if size <= LARGEST or len(there) <= 2:
                return found
            if side > SMALLEST_SIDE:
                side //= 2
            else:
                there = [*there[:-1:2], there[-1]]


@lru_cache(maxsize=4 * MOST_GRIDS)
def _grid(update: int, path: Path, side: int) -> dict:
    facts, grid = facts_of(path), np.asarray(read_image(path))
    columns = facts["images"]
    rows = []
    for row in rows_of(grid, facts["prompts"]):
        image = Image.fromarray(row)
        factor = min(1.0, side * columns / image.width)
        rows.append(_url(image.resize([max(1, round(edge * factor)) for edge in image.size], Image.LANCZOS)))
    label = "base model" if update == 0 else f"update {update}"
    return {"label": label, "prompts": facts["prompts"], "columns": columns, "rows": rows}


def _url(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, format="WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _picture(path: Path) -> str:
    try:
        image = read_image(path)
    except ValueError:  # it was there when the run began
        return f"<span class=faint>{_text(path.name)}</span>"
    image.thumbnail((4 * PICTURE_SIDE, PICTURE_SIDE), Image.LANCZOS)
    return f'<img src="{_url(image)}" alt="{_text(path.name)}" title="{_text(path.name)}">'


def read_reports(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; what is not finite is None there."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short by a full disk
            continue
    return [line for line in found if isinstance(line, dict) and "global_step" in line]


def changed_options(options: TrainOptions) -> dict[str, str]:
    defaults = TrainOptions()
    pairs = ((spec.name, getattr(options, spec.name)) for spec in dataclasses.fields(options))
    return {name: _as_flag(value) for name, value in pairs if value != getattr(defaults, name)}


def _as_flag(value) -> str:
    return shlex.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _text(text) -> str:
    return html.escape(str(text))


def _facts(figures: dict[str, str]) -> str:
    return "".join(f"<div>{_text(name)}<b>{_text(value)}</b></div>" for name, value in figures.items())


def _warnings(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    said = dict.fromkeys(match[2] for match in map(LOG_LINE.fullmatch, lines) if match)
    items = "".join(f"<li>{_text(line)}</li>" for line in list(said)[-MOST_WARNINGS:])
    return f"<section><h2>Warnings</h2><ul class=warnings>{items}</ul></section>" if items else ""


def _drawn(grids: Sequence[dict]) -> str:
    """The base model's images beside those of an update that a slider chooses."""
    first, shown, last = grids[0], grids[-1], len(grids) - 1
    rows = []
    for place, prompt in enumerate(shown["prompts"]):
        columns, strips = shown["columns"], ""
        if last and place < len(first["rows"]):
            strips = _strip(first["label"], first["rows"][place], prompt, columns)
        strips += _strip("", shown["rows"][place], prompt, columns, f"row{place}")
        rows.append(f"<h3>{_text(prompt)}</h3><div class=pair>{strips}</div>")
    return (
        "<p class=faint>The same noises every time; move the slider to see how they change.</p>"
        f'<input type=range id=slider min=0 max={last} value={last} aria-label="update">'
        f"<p><b id=update>{shown['label']}</b></p>{''.join(rows)}"
    )


def _strip(label: str, url: str, prompt: str, columns: int, name: str = "") -> str:
    """A row of images; one with a name changes with the slider."""
    kind = f'id="{name}"' if name else ""
    over = label or '<span class="which"></span>'
    return (
        f'<div class=strip style="max-width:{columns * PICTURE_SIDE}px"><span class=faint>{over}</span>'
        f'<img {kind} src="{url}" alt="{_text(prompt)}"></div>'
    )


def _no_grids() -> str:
    return (
        '<p class=faint>No validation images: give, say, <code>--validation_prompt "a sks dog on the beach" '
        '"a dog on the beach" --validation_every 100</code> to see here whether the subject comes, and '
        "whether its class stays.</p>"
    )


def _charts(reports: Sequence[dict]) -> str:
    if not reports:
        return "<p class=faint>No update yet.</p>"
    updates = [its["global_step"] for its in reports]
    skipped = [its["global_step"] for its in reports if its["skipped"]]

    def curve(title: str, name: str, is_noisy: bool = False) -> str:
        values = [its.get(name) for its in reports]
        if name == "images_per_second":  # which the first update, which compiles, does not know
            values = [value or None for value in values]
        if name == "loss_scale":
            values = [math.log2(value) if value else None for value in values]
        return chart(title, updates, values, is_noisy, skipped)

    has_prior = any(its["class_loss"] for its in reports)
    found = [curve("Loss on the subject" if has_prior else "Loss", "instance_loss", True)]
    if has_prior:
        found.append(curve("Loss on its class (prior preservation)", "class_loss", True))
    found.append(curve("Learning rate", "learning_rate"))
    if any(its["gradient_norm"] for its in reports):
        found.append(curve("Gradient norm", "gradient_norm", True))
    if any(its["loss_scale"] != 1 for its in reports):
        found.append(curve("Loss scale (float16), a power of 2", "loss_scale"))
    found.append(curve("Images per second", "images_per_second"))
    if any(its.get("memory_gb") for its in reports):
        found.append(curve("Memory, GB", "memory_gb"))
    note = "The loss of one update is mostly chance, since each has other time steps and noises: look at the "
    note += "smoothed line, and at the images more than at any line."
    if skipped:
        note += (
            f" Red ticks: the {len(skipped)} updates that a float16 overflow skipped; a few at first are how "
        )
        note += "the loss scale is found, many later on want a lower learning rate."
    return f"<p class=faint>{note}</p><div class=charts>{''.join(found)}</div>"


def _commands(commands: Commands) -> str:
    texts = {
        "Draw with what it has learned": commands.draw,
        "Continue after a stop or a crash": commands.resume,
        "For other programs": commands.convert,
    }
    found = [
        f"<h3>{title}</h3><pre><code>{_text(line)}</code><button type=button>copy</button></pre>"
        for title, line in texts.items()
        if line
    ]
    return "".join(found) or "<p class=faint>Nothing yet: no checkpoint is written.</p>"


def _table(values: dict[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in values.items()
    )
    return f"<table>{rows}</table>"
