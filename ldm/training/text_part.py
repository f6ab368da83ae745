"""What a training does with the text encoder apart from the rest: a rate of its own, an end before the run's,
a single word of its table of embeddings.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from mindspore import Parameter

from ldm.device import graphs_not_kept
from ldm.networks.text_encoder import TextEncoder
from ldm.options import TrainOptions
from ldm.tokenizer import token_of
from ldm.training.inputs import Inputs
from ldm.weights.arrays import as_numpy
from ldm.weights.embeddings import ROW, TABLE, with_row

KINDS = UNET, TEXT, WORD = "unet", "text", "word"  # of trained parameters
logger = logging.getLogger(__name__)


def kind_of(name: str, options: TrainOptions) -> str:
    """Of a trained parameter, by its name; all are of one kind where nothing tells them apart."""
    if not tells_kinds_apart(options) or not name.startswith("cond_stage_model."):
        return UNET
    return WORD if name == ROW else TEXT


def tells_kinds_apart(options: TrainOptions) -> bool:
    """Whether a training does something with the text encoder or a word that it does not with the UNet."""
    return any((options.text_encoder_learning_rate, options.text_encoder_stop, options.token_learning_rate))


def ratios_of(options: TrainOptions) -> tuple[float, ...]:
    """Of the learning rate of each kind of parameters to the run's."""
    if not tells_kinds_apart(options):
        return (1.0,)
    rate = options.start_learning_rate
    text = options.text_encoder_learning_rate or rate
    return 1.0, text / rate, (options.token_learning_rate or text) / rate


@dataclass
class TextStop:
    """The end of the text encoder's training, before that of the run.

    Attributes:
        update: after which.
        is_done: whether the text encoder has left the training.
    """

    text_encoder: TextEncoder
    update: int
    is_done: bool = False

    def is_reached_by(self, global_step: int) -> bool:
        return global_step >= self.update

    def say(self) -> None:
        logger.info(
            "the text encoder is frozen from here on, after update %d (--text_encoder_stop)", self.update
        )

    def encode(self, inputs: Inputs) -> None:
        """Make inputs the features of prompts instead of their tokens."""
        self.text_encoder.set_train(False)
        with graphs_not_kept():
            inputs.encode_text(self.text_encoder)


@dataclass(frozen=True)
class Word:
    """A word whose embedding is trained, as a row beside the table that it belongs to.

    Attributes:
        table: (V, width), the model's.
    """

    token: int
    table: Parameter

    @classmethod
    def of(cls, options: TrainOptions, text_encoder: TextEncoder) -> "Word | None":
        """The word that a training's options name."""
        if options.train_token is None:
            return None
        return cls(token_of(options.train_token), text_encoder.transformer.embedding_table)

    def into_table(self, named: Mapping[str, Parameter | np.ndarray]) -> dict[str, Parameter | np.ndarray]:
        """Weights by name with the row in its place in the table, as every other program has it."""
        table = with_row(self.table.asnumpy(), self.token, as_numpy(named[ROW]))
        return {name: values for name, values in named.items() if name != ROW} | {TABLE: table}
