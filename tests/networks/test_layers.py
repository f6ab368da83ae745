"""What the layers choose for a device that is not here."""

import inspect

import pytest
from mindspore import ops

from ldm.networks.layers import has_flash_attention


@pytest.mark.parametrize(
    "name, expected",
    [("Ascend910B2", True), ("Ascend910_9391", True), ("Ascend910A", False), ("Ascend910ProB", False), ("CPU", False)],
)
def test_where_attention_is_fused(name, expected):
    assert has_flash_attention(name) is expected


def test_the_fused_attention_takes_the_arguments_it_is_called_with():
    arguments = inspect.signature(ops.flash_attention_score).bind("q", "k", "v", 5, scalar_value=0.125, input_layout="BSH").arguments
    assert list(arguments)[:4] == ["query", "key", "value", "head_num"]
