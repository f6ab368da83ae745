"""Against open_clip's own tokenizer, read from its package without the rest of it."""

import importlib.util
import itertools
import logging
from importlib.metadata import distribution

import numpy as np
import pytest

from ldm.tokenizer import VOCABULARY_SIZE, Tokenizer


@pytest.fixture(scope="module")
def reference():
    # open_clip's __init__ wants torchvision, which the tokenizer does not need.
    path = distribution("open_clip_torch").locate_file("open_clip/tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


SPECIAL = [
    "", " ", "a", "A photo of sks dog", "  many   spaces\tand\nlines  ",
    "don't we'll they're I'm it's you've he'd O'Neil",
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u0130stanbul",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f415\u200d\U0001f9ba \U0001f1e9\U0001f1ea", "&lt;b&gt; &amp;amp; &quot;x&quot; &#39;",
    "<start_of_text> inside <end_of_text>", "<|endoftext|>",
    "\u2026\u2014\u2013\u201cquotes\u201d \u2018single\u2019", "100% $5.00 3,141.59 #hash @at 1/2 \u00bd",
    "e=mc^2 a_b-c+d", "\u00e2\u20ac\u0153mojibake\u00e2\u20ac\u009d", "\ufb01ne \uff26\uff35\uff2c\uff2c",
    "a\u0301 combining", "\u200bzero\u200bwidth", "x" * 300, "word " * 200, "\U00010348 \U0001d54f",
    "sks zwx qvk", "\\n \\t / \\", "'s 't 're", "... !!! ???", "tab\there",
    "\x00\x01control", "\u00a0nbsp\u00a0", "UPPER lower MiXeD",
]  # fmt: skip


def prompts() -> list[str]:
    """Over 1,000: special cases, combinations of words, and random characters from many blocks."""
    subjects = [
        "sks dog",
        "backpack",
        "Teddy-Bear",
        "caf\u00e9 racer",
        "N\u00fcrburgring",
        "\U0001f436",
        "1980s robot",
        "d\u2019Artagnan",
    ]
    places = [
        "on the hill",
        "in the jungle, at dawn",
        "underwater (macro)",
        "in \u6771\u4eac",
        "with 3 red hats!",
        "& friends",
        "@ night",
        "",
    ]
    styles = [
        "a photo of {} {}",
        "A {} {} -- 4k; trending",
        "\u201c{}\u201d {}",
        "{} {} by Albrecht D\u00fcrer, 35mm f/1.4",
    ]
    combined = [style.format(a, b) for style, a, b in itertools.product(styles, subjects, places)]
    rng = np.random.default_rng(0)
    blocks = [
        (32, 127),
        (160, 592),
        (880, 1424),
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1F6FF),
        (0x2000, 0x206F),
    ]
    noise = []
    for _ in range(800):
        codes = [int(rng.integers(*blocks[rng.integers(len(blocks))])) for _ in range(rng.integers(1, 40))]
        noise.append("".join(map(chr, codes)))
    return SPECIAL + combined + noise


def test_ids_equal_open_clip(reference):
    texts = prompts()
    assert len(texts) > 1000
    ours, theirs = Tokenizer()(texts), reference(texts).numpy()
    different = [text for text, a, b in zip(texts, ours, theirs) if not np.array_equal(a, b)]
    assert ours.dtype == np.int32 and ours.shape == (len(texts), 77)
    assert not different


def test_layout_and_vocabulary():
    tokenizer = Tokenizer()
    row = tokenizer(["a dog"])[0]
    assert list(row[:4]) == [49406, *tokenizer.encode("a dog"), 49407] and not row[4:].any()
    assert len(tokenizer._names) == VOCABULARY_SIZE
    assert (
        tokenizer.decode(tokenizer.encode("A sks dog, na\u00efve \U0001f436!")).strip()
        == "a sks dog , na\u00efve \U0001f436!"
    )


def test_an_over_long_prompt_is_cut_with_a_warning_that_quotes_the_rest(caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer()
        row = [tokenizer(["dog " * 75 + "zebra elephant"] * 8)[0] for _ in range(2)][1]
    assert caplog.text.count("the prompt has 77 tokens, 75 fit") == 1  # not for every image of it
    assert row[-1] == 49407 and row[-2] == Tokenizer().encode("dog")[0]
    assert "zebra elephant" in caplog.text and "dog zebra" not in caplog.text
