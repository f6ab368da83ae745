from ldm.memory import memory_is_low


def test_memory_is_low_where_training_would_not_fit():
    assert not memory_is_low(1 << 20)
    assert memory_is_low(1 << 50)
