"""The composition: its names, its arrays, padding and repeated samples."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import PairEvaluation, evaluate_pairs
from tests.support import metric_reference

SETTINGS = {"logit_scale": 10.0, "logit_bias": -5.0, "global_batch_size": 12}
NAMES = {
    *(
        f"{direction}_{name}"
        for direction in ("image_to_text", "text_to_image")
        for name in ("recall@1", "recall@5", "recall@10", "median_rank")
    ),
    *(f"positive_logit_{name}" for name in ("mean", "std", "min", "max")),
    *(f"negative_logit_{name}" for name in ("mean", "std", "min", "max")),
    *("loss", "margin", "relative_bias", "margin_5_95", "relative_bias_5_95", "modality_gap"),
    *("relative_modality_gap", "mean_pair_distance", "alignment", "positive_cosine"),
    *("image_cosine", "text_cosine", "image_uniformity", "text_uniformity"),
    *("margin_of_means", "relative_bias_of_means", "cross_uniformity", "guaranteed_recall@1"),
    *("xi", "xi_unsquared", "images_on_their_side", "texts_on_their_side"),
    *(
        f"{side}_{name}"
        for side in ("image", "text")
        for name in (
            *("effective_rank", "components_80", "components_90", "resultant_length"),
            *("row_margin_min", "row_margin_mean"),
        )
    ),
    *(
        f"{direction}_{name}"
        for direction in ("image_to_text", "text_to_image")
        for name in ("hubness", "top_hub_share", "orphans")
    ),
    *("linear_separability", "gallery_pairs", "distinct_captions", "distinct_pictures"),
}


def _pairs(count=12, dim=6):
    images = F.normalize(torch.randn(count, dim), dim=1)
    texts = F.normalize(images + 0.3 * torch.randn(count, dim), dim=1)
    texts[1::2] = texts[::2]  # two pictures with one caption
    ids = torch.arange(count) // 2 + 100
    return images, texts, ids, ids.clone(), torch.randperm(count)


def test_every_metric_has_its_name_and_is_a_number():
    metrics = evaluate_pairs(*_pairs(), **SETTINGS).metrics
    assert set(metrics) == NAMES
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_numbers_are_those_of_the_plain_loops():
    images, texts, ids, *_ = pairs = _pairs()
    metrics = evaluate_pairs(*pairs, **SETTINGS).metrics
    ranks = metric_reference.ranks(images, texts[::2], ids, ids[::2])
    assert metrics["image_to_text_recall@1"] == np.mean([rank <= 1 for rank in ranks])
    assert metrics["image_to_text_median_rank"] == np.median(ranks)
    assert metrics["loss"] == pytest.approx(
        metric_reference.sigmoid_loss(images, texts, 10.0, -5.0), rel=1e-12
    )
    gap = metric_reference.gap(images, texts)
    assert metrics["modality_gap"] == pytest.approx(gap["centroid_distance"], rel=1e-6)
    assert metrics["gallery_pairs"] == 12
    assert metrics["distinct_captions"] == 6
    assert metrics["distinct_pictures"] == 12


def _captions_of_pictures():
    """Six pictures with five captions each; features as good as can be."""
    pictures = torch.arange(30) // 5
    images = torch.eye(6)[pictures]
    texts = F.normalize(images + 0.05 * torch.randn(30, 6), dim=1)
    return images, texts, torch.arange(30) + 50, pictures + 900


def test_a_picture_with_a_row_for_each_caption_is_one_picture():
    images, texts, ids, pictures = _captions_of_pictures()
    rows = (images, texts, ids, ids, torch.arange(30))
    metrics = evaluate_pairs(*rows, **SETTINGS, picture_ids=pictures).metrics
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[f"{direction}_recall@1"] == 1
        assert metrics[f"{direction}_median_rank"] == 1
    assert metrics["margin"] > 0
    counts = ("gallery_pairs", "distinct_captions", "distinct_pictures")
    assert [metrics[name] for name in counts] == [30, 30, 6]
    apart = evaluate_pairs(*rows, **SETTINGS).metrics  # every row a picture of its own
    assert apart["text_to_image_recall@1"] == 0
    assert apart["margin"] < 0


def test_pictures_and_captions_that_both_repeat_are_ranked_as_the_plain_loops_do():
    pictures, captions = torch.arange(40) % 9, torch.arange(40) * 7 % 11
    images = F.normalize(torch.randn(9, 5), dim=1)[pictures]
    texts = F.normalize(torch.randn(11, 5), dim=1)[captions]
    sample_ids = torch.randperm(40)
    evaluation = evaluate_pairs(
        images, texts, captions, captions, sample_ids, **SETTINGS, picture_ids=pictures
    )
    expected = metric_reference.pair_ranks(images, texts, pictures, captions, sample_ids)
    order = sample_ids.argsort().tolist()
    for direction, ranks in zip(("image_to_text", "text_to_image"), expected, strict=True):
        assert evaluation.arrays[f"{direction}_ranks"].tolist() == [ranks[i] for i in order]
        hits = np.mean([rank <= 5 for rank in ranks])
        assert evaluation.metrics[f"{direction}_recall@5"] == pytest.approx(hits)


def test_loss_is_that_of_the_whole_gallery_unless_a_batch_size_is_given():
    pairs = _pairs()
    default = evaluate_pairs(*pairs, logit_scale=10.0, logit_bias=-5.0).metrics["loss"]
    assert default == evaluate_pairs(*pairs, **SETTINGS).metrics["loss"]
    smaller = evaluate_pairs(*pairs, **(SETTINGS | {"global_batch_size": 4})).metrics["loss"]
    assert smaller < default


def test_arrays_are_sorted_by_sample_and_cut():
    images, texts, ids, _, sample_ids = pairs = _pairs()
    arrays = evaluate_pairs(*pairs, **SETTINGS, array_pairs=5).arrays
    order = sample_ids.argsort()
    assert arrays["sample_ids"].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(arrays["image_features"], images[order[:5]].numpy())
    assert np.array_equal(arrays["text_features"], texts[order[:5]].numpy())
    assert np.array_equal(arrays["caption_ids"], ids[order[:5]].numpy())
    expected = metric_reference.ranks(images[order], texts[::2], ids[order], ids[::2])
    assert arrays["image_to_text_ranks"].tolist() == expected
    assert arrays["text_to_image_ranks"].shape == (12,)
    assert len(arrays["histogram_edges"]) == len(arrays["positive_histogram"]) + 1
    assert arrays["positive_histogram"].sum() + arrays["negative_histogram"].sum() == 144


def test_repeated_samples_count_once():
    pairs = _pairs()
    repeated = [torch.cat([column, column[3:7]]) for column in pairs]
    again = evaluate_pairs(*repeated, **SETTINGS).metrics
    assert again == pytest.approx(evaluate_pairs(*pairs, **SETTINGS).metrics, rel=1e-12)


def test_collected_batches_without_padding_equal_one_call():
    pairs = _pairs()
    evaluation = PairEvaluation()
    evaluation.update(*(column[:7] for column in pairs))
    padded = [torch.cat([column[7:], column[:2]]) for column in pairs]
    evaluation.update(*padded, valid=torch.tensor([True] * 5 + [False] * 2))
    expected = evaluate_pairs(*pairs, **SETTINGS)
    assert evaluation.compute(**SETTINGS).metrics == expected.metrics


def test_compute_follows_its_arguments_and_reset_forgets():
    evaluation = PairEvaluation()
    evaluation.update(*_pairs())
    first = evaluation.compute(**SETTINGS).metrics
    other = evaluation.compute(**(SETTINGS | {"logit_bias": 0.0})).metrics
    assert first["loss"] != other["loss"]
    evaluation.reset()
    evaluation.update(*_pairs(4))
    assert evaluation.compute(**SETTINGS).metrics["gallery_pairs"] == 4


def test_states_stay_out_of_checkpoints():
    evaluation = PairEvaluation()
    evaluation.update(*_pairs())
    assert evaluation.state_dict() == {}


def test_padding_rows_may_hold_anything():
    images, texts, *ids = _pairs(4)
    images[2] = math.nan
    evaluation = PairEvaluation()
    evaluation.update(images, texts, *ids, valid=torch.tensor([True, True, False, True]))
    assert evaluation.compute(**SETTINGS).metrics["gallery_pairs"] == 3


def test_rows_that_are_no_pairs_are_refused():
    images, texts, image_ids, text_ids, sample_ids = _pairs()
    text_ids[5] = 999
    with pytest.raises(UserError, match=r"row 5 is no pair.*999"):
        evaluate_pairs(images, texts, image_ids, text_ids, sample_ids, **SETTINGS)


def test_missing_texts_are_refused():
    images, texts, image_ids, text_ids, sample_ids = _pairs()
    with pytest.raises(UserError, match=r"images \(12\), texts \(11\)"):
        evaluate_pairs(images, texts[1:], image_ids, text_ids[1:], sample_ids, **SETTINGS)


def _plain_prefix(rows, dim, turn=None):
    cut = rows.double() if turn is None else rows.double() @ turn
    return F.normalize(cut[:, :dim], dim=1)


def test_prefixes_are_measured_cut_and_rotated():
    images, texts, ids, text_ids, samples = _pairs()
    images = F.normalize(images * torch.tensor([0.1, 0.2, 1.0, 0.1, 2.0, 0.1]), dim=1)
    pairs = (images, texts, ids, text_ids, samples)
    metrics = evaluate_pairs(*pairs, **SETTINGS, prefix_dims=(6, 2)).metrics
    assert {name for name in metrics if not name.startswith(("prefix_", "pca_"))} == NAMES
    _, vectors = torch.linalg.eigh(sum(torch.outer(row, row) for row in images.double()))
    for way, turn in (("prefix", None), ("pca", vectors.flip(1))):
        cut = [_plain_prefix(side, 2, turn) for side in (images, texts)]
        alone = evaluate_pairs(*(side.float() for side in cut), *pairs[2:], **SETTINGS).metrics
        for name in (
            *("image_to_text_recall@1", "text_to_image_recall@5", "margin", "relative_bias"),
            *("margin_5_95", "modality_gap"),
        ):
            found = metrics[f"{way}_2_{name}"]
            assert found == pytest.approx(alone[name], abs=1e-5), name
            # A rotation of all columns keeps every cosine.
            assert metrics[f"{way}_6_{name}"] == pytest.approx(metrics[name], abs=1e-5), name
    assert metrics["pca_2_margin"] != pytest.approx(metrics["prefix_2_margin"], abs=1e-3)


def test_a_prefix_larger_than_the_features_is_refused():
    with pytest.raises(UserError, match=r"dim \(7\) must be 1 to 6"):
        evaluate_pairs(*_pairs(), **SETTINGS, prefix_dims=(7,))
