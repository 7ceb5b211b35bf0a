import itertools

import numpy as np
import pytest

from dist_siglip.data.order.sequence import ROUND, Mixture, apportion

WEIGHTS = [(1,), (1, 1), (3, 1), (5, 2, 0.01), (1e-9, 1)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seats", [8, 10, 1000, ROUND])
def test_shares_add_up_and_are_off_by_less_than_one_seat(weights, seats):
    shares = apportion(weights, seats)
    assert shares.sum() == seats
    assert shares.min() >= 1
    wanted = np.array(weights) / sum(weights) * seats
    assert np.all(np.abs(shares - np.maximum(wanted, 1)) <= 1 + 1e-9)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("position", [0, 1, 17, ROUND - 1, ROUND, 2 * ROUND + 5])
def test_draws_before_a_position_are_those_counted_one_by_one(weights, position):
    mixture = Mixture(4, weights)
    walked = np.bincount(mixture.sources(0, position), minlength=len(weights))
    assert mixture.draws_before(position).tolist() == walked.tolist()


def test_any_cut_of_the_positions_gives_the_same_sources():
    mixture = Mixture(1, [2, 1])
    whole = mixture.sources(ROUND - 40, ROUND + 40).tolist()
    for cut in (1, 39, 40, 41, 79):
        middle = ROUND - 40 + cut
        parts = [Mixture(1, [2, 1]).sources(*ends) for ends in ((ROUND - 40, middle),)]
        parts.append(Mixture(1, [2, 1]).sources(middle, ROUND + 40))
        assert np.concatenate(parts).tolist() == whole


def test_rounds_and_seeds_differ():
    arrangements = [
        tuple(Mixture(seed, [1, 1]).sources(number * ROUND, number * ROUND + 64).tolist())
        for seed, number in itertools.product(range(3), range(3))
    ]
    assert len(set(arrangements)) == 9


def test_sources_are_mixed_everywhere():
    window = Mixture(0, [3, 1]).sources(0, ROUND).reshape(-1, 256).sum(axis=1)
    assert window.min() > 30
    assert window.max() < 100
