"""report.html: of made-up runs, looked at in a browser."""

import json
import math

import numpy as np
import pytest
from browser import browser, open_page
from conftest import write_pictures

from ldm import images
from ldm.options import TrainOptions
from ldm.run.charts import chart, smoothed, ticks
from ldm.run.report import Commands, RunReport, changed_options, read_reports
from ldm.run.validation import OWN, Validation, grids_in
from ldm.subjects import Picture, Subject

PROMPT = 'a sks <dog> & "cat"'


def metrics(count: int, skipped=(), **changes) -> str:
    rng, lines = np.random.default_rng(0), []
    for step in range(1, count + 1):
        report = {
            "global_step": step, "total_steps": count, "epoch": 1, "loss": 0.4 + 0.1 * rng.random(),
            "instance_loss": 0.2 + 0.1 * rng.random(), "class_loss": 0.2, "learning_rate": 1e-6,
            "images_per_second": 3.2, "seconds_left": 1.0, "gradient_norm": 0.3, "loss_scale": 1.0,
            "skipped": step in skipped, "memory_gb": 3.0,
        } | changes  # fmt: skip
        lines.append(json.dumps(report))
    return "\n".join(lines) + "\n"


def grid(folder, update: int, prompts, columns=2, side=24, seed=0) -> None:
    shape = (len(prompts) * columns, side, side, 3)
    pictures = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    facts = {"update": update, "prompts": prompts, "images": columns}
    path = folder / "validation" / f"step_{update:06d}.png"
    images.save_image(images.grid(pictures, columns), path, {OWN: json.dumps(facts)})


@pytest.fixture
def run(tmp_path):
    """A run's folder, and what makes its report."""
    pictures = [Picture(path, PROMPT) for path in write_pictures(tmp_path / "dog", 5)]
    options = TrainOptions(
        instance_data_dir=str(tmp_path / "dog"), instance_prompt=PROMPT, class_data_dir="dogs",
        class_prompt="a dog", validation_prompt=("a sks dog", "a dog"), image_size=64, epochs=2,
    )  # fmt: skip
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "train.log").write_text(
        "2026-01-01 10:00:00,000 INFO fine\n2026-01-01 10:00:01,000 WARNING something <odd>\n" * 2
    )
    return folder, RunReport(folder, options, options, [Subject(pictures, 40)], 2, 400)


def written(run, commands=Commands(), state="running") -> str:  # noqa: B008 (frozen)
    folder, report = run
    report.write(state, f"{state}: 1 < 2", commands)
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("width", [400, 1600])
def test_it_can_be_looked_at(run, width):
    folder, _ = run
    (folder / "metrics.jsonl").write_text(metrics(1200, skipped=(3, 700)))
    for update in (0, 100, 200):
        grid(folder, update, ["a sks dog", "a <b>dog</b>"], seed=update)
    _, report = run
    commands = Commands("python draw", "python resume", "python convert 'it'")
    report.write("failed", "failed: " + "a long reason and what to do about it, " * 5 + "x" * 60, commands)
    with browser() as opened:
        page, errors = open_page(opened, f"file://{folder / 'report.html'}", width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.inner_text("h1").startswith(PROMPT) and page.locator("li").all_inner_texts() == [
            "something <odd>"
        ]
        assert page.locator(".pictures img").count() == 5
        assert all(
            page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
        )
        assert page.inner_text("#update") == "update 200"
        shown = page.get_attribute("#row0", "src")
        page.focus("#slider")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#update") == "update 100" and page.get_attribute("#row0", "src") != shown
        page.keyboard.press("Home")
        assert page.inner_text("#update") == "base model"
        assert page.inner_text("#drawn h3 >> nth=1") == "a <b>dog</b>"
        first = page.locator(".chart").first
        assert first.locator("h3").inner_text().startswith("Loss on the subject")
        first.locator("svg").hover()
        assert "update 5" in first.locator("output").inner_text()  # the middle
        assert page.locator("code").all_inner_texts() == [
            "python draw",
            "python resume",
            "python convert 'it'",
        ]
        assert not errors, errors


def test_it_is_small_however_much_there_is(run):
    folder, _ = run
    (folder / "metrics.jsonl").write_text(metrics(20_000))
    for update in range(0, 24):
        grid(folder, update, ["a", "b", "c"], columns=4, side=256, seed=update)  # noise: nothing is larger
    written(run)
    assert (folder / "report.html").stat().st_size < 5_000_000
    assert "update 23" in (folder / "report.html").read_text()


def test_it_is_made_of_what_there_is(run):
    folder, report = run
    text = written(run)  # before the first update
    assert "No update yet" in text and "No validation images" in text and "Nothing yet" in text
    (folder / "metrics.jsonl").write_text(
        metrics(3, skipped=(2,), loss=None, instance_loss=None, loss_scale=512.0)
        + '{"global_step": 4, "loss"'
    )
    text = written(run, state="failed")
    assert "1 (float16 overflows)" in text and "Loss scale" in text and "not finite" in text
    (folder / "validation").mkdir()
    images.save_image(np.zeros((9, 9, 3), np.uint8), folder / "validation/step_000007.png")  # of the user's
    (folder / "train.log").unlink()
    next(folder.parent.glob("dog/*")).unlink()
    assert "No validation images" in written(run)
    (folder / "report.html").write_text("the user's own")
    report.write("running", "1", Commands())  # a warning, and the training goes on
    assert (folder / "report.html").read_text() == "the user's own"
    grid(folder, 100, ["old"])
    grid(folder, 200, ["new"])
    (folder / "report.html").unlink()
    assert "update 100" not in written(run) and "update 200" in written(run)


def test_options_and_reports(run):
    folder, report = run
    assert changed_options(report.options)["validation_prompt"] == "'a sks dog' 'a dog'"
    assert "train_batch_size" not in changed_options(report.options)
    assert read_reports(folder / "none") == []


def test_curves():
    values = np.ones(100)
    values[7] = math.nan
    assert np.allclose(smoothed(values), 1)
    rng = np.random.default_rng(0)
    assert smoothed(rng.standard_normal(4000))[-1000:].std() < 0.15
    assert ticks(0, 1) == [0, 0.5, 1] and np.allclose(ticks(0.09, 0.31), [0.1, 0.2, 0.3])
    assert ticks(1, 1600, 5) == [500, 1000, 1500]
    for values in ([None], [0.0, 0.0], [1e-30, 1e30], [float("inf"), None]):
        assert "<svg" in chart("x", list(range(len(values))), values, True)


class Draws:
    def __init__(self) -> None:
        self.fails: Exception | None = None

    def draw(self, trainer, on_step) -> np.ndarray:
        on_step()
        if self.fails:
            raise self.fails
        return np.zeros((2, 4, 8, 8, 3), np.uint8)


def test_when_images_are_drawn_and_where_they_go(tmp_path, caplog):
    caplog.set_level("INFO")
    options = TrainOptions(validation_prompt=("a", "b"), validation_every=20)
    draws = Draws()
    validation = Validation(tmp_path, options, draws)
    due = [update for update in range(0, 51) if validation.is_due(update, update == 25, update == 50)]
    assert due == [0, 20, 40, 50]
    at_checkpoints = Validation(tmp_path, TrainOptions(validation_prompt=("a",)), draws)
    due = [update for update in range(0, 51) if at_checkpoints.is_due(update, update == 25, update == 50)]
    assert due == [0, 25, 50]
    assert validation.draw(20, None).shape == (2 * 8 + 6, 4 * 8 + 10, 3)
    assert validation.draw(20, None) is None  # it is there
    draws.fails = FloatingPointError("the UNet: NaN")
    assert validation.draw(40, None) is None and "no validation images of update 40: the UNet" in caplog.text
    draws.fails = None
    validation.draw(40, None)
    (tmp_path / "validation/step_000060.png").write_bytes(b"the user's own")
    validation.begin(20)
    assert [update for update, _ in grids_in(tmp_path / "validation")] == [20]
    assert (tmp_path / "validation/step_000060.png").exists()
    validation.is_stopping = lambda: True
    assert validation.draw(70, None) is None and "update 70: the run stops" in caplog.text
    validation.is_stopping = lambda: False
    draws.fails = RuntimeError("Memory not enough\n\nmany more lines")
    assert validation.draw(60 + 20, None) is None and validation.draws is None
    assert "no validation images from update 80 on: Memory not enough\n" in caplog.text
    assert Validation(tmp_path, options, None).draw(0, None) is None
    draws.fails = None
    again = Validation(tmp_path, options, draws)
    again.begin(0)  # of another run's base model nothing is left
    assert list(grids_in(tmp_path / "validation")) == [] and again.draw(0, None) is not None
