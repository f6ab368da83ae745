"""The byte-pair tokenizer of CLIP (Radford et al. 2021, section 2.4): a prompt becomes 77 token ids.

Lower case; ids are padded with 0, as OpenCLIP does, which trained Stable Diffusion 2's text encoder, or with
the end mark, as Stable Diffusion 1 does. The vocabulary file is OpenAI's (MIT, see THIRD_PARTY_NOTICES.md).
Knows no network.
"""

import gzip
import html
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import ftfy
import numpy as np
import regex

from ldm.values import ConfigError

VOCABULARY_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
VOCABULARY_SIZE = 49408
START, END = "<start_of_text>", "<end_of_text>"
MERGES = VOCABULARY_SIZE - 2 * 256 - 2
WORDS = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)
logger = logging.getLogger(__name__)


def _byte_symbols() -> dict[int, str]:
    """A printable character for every byte, in the order of the vocabulary: Latin-1's own, then U+0100
    upwards.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class Tokenizer:
    """Prompts to token ids and back.

    Args:
        context_length: ids a prompt, start and end marks included (77 in every CLIP).
        padding: what follows the end mark, "zero" (OpenCLIP, Stable Diffusion 2) or the "end" mark again
            (Stable Diffusion 1).
    """

    def __init__(self, context_length: int = 77, padding: str = "zero") -> None:
        if context_length < 2:
            raise ValueError(
                f"context_length {context_length}: needs room for the start and end marks, 2 at the least"
            )
        self.context_length = context_length
        lines = gzip.decompress(VOCABULARY_FILE.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
        self._symbols = _byte_symbols()
        letters = list(self._symbols.values())
        names = (
            letters
            + [letter + "</w>" for letter in letters]
            + ["".join(pair) for pair in merges]
            + [START, END]
        )
        self._ids = {name: index for index, name in enumerate(names)}
        self._names = names
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._word_ids = lru_cache(maxsize=100_000)(self._merge)
        self.warn_of_cut = lru_cache(maxsize=100_000)(self._warn)  # of one prompt once
        self.start_id, self.end_id = self._ids[START], self._ids[END]
        self.padding_id = self.end_id if padding == "end" else 0

    def _merge(self, word: str) -> tuple[int, ...]:
        """The ids of one word (of byte symbols): the pair of lowest rank is joined, everywhere, until none is
        left.
        """
        if word in (START, END):
            return (self._ids[word],)
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self._ranks.get(p, MERGES))
            if pair not in self._ranks:
                break
            joined, index = [], 0
            while index < len(parts):
                match = tuple(parts[index : index + 2]) == pair
                joined.append("".join(pair) if match else parts[index])
                index += 2 if match else 1
            parts = joined
        return tuple(self._ids[part] for part in parts)

    def vocabulary(self) -> dict[str, int]:
        """Symbol to id, the marks as transformers spells them."""
        marks = {START: "<|startoftext|>", END: "<|endoftext|>"}
        return {marks.get(name, name): index for name, index in self._ids.items()}

    def merges(self) -> list[str]:
        """The pairs that are joined, the first ones first."""
        return [" ".join(pair) for pair in self._ranks]

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without marks or padding."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        words = WORDS.findall(" ".join(text.split()).lower())
        symbols = ("".join(self._symbols[byte] for byte in word.encode("utf-8")) for word in words)
        return [index for word in symbols for index in self._word_ids(word)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, cleaned and in lower case as the tokenizer saw it."""
        of_symbol = {symbol: byte for byte, symbol in self._symbols.items()}
        text = "".join(self._names[index] for index in ids).replace("</w>", " ")
        return bytes(b for s in text for b in ([of_symbol[s]] if s in of_symbol else s.encode())).decode(
            "utf-8", "replace"
        )

    def with_marks(self, ids: Sequence[int]) -> np.ndarray:
        """(context_length,) int32: as many ids as fit between the marks, and padding."""
        row = np.full(self.context_length, self.padding_id, np.int32)
        kept = [self.start_id, *ids[: self.context_length - 2], self.end_id]
        row[: len(kept)] = kept
        return row

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids (B, context_length) int32.

        A prompt that does not fit is cut; a warning quotes what was lost, once for each prompt.
        """
        room, rows = self.context_length - 2, []
        for prompt in prompts:
            ids = self.encode(prompt)
            if len(ids) > room:
                self.warn_of_cut(tuple(ids), room)
            rows.append(self.with_marks(ids))
        return np.stack(rows) if rows else np.zeros((0, self.context_length), np.int32)

    def _warn(self, ids: tuple[int, ...], kept: int) -> None:
        lost = self.decode(ids[kept:]).strip()
        logger.warning("the prompt has %d tokens, %d fit: left out is %r", len(ids), kept, lost)


def token_of(word: str, prompts: Sequence[str] | None = None) -> int:
    """The one token that a word is.

    Args:
        prompts: of which one must have it.

    Raises:
        ConfigError: it is several tokens, or in no prompt.
    """
    tokenizer = Tokenizer()
    tokens = tokenizer.encode(word)
    if len(tokens) != 1:
        raise ConfigError(
            f"must be a word of one token, {word!r} has {len(tokens)}: take one such as sks, in prompts, too"
        )
    if prompts is not None and not any(tokens[0] in tokenizer.encode(prompt) for prompt in prompts):
        raise ConfigError(f"{word!r} is in no instance prompt: there would be nothing to learn")
    return tokens[0]
