"""A norm is a spike if it stands out from the median of the norms before it."""

import statistics

import pytest
import torch

from dist_siglip.training.optim import NormHistory


def judged(norms, factor, window):
    """What a history says of each norm, and what it holds in the end."""
    history, found = NormHistory(factor, window), []
    for norm in norms:
        is_spike = history.is_spike(torch.tensor(norm))
        history.add(torch.tensor(norm))
        found.append(is_spike.item())
    return found, history


def expected_of(norms, factor, window):
    """The definition, in a plain loop."""
    finite, found = [], []
    for norm in norms:
        recent = finite[-window:]
        lower_median = statistics.median_low(recent) if recent else 0.0
        enough = len(recent) >= max(1, window // 4)
        found.append(enough and norm > factor * lower_median)
        finite.append(norm)
    return found, finite[-window:]


@pytest.mark.parametrize(("factor", "window"), [(2.0, 1), (1.5, 5), (3.0, 128)])
def test_norms_are_judged_as_defined(factor, window):
    torch.manual_seed(0)
    norms = torch.distributions.LogNormal(0.0, 1.0).sample((300,)).tolist()
    found, history = judged(norms, factor, window)
    expected, kept = expected_of(norms, factor, window)
    assert found == expected
    assert 0 < sum(found) < 200
    assert history.values.tolist() == torch.tensor(kept).tolist()


def test_what_is_not_finite_is_not_remembered():
    _, history = judged([1.0, torch.nan, torch.inf, 2.0], 10.0, 100)
    assert history.values.tolist() == [1.0, 2.0]


def test_norms_that_stay_high_become_the_new_measure_and_a_few_do_not():
    found, _ = judged([1.0] * 8 + [50.0, 60.0] + [1.0] * 8 + [50.0] * 12, 10.0, 8)
    assert found == [False] * 8 + [True] * 2 + [False] * 8 + [True] * 5 + [False] * 7


@pytest.mark.parametrize("num_before", [3, 8, 29])
def test_a_restored_history_goes_on_as_if_it_had_not_been_away(num_before):
    torch.manual_seed(1)
    norms = torch.distributions.LogNormal(0.0, 1.0).sample((60,)).tolist()
    expected, whole = judged(norms, 2.0, 8)
    _, first = judged(norms[:num_before], 2.0, 8)
    second = NormHistory(2.0, 8)
    second.restore(first.values)
    found = []
    for norm in norms[num_before:]:
        found.append(second.is_spike(torch.tensor(norm)).item())
        second.add(torch.tensor(norm))
    assert found == expected[num_before:]
    assert torch.equal(second.values, whole.values)


def test_a_smaller_window_takes_over_the_newest_norms():
    history = NormHistory(3.0, 2)
    history.restore(torch.tensor([9.0, 1.0, 2.0]))
    assert history.values.tolist() == [1.0, 2.0]
