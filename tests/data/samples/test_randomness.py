import random

import numpy as np
import pytest
import torch

from dist_siglip.data.order.sequence import draw_one
from dist_siglip.data.samples.dataset import seeded_generators


def draw():
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_equal_keys_give_equal_draws_of_every_generator():
    with seeded_generators(1, 2, 3):
        first = draw()
    draw()
    with seeded_generators(1, 2, 3):
        second = draw()
    with seeded_generators(1, 2, 4):
        third = draw()
    assert first == second
    assert all(a != b for a, b in zip(first, third, strict=True))


def test_outer_generators_are_undisturbed():
    def seed_all():
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed_all()
    expected = [draw(), draw()]
    seed_all()
    seen = [draw()]
    with pytest.raises(KeyError), seeded_generators(9):
        {}[draw()]
    seen.append(draw())
    assert seen == expected


def test_neighbouring_keys_are_unrelated():
    values = []
    for epoch in range(20):
        for position in range(50):
            with seeded_generators(0, epoch, position):
                values.append(torch.rand(1).item())
    assert len(set(values)) == 1000
    assert abs(np.mean(values) - 0.5) < 0.05
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.1


def test_substitutes_spread_over_all_samples():
    drawn = [draw_one(10, 0, 0, position, 1) for position in range(1000)]
    assert np.bincount(drawn, minlength=10).min() > 50
    assert drawn == [draw_one(10, 0, 0, position, 1) for position in range(1000)]
    assert drawn != [draw_one(10, 0, 0, position, 2) for position in range(1000)]
    assert {draw_one(1, position) for position in range(10)} == {0}
