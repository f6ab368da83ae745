"""Random numbers as a function of (seed, purpose, number): a run draws the same ones however it is split or
resumed.
"""

import numpy as np

# The purposes: the part of a stream's key between the seed and the number.
INSTANCE_CROP, CLASS_CROP, INSTANCE_NOISE, CLASS_NOISE, INSTANCE_ORDER, CLASS_ORDER, IMAGE, LORA = range(8)
CAPTION, OFFSET = 8, 9


def stream(seed: int, purpose: int, number: int, *more: int) -> np.random.Generator:
    """The random numbers of one purpose and one number of it; `more` tells apart several of that number."""
    return np.random.default_rng([seed, purpose, number, *more])
