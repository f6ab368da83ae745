"""Files of prompts with options behind them; images in the order of their files, and in batches."""

import dataclasses

import pytest
from conftest import write_pictures

from ldm.drawings import batches_of, drawings_of, read_prompts
from ldm.sample_options import SampleOptions
from ldm.values import ConfigError


@pytest.fixture
def options(tmp_path):
    (tmp_path / "a.ckpt").touch()
    return SampleOptions(ckpt_path=str(tmp_path / "a.ckpt"), data_path=str(tmp_path / "prompts.txt"))


def lines(options, text):
    with open(options.data_path, "w") as file:
        file.write(text)
    return read_prompts(options)


def test_a_line_has_options_of_its_own(tmp_path, options):
    (picture,) = write_pictures(tmp_path / "pictures", 1)
    first, second, third = lines(
        dataclasses.replace(options, negative_prompt="blurry", ddim=True),
        "a dog\n"
        "a (cat:1.2), 3-4 -- no flags\t--seed 5 --steps=20 --negative "
        '"a \'b" --cfg_scale 3 --sampler uni_pc\n'
        f"a bird --height 32 --W 40 --init_image {picture} --strength .5\n",
    )
    assert (first.prompt, first.negative_prompt, first.options.sampler_name) == ("a dog", "blurry", "ddim")
    assert (second.prompt, second.negative_prompt) == ("a (cat:1.2), 3-4 -- no flags", "a 'b")
    its = second.options
    assert (its.seed, its.sampling_steps, its.guidance_scale, its.sampler_name) == (5, 20, 3, "uni_pc")
    assert (third.options.H, third.options.W, third.options.strength) == (32, 40, 0.5)
    assert third.negative_prompt == "blurry" and third.options.seed == options.seed


@pytest.mark.parametrize("line, wanted", [
    ("a dog --sede 5", "--sede is no option of a line; did you mean --seed?; these are: --negative_prompt,"),
    ("a dog --ckpt_path=x", "ckpt_path is no option of a line"), ("a dog --seed", "expected one argument"),
    ("a dog --help", "--help is no option of a line"),
    ("a dog --seed 5 6", "6 is no option of a line"), ("a dog --seed x", "seed must be a whole number"),
    ("a dog --steps 0", "sampling_steps must be 1 or more"), ('a dog --negative "x', "No closing quotation"),
    ("a dog --ddim_eta 1", "ddim_eta 1 acts with the ddim sampler only"),
    ("a dog --init_image none.png", "init_image none.png: no such file"),
])  # fmt: skip
def test_mistakes_name_the_line(options, line, wanted):
    with pytest.raises(ConfigError, match=r"prompts.txt: line 2: .*") as error:
        lines(options, f"a cat\n{line}\n")
    assert wanted in str(error.value)


def numbers(options, text) -> list[tuple[str, int]]:
    found = drawings_of(lines(options, text), options)
    return [(drawing.prompt, drawing.number) for drawing in found]


def test_a_line_with_a_seed_draws_the_same_wherever_it_stands(options):
    options = dataclasses.replace(options, n_samples=2, n_iter=2, image_number=10)
    own = [("b", 10), ("b", 11), ("b", 12), ("b", 13)]
    assert numbers(options, "a\nb --seed 5\n") == [("a", 10), ("a", 11), ("a", 14), ("a", 15), *own]
    assert numbers(options, "b --seed 5\n") == own


def test_batches(options):
    options = dataclasses.replace(options, n_samples=3, n_iter=1)
    drawings = drawings_of(lines(options, "a\nb\nc --steps 5\nd --steps 5\n"), options)
    sizes = {size: [len(batch) for batch in batches_of(drawings, size)] for size in (1, 3, 4, 100)}
    assert sizes == {1: [1] * 12, 3: [3] * 4, 4: [4, 2, 4, 2], 100: [6, 6]}
    assert [drawing for batch in batches_of(drawings, 4) for drawing in batch] == drawings
