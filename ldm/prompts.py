"""What a prompt says besides its words: weights in brackets, BREAK, and more words than one chunk of tokens
has room for. Knows no network.

The syntax is AUTOMATIC1111's (modules/prompt_parser.py, sd_hijack_clip.py), in which most people write.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldm.tokenizer import Tokenizer
from ldm.values import ConfigError

STRONGER = 1.1  # what a pair of brackets multiplies by: round ones, and square ones by its reciprocal
COMMA = 267  # the token of a comma that ends a word
BACKTRACK = 20  # tokens: a full chunk ends at its last comma, if that is no further back
LARGEST_FACTOR = 10  # by which a mean is restored: more is a mean about 0, of which nothing follows
MARKS = re.compile(
    r"\\[\\()\[\]]?"  # a character that is meant as itself
    r"|:([+-]?[.\d]+)\)"  # the weight of what is in round brackets
    r"|[()\[\]:]"
    r"|[^\\()\[\]:]+"
)
ONLY_TEXT = {  # of AUTOMATIC1111's language, what is not read
    "<lora:...> (give --lora_ckpt_path)": re.compile(r"<(lora|lyco|hypernet):"),
    "[a:b:0.5] (prompt editing)": re.compile(r"(?<!\\)\[[^\[\]]*:[^\[\]]*:?\s*[\d.]+\s*\]"),
    "[a|b] (alternation)": re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"),
    "AND (several prompts)": re.compile(r"\bAND\b"),
}
BREAK = re.compile(r"\s*\bBREAK\b\s*")
logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Text of one weight; of weight None, the end of a chunk."""

    text: str
    weight: float | None = 1.0


class Chunk(NamedTuple):
    """What the text encoder reads at a time: token ids (77,) int32, and what each counts, (77,) float64."""

    token_ids: np.ndarray
    weights: np.ndarray


def parse_weights(prompt: str) -> list[Piece]:
    """A prompt's text by weight: `(text)` 1.1 times, `[text]` 1/1.1 times, `(text:1.3)` 1.3 times; they
    multiply where they nest. `BREAK` ends a chunk; a backslash takes the sense from the bracket after it.

    Unlike AUTOMATIC1111's, BREAK acts within brackets, too.

    Raises:
        ConfigError: a weight is no number, as in (a:1.2.3).
    """
    texts: list[str] = []
    weights: list[float | None] = []
    round_brackets, square_brackets = [], []  # where those that are open begin

    def weigh(start: int, factor: float) -> None:
        weights[start:] = [None if weight is None else weight * factor for weight in weights[start:]]

    for match in MARKS.finditer(prompt):
        found, number = match[0], match[1]
        if found == "(":
            round_brackets.append(len(texts))
        elif found == "[":
            square_brackets.append(len(texts))
        elif number and round_brackets:
            weigh(round_brackets.pop(), _number(number, prompt))
        elif found == ")" and round_brackets:
            weigh(round_brackets.pop(), STRONGER)
        elif found == "]" and square_brackets:
            weigh(square_brackets.pop(), 1 / STRONGER)
        elif found.startswith("\\"):
            texts.append(found[1:])
            weights.append(1.0)
        else:
            for place, text in enumerate(BREAK.split(found)):
                texts += ["BREAK", text] if place else [text]
                weights += [None, 1.0] if place else [1.0]
    for start in round_brackets:
        weigh(start, STRONGER)
    for start in square_brackets:
        weigh(start, 1 / STRONGER)
    return _joined(texts, weights) or [Piece("")]


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"prompt {prompt!r}: the weight {text} is no number; --prompt_weights=off draws brackets as text"
        ) from None


def _joined(texts: Sequence[str], weights: Sequence[float | None]) -> list[Piece]:
    """Neighbours of one weight as one piece."""
    found: list[Piece] = []
    for text, weight in zip(texts, weights):
        if found and found[-1].weight == weight and weight is not None:
            found[-1] = Piece(found[-1].text + text, weight)
        else:
            found.append(Piece(text, weight))
    return found


def what_is_only_text(prompt: str) -> list[str]:
    """Of AUTOMATIC1111's language, what a prompt has that is not read here."""
    return [name for name, found in ONLY_TEXT.items() if found.search(prompt)]


@dataclass(frozen=True)
class PromptSyntax:
    """How prompts are read.

    Args:
        has_weights: brackets are weights and BREAK ends a chunk; else all of it is text.
        is_long: a prompt may have several chunks; else it is cut after the first.
    """

    has_weights: bool = False
    is_long: bool = False

    def chunks(self, prompt: str, tokenizer: Tokenizer) -> list[Chunk]:
        """At least one. A warning quotes what was cut, once for each prompt."""
        pieces = parse_weights(prompt) if self.has_weights else [Piece(prompt)]
        if not self.is_long:  # BREAK is no more than a space then
            pieces = [piece for piece in pieces if piece.weight is not None]
        room, backtrack = tokenizer.context_length - 2, BACKTRACK if self.is_long else 0
        tokens = split_tokens([(tokenizer.encode(text), weight) for text, weight in pieces], room, backtrack)
        if not self.is_long and len(tokens) > 1:
            tokenizer.warn_of_cut(tuple(token for chunk in tokens for token, _ in chunk), len(tokens[0]))
            tokens = tokens[:1]
        return [_with_marks(chunk, tokenizer) for chunk in tokens]


def split_tokens(
    pieces: Sequence[tuple[Sequence[int], float | None]], room: int, backtrack: int = BACKTRACK
) -> list[list[tuple[int, float]]]:
    """Tokens with their weights, in chunks of at most `room`.

    A full chunk ends at its last comma, if that is at most `backtrack` tokens back; what stood behind it
    begins the next chunk.
    """
    chunks: list[list[tuple[int, float]]] = [[]]
    for tokens, weight in pieces:
        if weight is None:
            chunks.append([])
            continue
        for token in tokens:
            if len(chunks[-1]) == room:
                chunks.append([] if token == COMMA else _taken_after_comma(chunks[-1], backtrack))
            chunks[-1].append((token, weight))
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def _taken_after_comma(chunk: list[tuple[int, float]], backtrack: int) -> list[tuple[int, float]]:
    commas = [place for place, (token, _) in enumerate(chunk) if token == COMMA]
    if not commas or len(chunk) - commas[-1] > backtrack:
        return []
    taken = chunk[commas[-1] + 1 :]
    del chunk[commas[-1] + 1 :]
    return taken


def _with_marks(chunk: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> Chunk:
    token_ids = tokenizer.with_marks([token for token, _ in chunk])
    weights = np.ones(tokenizer.context_length)
    weights[1 : 1 + len(chunk)] = [weight for _, weight in chunk]
    return Chunk(token_ids, weights)


def weigh(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Text features (77, width) of a chunk, each times the weight (77,) of its token, and all of them by what
    brings their mean back to what it was (AUTOMATIC1111's sd_emphasis.py, "Original").

    The mean is signed and may be about 0: a factor that is not within 0 to LARGEST_FACTOR is left out.
    """
    if (weights == 1).all():
        return features
    weighed = features * weights[:, None]
    mean, its = features.mean(dtype=np.float64), weighed.mean(dtype=np.float64)
    factor = mean / its if its else math.inf
    if not 0 < factor <= LARGEST_FACTOR:
        text = "prompt weights: the mean of the text features went from %.3g to %.3g; it is left there"
        logger.warning(text, mean, its)
        factor = 1.0
    return (weighed * factor).astype(features.dtype)
