"""Files of a word's embedding, as diffusers' and AUTOMATIC1111's programs read and write them."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from ldm.tokenizer import token_of
from ldm.values import ConfigError, absent
from ldm.weights.arrays import is_finite
from ldm.weights.source import read_file
from ldm.weights.writing import METADATA, save_weights

TABLE = "cond_stage_model.transformer.embedding_table"
ROW = "cond_stage_model.transformer.word_embedding"  # of a word that is trained apart from the table


def save_embedding(word: str, row: np.ndarray, path: Path) -> str:
    """Write (1, width) float32 under the name `<word>`: diffusers would refuse a name that its tokenizer
    knows, and AUTOMATIC1111 goes by the name of the file. Returns the SHA-256 of the file.
    """
    return save_weights({f"<{word}>": row}, path, True, to="safetensors", metadata=METADATA)


def read_embedding(path: Path, width: int) -> tuple[int, np.ndarray]:
    """The token whose embedding a file has, by the name of the array, and the embedding (width,).

    Raises:
        ConfigError: the file is not there, or holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"embedding_path {path}: {absent(path)}")
    arrays = read_file(path)
    names = list(arrays)
    if len(names) != 1 or arrays.shape(names[0]) not in ((1, width), (width,)):
        found = ", ".join(f"{name} {arrays.shape(name)}" for name in names[:3])
        raise ConfigError(f"{path}: must hold one embedding of {width} values, got {found}")
    row = np.asarray(arrays[names[0]], np.float32).reshape(width)
    if not is_finite(row):
        raise ConfigError(f"{path}: its embedding is NaN or infinite")
    word = re.fullmatch(r"<?(.+?)>?", names[0])[1]
    try:
        return token_of(word), row
    except ConfigError as error:
        raise ConfigError(f"{path}: its name {error}") from None


def with_row(table: np.ndarray, token: int, row: np.ndarray) -> np.ndarray:
    """A copy of a table (V, width) with another row (1, width) for a token."""
    table = np.array(table)
    table[token] = row
    return table


def put_embeddings(table: Parameter, rows: Mapping[int, np.ndarray]) -> None:
    """Put rows into a table of embeddings (V, width), each at its token."""
    values = table.asnumpy().copy()
    for token, row in rows.items():
        values[token] = row
    table.set_data(Tensor(values, table.dtype))
