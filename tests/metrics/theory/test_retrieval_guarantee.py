"""The loss of random batches bounds retrieval: never above the truth, and attained."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import collect_pair_statistics, expected_sigmoid_loss, retrieval_guarantee
from tests.support import reference_geometry


def _statistics(images, texts, logit_scale=40.0, logit_bias=-20.0):
    ids = torch.arange(len(images))
    return collect_pair_statistics(
        images, texts, ids, ids, logit_scale=logit_scale, logit_bias=logit_bias
    )


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("batch_size", [10, 25, 40])
def test_it_is_never_above_the_share_that_is_found(noise, batch_size):
    images = F.normalize(torch.randn(40, 30), dim=1)
    texts = F.normalize(images + noise * torch.randn(40, 30), dim=1)
    loss = expected_sigmoid_loss(_statistics(images, texts), batch_size)
    found = retrieval_guarantee(loss, batch_size, 40)
    for one, other in ((images, texts), (texts, images)):
        assert found.recall <= 1 - reference_geometry.wrong_first_items(one, other) / 40
    assert found.is_vacuous == (found.recall == 0)


def test_a_good_model_is_guaranteed_almost_everything():
    loss = expected_sigmoid_loss(_statistics(torch.eye(50), torch.eye(50)), 50)
    found = retrieval_guarantee(loss, 50, 50)
    assert 0.999 < found.recall < 1
    assert not found.is_vacuous


def test_the_whole_gallery_gives_the_largest_bound():
    images = F.normalize(torch.randn(40, 30), dim=1)
    statistics = _statistics(images, images)
    bounds = [
        retrieval_guarantee(expected_sigmoid_loss(statistics, size), size, 40).recall
        for size in range(2, 41)
    ]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 0


def test_one_wrong_item_that_costs_no_more_than_it_must_is_all_that_is_lost():
    # Text 0 scores 0 with its image: log 2; everything else costs next to nothing.
    loss = math.log(2) / 10
    assert retrieval_guarantee(loss, 10, 10).recall == pytest.approx(1 - 1 / 9)


def test_a_loss_that_says_nothing_is_called_so():
    found = retrieval_guarantee(2.3, 512, 5000)
    assert (found.recall, found.is_vacuous) == (0.0, True)
    assert found.xi == pytest.approx(512 * 2.3 / math.log(2))


@pytest.mark.parametrize(
    ("loss", "batch", "words"), [(0.1, 1, "2 to"), (0.1, 9, "2 to"), (-1, 4, "loss")]
)
def test_impossible_arguments_are_refused(loss, batch, words):
    with pytest.raises(UserError, match=words):
        retrieval_guarantee(loss, batch, 8)
