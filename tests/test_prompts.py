"""Prompt syntax: AUTOMATIC1111's worked examples, its chunks, its emphasis."""

import logging

import numpy as np
import pytest

from ldm.prompts import COMMA, PromptSyntax, parse_weights, split_tokens, weigh, what_is_only_text
from ldm.tokenizer import Tokenizer
from ldm.values import ConfigError

BREAK = ("BREAK", None)
# as its parse_prompt_attention answers, run by itself; but BREAK in brackets, see there
EXAMPLES = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "a photo of (sks:1.2) dog": [("a photo of ", 1), ("sks", 1.2), (" dog", 1)],
    "((cat))": [("cat", 1.21)],
    "[cat]": [("cat", 0.909091)],
    "[[cat]]": [("cat", 0.826446)],
    "(unbalanced": [("unbalanced", 1.1)],
    "\\(literal\\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "((a:1.2) b:1.5)": [("a", 1.8), (" b", 1.5)],
    "(red, (very:1.3) big:0.8) ball": [("red, ", 0.8), ("very", 1.04), (" big", 0.8), (" ball", 1)],
    "[cat:1.5]": [("cat:1.5", 0.909091)],
    "cat:1.5": [("cat:1.5", 1)],
    "(a: b)": [("a: b", 1.1)],
    "(a: 1.3)": [("a: 1.3", 1.1)],
    "(a:1.3 )": [("a:1.3 ", 1.1)],
    "(a:1e2)": [("a:1e2", 1.1)],
    "(a:.5)": [("a", 0.5)],
    "(a:-1)": [("a", -1)],
    "(a:0)": [("a", 0)],
    "(:1.5)": [("", 1)],
    "()": [("", 1)],
    "": [("", 1)],
    "a ) b": [("a ) b", 1)],
    "a ] b": [("a ] b", 1)],
    "(a [b) c]": [("a ", 1.1), ("b", 1), (" c", 0.909091)],
    "a \\(b:1.2\\) c": [("a (b:1.2) c", 1)],
    "a BREAK b": [("a", 1), BREAK, ("b", 1)],
    "BREAK": [("", 1), BREAK, ("", 1)],
    "aBREAK b": [("aBREAK b", 1)],
    "break": [("break", 1)],
    "(a BREAK b:1.2)": [("a", 1.2), BREAK, ("b", 1.2)],  # there the mark is no longer known by its weight
    "BREAK (b:-1)": [("", 1), BREAK, ("", 1), ("b", -1)],  # there the mark and b become one text
    "a\\": [("a", 1)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_worked_examples(prompt):
    found = [(text, None if weight is None else round(weight, 6)) for text, weight in parse_weights(prompt)]
    assert found == EXAMPLES[prompt]


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match=r"'\(a:1.2.3\)': the weight 1.2.3 is no number; --prompt_weights"):
        parse_weights("(a:1.2.3)")


def lengths(count: int, commas=(), room=75) -> list[int]:
    tokens = [COMMA if place in commas else 1000 for place in range(count)]
    return [len(chunk) for chunk in split_tokens([(tokens, 1.0)], room)]


@pytest.mark.parametrize("count, commas, wanted", [
    (0, (), [0]), (75, (), [75]), (76, (), [75, 1]), (80, (), [75, 5]), (80, (69,), [70, 10]),
    (80, (55,), [56, 24]), (80, (54,), [75, 5]), (76, (75,), [75, 1]), (160, (69, 144), [70, 75, 15]),
])  # fmt: skip
def test_a_full_chunk_ends_at_its_last_comma(count, commas, wanted):
    assert lengths(count, commas) == wanted


@pytest.mark.parametrize("pieces, wanted", [
    ([([1], 1), ([], None), ([2], 1)], [[1], [2]]), ([([], 1), ([], None), ([2], 1)], [[], [2]]),
    ([([1], 1), ([], None), ([], 1)], [[1]]), ([([], 1), ([], None), ([], 1)], [[]]),
])  # fmt: skip
def test_a_break_begins_a_chunk(pieces, wanted):
    assert [[token for token, _ in chunk] for chunk in split_tokens(pieces, 75)] == wanted


@pytest.mark.parametrize("padding", ["zero", "end"])
def test_chunks_have_marks_padding_and_weights(padding):
    tokenizer = Tokenizer(padding=padding)
    first, second = PromptSyntax(True, True).chunks("a (dog:1.5) BREAK cat", tokenizer)
    assert np.array_equal(first.token_ids, tokenizer(["a dog"])[0])
    assert np.array_equal(second.token_ids, tokenizer(["cat"])[0])
    assert first.weights[:5].tolist() == [1, 1, 1.5, 1, 1] and (second.weights == 1).all()
    full, rest = PromptSyntax(is_long=True).chunks("dog " * 80, tokenizer)
    assert full.token_ids[-1] == tokenizer.end_id and (full.token_ids[1:76] == full.token_ids[1]).all()
    assert np.array_equal(rest.token_ids, tokenizer(["dog " * 5])[0])


def test_what_is_neither_weighed_nor_long_is_what_the_tokenizer_says(caplog):
    tokenizer, prompts = Tokenizer(), ["a (dog:1.5)", "", "dog " * 70 + ", " + "cat " * 10]
    for prompt in prompts:
        (chunk,) = PromptSyntax().chunks(prompt, tokenizer)
        assert np.array_equal(chunk.token_ids, tokenizer([prompt])[0]) and (chunk.weights == 1).all()
    assert caplog.text.count("the prompt has 81 tokens, 75 fit") == 1


def test_what_is_only_text_is_named():
    found = what_is_only_text("a <lora:x:0.8> [cat:dog:0.5] AND [a|b]")
    assert [name.split(" ")[0] for name in found] == ["<lora:...>", "[a:b:0.5]", "[a|b]", "AND"]
    assert not what_is_only_text("a (cat:1.2) [dog] and \\[a|b\\] 3:4")


def test_break_is_a_space_where_prompts_are_not_long():
    (chunk,) = PromptSyntax(True, False).chunks("a BREAK (cat:1.5)", tokenizer := Tokenizer())
    assert np.array_equal(chunk.token_ids, tokenizer(["a cat"])[0]) and chunk.weights[2] == 1.5


def test_weights_restore_the_mean(caplog):
    assert weigh(np.array([[2.0], [4.0]]), np.array([1, 1.5])).tolist() == [[1.5], [4.5]]
    features = np.random.default_rng(0).standard_normal((77, 8)).astype(np.float32)
    assert weigh(features, np.ones(77)) is features
    with caplog.at_level(logging.WARNING):
        kept = weigh(np.array([[1.0], [-2.0]]), np.array([1, 0.4]))  # the mean changes its sign
    assert kept.tolist() == [[1.0], [-0.8]] and "it is left there" in caplog.text
