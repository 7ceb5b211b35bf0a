"""Averages of weights: exact ends, mixed scale, refusals, files whole or not there."""

import math

import pytest
import torch
from safetensors.torch import load_file

from dist_siglip.errors import UserError
from dist_siglip.models.averaging import Ingredient, average_weights, greedy_soup, write_weights
from dist_siglip.models.weights import read_weights


def ingredient(seed, name=None, **changes):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "visual.weight": torch.randn(3, 4, generator=generator),
        "text.weight": torch.randn(4, generator=generator).bfloat16(),
        "visual.count": torch.tensor(seed),
    }
    return Ingredient(name or f"run {seed}", tensors | changes, 2.0 + seed, -10.0 * seed)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_the_ingredients_bit_for_bit(alpha):
    start, end = ingredient(1), ingredient(2)
    mixed = average_weights([start, end], [1 - alpha, alpha])
    expected = end if alpha else start
    assert mixed[1:] == expected[1:]
    assert all(torch.equal(mixed.tensors[k], expected.tensors[k]) for k in expected.tensors)


def test_a_mixture_is_that_of_plain_loops_and_of_the_log_of_the_scale():
    parts, weights = [ingredient(1), ingredient(2), ingredient(3)], [0.2, 0.3, 0.5]
    mixed = average_weights(parts, weights)
    for i in range(3):
        for j in range(4):
            value = sum(
                w * float(p.tensors["visual.weight"][i, j])
                for p, w in zip(parts, weights, strict=True)
            )
            assert float(mixed.tensors["visual.weight"][i, j]) == pytest.approx(value, rel=1e-6)
    assert mixed.tensors["text.weight"].dtype == torch.bfloat16
    assert mixed.tensors["visual.count"] == 3
    assert mixed.logit_scale == pytest.approx(3**0.2 * 4**0.3 * 5**0.5)
    assert mixed.logit_bias == pytest.approx(-10 * (0.2 + 0.6 + 1.5))
    assert mixed.logit_scale != pytest.approx(0.2 * 3 + 0.3 * 4 + 0.5 * 5)  # of the multiplier


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"visual.weight": torch.ones(3, 5)}, r"visual.weight is \(3, 5\) and was \(3, 4\)"),
        ({"visual.more": torch.ones(2)}, r"visual.more is \(2,\) and was missing"),
    ],
)
def test_another_architecture_is_refused_in_one_line(changes, named):
    with pytest.raises(UserError, match=f"other is of another architecture than run 1: {named}"):
        average_weights([ingredient(1), ingredient(2, "other", **changes)], [0.5, 0.5])


@pytest.mark.parametrize("weights", [[0.5, 0.6], [-0.5, 1.5], [math.nan, 1.0]])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(UserError, match="that sum to 1"):
        average_weights([ingredient(1), ingredient(2)], weights)


def test_a_greedy_soup_leaves_out_what_lowers_the_measure():
    values = {"far": 5.0, "near": 1.1, "exact": 1.0, "other side": 0.8}
    parts = [Ingredient(n, {"w": torch.tensor([v])}, None, None) for n, v in values.items()]
    soup = greedy_soup(parts, lambda each: -abs(each.tensors["w"].item() - 0.93))
    # Alone exact is best, .07 off, then other side; both .03, with near .037.
    assert soup.kept == ["exact", "other side"]
    assert soup.average.tensors["w"].item() == pytest.approx(0.9)
    assert [name for name, _ in soup.tried[4:]] == ["with other side", "with near", "with far"]


def test_a_file_is_read_as_any_weights_and_never_replaced(tmp_path, monkeypatch):
    path = tmp_path / "soup.safetensors"
    tensors = {"visual.a": torch.ones(2), "transformer.b": torch.zeros(3, 2).T}
    weights = Ingredient("x", tensors, 5.0, -3.0)
    write_weights(path, weights)
    assert load_file(path)["visual.a"].tolist() == [1, 1]
    read = read_weights(path)
    assert (read.logit_scale, read.logit_bias) == (pytest.approx(5.0), -3.0)
    with pytest.raises(UserError, match="exists; name another"):
        write_weights(path, weights)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        write_weights(tmp_path / "other.safetensors", weights)
    assert [each.name for each in tmp_path.iterdir()] == ["soup.safetensors"]
