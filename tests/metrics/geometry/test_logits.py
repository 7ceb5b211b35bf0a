"""The validation loss is comparable with the training loss, and logits are described in full."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import collect_pair_statistics, expected_sigmoid_loss, logit_summary
from tests.support import metric_reference

SCALE, BIAS = 8.0, -3.0


def _pairs(count=6):
    images = F.normalize(torch.randn(count, 4), dim=1)
    texts = F.normalize(torch.randn(count, 4), dim=1)
    return images, texts


def _statistics(images, texts, ids=None, scale=SCALE, bias=BIAS):
    ids = torch.arange(len(images)) if ids is None else ids
    return collect_pair_statistics(images, texts, ids, ids, logit_scale=scale, logit_bias=bias)


def test_loss_of_the_whole_gallery_is_the_plain_sigmoid_loss():
    images, texts = _pairs()
    expected = metric_reference.sigmoid_loss(images, texts, SCALE, BIAS)
    loss = expected_sigmoid_loss(_statistics(images, texts), 6)
    assert loss == pytest.approx(expected, rel=1e-13)


def test_equal_captions_count_as_in_training():
    images, texts = _pairs()
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    assert expected_sigmoid_loss(_statistics(images, texts, ids), 6) == pytest.approx(
        metric_reference.sigmoid_loss(images, texts, SCALE, BIAS), rel=1e-13
    )


@pytest.mark.parametrize("global_batch_size", [1, 2, 3, 5])
def test_loss_is_the_mean_over_all_batches_of_that_size(global_batch_size):
    images, texts = _pairs()
    losses = [
        metric_reference.sigmoid_loss(images[list(batch)], texts[list(batch)], SCALE, BIAS)
        for batch in itertools.combinations(range(6), global_batch_size)
    ]
    loss = expected_sigmoid_loss(_statistics(images, texts), global_batch_size)
    assert loss == pytest.approx(np.mean(losses), rel=1e-12)


def test_loss_at_the_start_of_siglip_is_the_known_number():
    # Orthogonal features, t = 10, b = -10: own pairs cost log(2), others softplus(-10).
    statistics = _statistics(torch.eye(8), torch.eye(8), scale=10.0, bias=-10.0)
    expected = math.log(2) + 7 * math.log1p(math.exp(-10))
    assert expected_sigmoid_loss(statistics, 8) == pytest.approx(expected, rel=1e-12)


def test_impossible_batch_sizes_are_refused():
    images, texts = _pairs(1)
    with pytest.raises(UserError, match="global_batch_size"):
        expected_sigmoid_loss(_statistics(images, texts), 0)
    with pytest.raises(UserError, match="1 pair"):
        expected_sigmoid_loss(_statistics(images, texts), 2)


def test_logit_summary_matches_the_plain_loop():
    images, texts = _pairs()
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    summary = logit_summary(_statistics(images, texts, ids))
    kinds = metric_reference.cosines_by_kind(images, texts, ids, ids)
    for name, cosines in zip(("positive_logit", "negative_logit"), kinds, strict=True):
        logits = SCALE * np.array(cosines) + BIAS
        expected = {
            f"{name}_mean": logits.mean(),
            f"{name}_std": logits.std(),
            f"{name}_min": logits.min(),
            f"{name}_max": logits.max(),
        }
        assert {key: summary[key] for key in expected} == pytest.approx(expected, rel=1e-11)
