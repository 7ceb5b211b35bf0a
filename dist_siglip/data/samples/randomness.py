"""How is augmentation made a function of the position alone?

Transforms draw from the global generators of Python, NumPy and torch. Here those are seeded for one
sample and put back afterwards, so a crop depends neither on the loader process nor on what ran
before, and loading in the training process leaves dropout undisturbed.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded_generators(*key: int) -> Iterator[None]:
    """Seed the global CPU generators from a key, and restore them at the end.

    Args:
        key: integers >= 0; equal keys give equal draws, on every machine.

    Example:
        >>> with seeded_generators(1, 2, 3):
        ...     first = random.random()
        >>> with seeded_generators(1, 2, 3):
        ...     print(first == random.random())
        True
    """
    words = np.random.SeedSequence(key).generate_state(3)
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed: that would reseed the GPUs too.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def draw_one(num_choices: int, *key: int) -> int:
    """Choose one of several, as a function of the key.

    Args:
        num_choices: >= 1.
        key: integers >= 0.

    Returns:
        A number in [0, num_choices).

    Example:
        >>> draw_one(1000, 0, 0, 7, 1) == draw_one(1000, 0, 0, 7, 1)
        True
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] % np.uint64(num_choices))
