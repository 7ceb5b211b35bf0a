"""Calibration finds the best scale and bias for a global batch, and says when there are none."""

import itertools
import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.losses import LogitScaleBias
from dist_siglip.losses.calibration import (
    Calibration,
    WeightedSimilarities,
    calibrate_on_features,
    calibrate_scale_bias,
    collect_similarities,
    set_logits,
)
from tests.support.processes import run_ranks
from tests.support.reference import sigmoid_loss_and_gradients, softplus

PAIR, OTHER, SPREAD = 0.30, 0.15, 0.04  # cosines of a CLIP checkpoint


def bell(mean):
    """A Gaussian of cosines, as values and weights that sum to 1."""
    values = mean + SPREAD * torch.linspace(-9, 9, 4001, dtype=torch.float64)
    weights = torch.exp(-(((values - mean) / SPREAD) ** 2) / 2)
    return values, weights / weights.sum()


def clip_like_features(num_pairs, width=452, seed=0):
    """Pairs with cosines of about 0.30, others of about 0.15, both spread by about 0.04."""
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return F.normalize(torch.randn(num_pairs, width, generator=generator), dim=-1)

    cone, concept = F.normalize(torch.randn(width, generator=generator), dim=0), noise()
    return tuple(
        F.normalize(
            OTHER**0.5 * cone + (PAIR - OTHER) ** 0.5 * concept + (1 - PAIR) ** 0.5 * noise(),
            dim=-1,
        )
        for _ in range(2)
    )


@pytest.mark.parametrize("global_batch_size", [256, 4096, 32768])
def test_gaussian_cosines_have_a_closed_form(global_batch_size):
    """The log odds of two Gaussians of equal width are a straight line."""
    negatives, weights = bell(OTHER)
    fitted = calibrate_scale_bias(
        WeightedSimilarities(*bell(PAIR)),
        WeightedSimilarities(negatives, weights * (global_batch_size - 1)),
        global_batch_size,
    )
    scale = (PAIR - OTHER) / SPREAD**2
    bias = -(PAIR**2 - OTHER**2) / (2 * SPREAD**2) - math.log(global_batch_size - 1)
    assert fitted.scale == pytest.approx(scale, rel=1e-6)
    assert fitted.bias == pytest.approx(bias, rel=1e-6)


def test_a_clip_checkpoint_under_the_sigmoid_loss_comes_down_from_half_a_million(caplog):
    images, texts = clip_like_features(2048)
    fitted = calibrate_on_features(images, texts, 32768, scale_before=100.0, bias_before=0.0)
    assert fitted.loss_before > 400_000
    assert 1 < fitted.loss_after < 10
    assert 60 < fitted.scale < 120
    assert OTHER < fitted.relative_bias < 0.5
    small = calibrate_on_features(images, texts, 4096, scale_before=100.0, bias_before=0.0)
    assert 50_000 < small.loss_before < 70_000
    assert fitted.bias - small.bias == pytest.approx(-math.log(8), abs=0.7)
    assert not caplog.records


def test_the_fit_is_where_the_gradient_of_the_loss_is_zero():
    """With the global batch as large as the pairs given, the loss is siglip_loss itself."""
    images, texts = (side.double() for side in clip_like_features(24, width=16))
    fitted = calibrate_on_features(images, texts, 24, scale_before=7.0, bias_before=-3.0)
    before = sigmoid_loss_and_gradients(images, texts, 7.0, -3.0)
    after = sigmoid_loss_and_gradients(images, texts, fitted.scale, fitted.bias)
    # Bins of 1e-4 hold the similarities of non-pairs.
    assert fitted.loss_before == pytest.approx(before["loss"].item(), rel=1e-7)
    assert fitted.loss_after == pytest.approx(after["loss"].item(), rel=1e-7)
    for name in ("scale", "bias"):
        assert abs(after[name]) < 1e-6 * abs(before[name])


def expected_loss(images, texts, ids, size, duplicates, scale, bias):
    """Mean loss over all batches of ``size`` of the pairs, in plain loops."""
    z = (scale * images @ texts.T + bias).tolist()
    total, batches = 0.0, list(itertools.combinations(range(len(ids)), size))
    for batch in batches:
        for i, j in itertools.product(batch, batch):
            is_duplicate = i != j and any(a == b for a, b in zip(ids[i], ids[j], strict=True))
            if is_duplicate and duplicates == "masked":
                continue
            is_positive = i == j or (is_duplicate and duplicates == "positive")
            total += softplus(-z[i][j] if is_positive else z[i][j])
    return total / size / len(batches)


@pytest.mark.parametrize("duplicates", ["negative", "positive", "masked"])
def test_the_objective_is_the_mean_over_all_batches(duplicates):
    ids, pictures = torch.tensor([1, 2, 1, 3, 3, 1]), torch.tensor([1, 2, 3, 2, 3, 4])
    generator = torch.Generator().manual_seed(3)
    concepts = torch.randn(4, 5, generator=generator, dtype=torch.float64)[ids]
    images, texts = (
        F.normalize(concepts + torch.randn(6, 5, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )

    def truth(scale, bias):
        both = list(zip(ids.tolist(), pictures.tolist(), strict=True))
        return expected_loss(images, texts, both, 4, duplicates, scale, bias)

    fitted = calibrate_on_features(
        images,
        texts,
        4,
        scale_before=3.0,
        bias_before=-1.0,
        caption_ids=ids,
        picture_ids=pictures,
        duplicates=duplicates,
    )
    assert fitted.loss_before == pytest.approx(truth(3.0, -1.0), rel=1e-7)
    assert fitted.loss_after == pytest.approx(truth(fitted.scale, fitted.bias), rel=1e-7)
    for d_scale, d_bias in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1), (0.1, -0.1), (-0.1, 0.1)):
        assert truth(fitted.scale + d_scale, fitted.bias + d_bias) > fitted.loss_after


def test_bins_change_nothing_that_matters():
    images, texts = (side.double() for side in clip_like_features(300))
    similarities = images @ texts.T
    is_own = torch.eye(300, dtype=torch.bool)
    exact = calibrate_scale_bias(similarities[is_own], similarities[~is_own], 32768)
    binned = calibrate_on_features(images, texts, 32768)
    assert binned.scale == pytest.approx(exact.scale, rel=1e-5)
    assert binned.bias == pytest.approx(exact.bias, rel=1e-5)
    assert binned.loss_after == pytest.approx(exact.loss_after, rel=1e-6)


def test_separable_pairs_stop_at_the_largest_scale_with_its_best_bias(caplog):
    pairs, others = torch.tensor([0.6, 0.5]), torch.tensor([0.1, 0.2, 0.0])
    fitted = calibrate_scale_bias(pairs, others, 64, max_scale=50.0)
    assert fitted.scale == 50
    assert "entirely separable" in caplog.text

    def loss(bias):
        positive = sum(softplus(-(50 * p + bias)) for p in pairs.tolist()) / 2
        return positive + 63 * sum(softplus(50 * n + bias) for n in others.tolist()) / 3

    assert fitted.loss_after == pytest.approx(loss(fitted.bias), rel=1e-9)
    assert loss(fitted.bias - 0.01) > fitted.loss_after < loss(fitted.bias + 0.01)


@pytest.mark.parametrize("far", [1e-4, 1.0, 1e4])
def test_any_start_and_any_spread_is_solved(far):
    """The result does not depend on the scale before, and stretches with the similarities."""
    pairs, others = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([-0.4, 0.0, 0.4, 0.0])
    fitted = calibrate_scale_bias(pairs, others, 256, scale_before=far, max_scale=1e6)
    wide = calibrate_scale_bias(pairs * 1e-3, others * 1e-3, 256, max_scale=1e6)
    assert wide.scale == pytest.approx(1e3 * fitted.scale, rel=1e-5)
    assert wide.bias == pytest.approx(fitted.bias, rel=1e-5)


def test_no_positive_scale_is_said_with_both_means():
    with pytest.raises(
        UserError, match=r"no scale above 0 fits: .* \(0\.1500\) is not above .*0\.2"
    ):
        calibrate_scale_bias(torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.3]), 64)


@pytest.mark.parametrize(
    ("pairs", "others", "size", "message"),
    [
        ([0.5], [0.1], 1, r"global_batch_size \(1\) must be at least 2"),
        ([], [0.1], 8, "positives are empty"),
        ([0.5], [], 8, "negatives are empty"),
        ([0.5, math.nan], [0.1], 8, "positives hold a similarity that is not finite"),
        ([0.5], [0.1, math.inf], 8, "negatives hold a similarity that is not finite"),
    ],
)
def test_what_cannot_be_fitted_is_named(pairs, others, size, message):
    with pytest.raises(UserError, match=message):
        calibrate_scale_bias(torch.tensor(pairs), torch.tensor(others), size)


def test_the_largest_scale_is_a_number_above_zero():
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"max_scale \(.*\) must be a finite number above 0"):
            calibrate_scale_bias(torch.ones(1), torch.zeros(1), 8, max_scale=wrong)


def test_roles_of_duplicates_need_ids():
    features = torch.eye(2)
    with pytest.raises(UserError, match=r"duplicates \('masked'\) needs caption_ids"):
        collect_similarities(features, features, 4, duplicates="masked")


@pytest.mark.parametrize("parameterization", ["absolute", "relative"])
def test_both_parameterisations_take_the_fit(parameterization):
    logits = LogitScaleBias(bias_parameterization=parameterization)
    set_logits(logits, Calibration(scale=89.5, bias=-30.3, loss_before=1.0, loss_after=0.5))
    assert [value.item() for value in logits()] == pytest.approx([89.5, -30.3], rel=1e-6)
    assert all(parameter.requires_grad for parameter in logits.parameters())


LAYOUTS = {2: ((20, 10), (30, 0)), 3: ((10, 10, 10), (16, 1, 13))}


def fit_on_ranks(rank, world_size):
    images, texts = (side.double() for side in clip_like_features(30))
    ids = torch.arange(30) % 20
    found = []
    for sizes in LAYOUTS[world_size]:
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for duplicates in ("negative", "positive"):
            mine = (images[rows], texts[rows], 512)
            fitted = calibrate_on_features(*mine, caption_ids=ids[rows], duplicates=duplicates)
            found.append((duplicates, fitted))
    broken = images.clone() if rank else images.clone().fill_(math.nan)
    try:
        calibrate_on_features(broken, texts, 512)
    except UserError as error:
        found.append(("error", str(error)))
    return found


@lru_cache
def results_of(world_size):
    return run_ranks(fit_on_ranks, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_fit_what_one_does_and_agree_to_the_bit(world_size):
    images, texts = (side.double() for side in clip_like_features(30))
    first, *others = results_of(world_size)
    assert all(found == first for found in others)
    for duplicates, fitted in first[:-1]:
        ids = torch.arange(30) % 20
        alone = calibrate_on_features(images, texts, 512, caption_ids=ids, duplicates=duplicates)
        for name in ("scale", "bias", "loss_before", "loss_after"):
            assert getattr(fitted, name) == pytest.approx(getattr(alone, name), rel=1e-9)
    assert first[-1] == ("error", "features to calibrate on are not all finite; check the weights")
