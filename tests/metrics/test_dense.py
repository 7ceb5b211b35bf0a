"""Dense measures against plain loops in float64, on 1, 2 and 3 ranks, one of them without rows."""

import math

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics import (
    linear_label_map,
    patch_labels,
    patch_text_retrieval,
    pointing_accuracy,
    segmentation,
    vote_labels,
)
from tests.support.processes import run_ranks

CLASSES, TOKENS, WIDTH, BACKGROUND = 5, 6, 4, 3
COUNTS = {1: (9,), 2: (3, 6), 3: (4, 0, 5)}  # pictures of every rank
K, TEMPERATURE, RIDGE = 7, 0.2, 0.3


def pictures():
    """Tokens (9, T, C) and labels (9, T): class 4 occurs nowhere, and some tokens have no class."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(-1, 4, (9, TOKENS), generator=generator)
    centres = torch.randn(CLASSES + 1, WIDTH, generator=generator)
    tokens = centres[labels] + 0.8 * torch.randn(9, TOKENS, WIDTH, generator=generator)
    return tokens, labels


def loop_votes(query, bank, labels):
    """Shares of the classes, softmax over the cosines of the nearest."""

    def cosine(other):
        lengths = math.sqrt(sum(x * x for x in query) * sum(x * x for x in other))
        return sum(a * b for a, b in zip(query, other, strict=True)) / lengths

    known = [(cosine(row), label) for row, label in zip(bank, labels, strict=True) if label >= 0]
    nearest = sorted(known, reverse=True)[:K]
    total = sum(math.exp(score / TEMPERATURE) for score, _ in nearest)
    shares = [0.0] * CLASSES
    for score, label in nearest:
        shares[label] += math.exp(score / TEMPERATURE) / total
    return shares


def loop_map(tokens, labels):
    """Ridge regression by descent of the stated sum of squares, no equation solved."""
    known = [([*row, 1.0], label) for row, label in zip(tokens, labels, strict=True) if label >= 0]
    every = range(WIDTH + 1)
    squares = [[sum(row[i] * row[j] for row, _ in known) for j in every] for i in every]
    found = [[0.0] * CLASSES for _ in every]
    rate = 1 / (sum(squares[i][i] for i in every) + RIDGE)
    for c in range(CLASSES):
        target = [sum(row[i] for row, label in known if label == c) for i in every]
        for _ in range(4000):
            column = [found[i][c] for i in every]
            for i in every:
                slope = sum(squares[i][j] * column[j] for j in every) - target[i]
                found[i][c] -= rate * (slope + RIDGE * column[i])
    return found


def loop_segmentation(predicted, labels):
    ious = []
    for c in range(CLASSES):
        pairs = [(p, t) for p, t in zip(predicted, labels, strict=True) if t >= 0]
        both = sum(p == c and t == c for p, t in pairs)
        either = sum(c in (p, t) for p, t in pairs)
        ious.append(both / either if either else math.nan)
    objects = [p == t for p, t in zip(predicted, labels, strict=True) if t not in (-1, BACKGROUND)]
    seen = [iou for iou in ious if iou == iou]
    return sum(objects) / len(objects), sum(seen) / len(seen), ious


def loop_pointing(scores, labels):
    hits = []
    for picture, own in zip(scores, labels, strict=True):
        for c in set(own) - {-1, BACKGROUND}:
            best = max(range(TOKENS), key=lambda place, c=c, rows=picture: rows[place][c])
            hits.append(own[best] == c)
    return sum(hits) / len(hits)


def loop_retrieval(scores, labels):
    """Share of tokens whose own text is first, and mean over objects of the average precision."""
    objects = [c for c in range(CLASSES) if c != BACKGROUND]
    first, precisions = [], []
    for picture, own in zip(scores, labels, strict=True):
        for row, label in zip(picture, own, strict=True):
            if label in objects:
                first.append(all(row[label] > row[c] for c in objects if c != label))
        for c in set(own) & set(objects):
            known = [
                (row[c], label == c) for row, label in zip(picture, own, strict=True) if label >= 0
            ]
            own_scores = [score for score, is_right in known if is_right]
            shares = [
                sum(is_right for s, is_right in known if s >= score)
                / sum(s >= score for s, _ in known)
                for score in own_scores
            ]
            precisions.append(sum(shares) / len(shares))
    return sum(first) / len(first), sum(precisions) / len(precisions)


def text_scores():
    """(9, T, K) cosines of tokens and texts; coarse, so that some are equal."""
    scores = torch.rand(9, TOKENS, CLASSES, generator=torch.Generator().manual_seed(8))
    return (scores * 12).round() / 12


def measure(rank, world_size):
    tokens, labels = (column.split(COUNTS[world_size])[rank] for column in pictures())
    flat, own = tokens.flatten(0, 1), labels.flatten()
    votes = {
        exchange: vote_labels(
            flat,
            2 * flat.flip(1),  # another order of channels, so that no token finds itself
            own,
            CLASSES,
            k=K,
            temperature=TEMPERATURE,
            chunk_rows=5,
            exchange=exchange,
        )
        for exchange in ("ring", "all_gather", "auto")
    }
    predicted = votes["ring"].argmax(dim=1)
    return {
        "votes": votes,
        "map": linear_label_map(flat, own, CLASSES, ridge=RIDGE),
        "segmentation": segmentation(predicted, own, CLASSES, background=BACKGROUND),
        "pointing": pointing_accuracy(
            votes["ring"].view(*labels.shape, CLASSES), labels, background=BACKGROUND
        ),
        "retrieval": patch_text_retrieval(
            text_scores().split(COUNTS[world_size])[rank], labels, background=BACKGROUND
        ),
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def everyone(request):
    return run_ranks(measure, request.param)


@pytest.fixture(scope="module")
def expected():
    tokens, labels = pictures()
    rows, flat = tokens.flatten(0, 1).double().tolist(), labels.flatten().tolist()
    bank = [row[::-1] for row in rows]
    votes = [loop_votes(row, bank, flat) for row in rows]
    predicted = [row.index(max(row)) for row in votes]
    by_picture = torch.tensor(votes).view(*labels.shape, CLASSES).tolist()
    return {
        "votes": votes,
        "map": loop_map(rows, flat),
        "segmentation": loop_segmentation(predicted, flat),
        "pointing": loop_pointing(by_picture, labels.tolist()),
        "retrieval": loop_retrieval(text_scores().tolist(), labels.tolist()),
    }


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "auto"])
def test_votes_are_those_of_the_bank_of_all_ranks(everyone, expected, exchange):
    found = torch.cat([mine["votes"][exchange] for mine in everyone])
    torch.testing.assert_close(found, torch.tensor(expected["votes"], dtype=torch.float64))


def test_the_map_is_that_of_the_rows_of_all_ranks(everyone, expected):
    for mine in everyone:
        wanted = torch.tensor(expected["map"], dtype=torch.float64)
        torch.testing.assert_close(mine["map"], wanted, atol=1e-6, rtol=1e-6)


def test_shares_count_the_tokens_of_all_ranks(everyone, expected):
    accuracy, mean_iou, ious = expected["segmentation"]
    for mine in everyone:
        assert mine["segmentation"].accuracy == pytest.approx(accuracy)
        assert mine["segmentation"].mean_iou == pytest.approx(mean_iou)
        assert mine["segmentation"].ious.tolist() == pytest.approx(ious, nan_ok=True)
        assert mine["pointing"] == pytest.approx(expected["pointing"])
        assert mine["retrieval"] == pytest.approx(expected["retrieval"])


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    labels = torch.tensor([[0, 1, 1, 0, 2, 1, -1]])
    scores = torch.tensor([[0.5, 0.5, 0.9, 0.1, 0.3, 0.2, 0.7]])[:, :, None].expand(1, 7, 3)
    known, values = labels[0, :6], scores[0, :6, 0]
    each = [average_precision_score(known == c, values) for c in range(3)]
    found = patch_text_retrieval(scores, labels)
    assert found.mean_average_precision == pytest.approx(sum(each) / 3)
    assert found.recall_at_1 == 0  # all classes have one score: ties count against the query


def test_rows_and_columns_of_tokens_and_texts_swapped_are_another_number():
    scores = text_scores()
    labels = pictures()[1]
    swapped = scores.flip(2)
    assert patch_text_retrieval(scores, labels) != patch_text_retrieval(swapped, labels)


def loop_patch_labels(mask, height, width):
    """The most frequent label of each patch; of equals the lowest, those below 0 last."""
    found = []
    for top in range(0, len(mask) - height + 1, height):
        for left in range(0, len(mask[0]) - width + 1, width):
            block = [
                mask[i][j] for i in range(top, top + height) for j in range(left, left + width)
            ]
            order = [*range(CLASSES), -1]
            found.append(max(order, key=lambda c, b=block: (b.count(c), -order.index(c))))
    return found


@pytest.mark.parametrize("patch_size", [(2, 2), (3, 2), (2, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_patches_have_the_class_of_most_of_their_pixels(patch_size, dtype):
    masks = torch.randint(-1, CLASSES, (6, 7, 11), generator=torch.Generator().manual_seed(1))
    masks = masks.clamp_max(2)  # so that majorities and ties are frequent
    found = patch_labels(masks.to(dtype), patch_size, CLASSES)
    assert found.tolist() == [loop_patch_labels(mask, *patch_size) for mask in masks.tolist()]
    assert found.dtype == torch.int64
    assert patch_labels(masks[:0], patch_size, CLASSES).shape == (0, found.shape[1])


def test_a_mean_of_the_means_of_ranks_is_another_number():
    """What the all-reduce is for: ranks hold tokens of other classes."""
    predicted, labels = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    of_ranks = [
        segmentation(told, own, 2).mean_iou
        for told, own in zip(predicted.split((2, 4)), labels.split((2, 4)), strict=True)
    ]
    assert sum(of_ranks) / 2 == pytest.approx(5 / 12)
    assert segmentation(predicted, labels, 2).mean_iou == pytest.approx(1 / 2)


def test_a_bank_shorter_than_k_votes_as_a_whole_and_an_empty_one_not_at_all():
    bank, labels = torch.eye(3), torch.tensor([1, 0, -1])
    votes = vote_labels(bank, bank, labels, 2, k=10, temperature=1.0)
    e = math.e / (math.e + 1)
    torch.testing.assert_close(
        votes, torch.tensor([[1 - e, e], [e, 1 - e], [0.5, 0.5]], dtype=torch.float64)
    )
    assert vote_labels(bank, bank, -labels.abs() - 1, 2).tolist() == [[0.0, 0.0]] * 3


def test_nothing_to_measure_is_no_number():
    empty = torch.empty(0, dtype=torch.int64)
    found = segmentation(empty, empty, 2)
    assert math.isnan(found.accuracy)
    assert math.isnan(found.mean_iou)
    none = torch.zeros(1, 2).long() - 1
    assert math.isnan(pointing_accuracy(torch.zeros(1, 2, 1), none))
    assert all(math.isnan(each) for each in patch_text_retrieval(torch.zeros(1, 2, 1), none))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, c: vote_labels(t, t, c, 2), r"bank_labels has a class 2; they must be below"),
        (lambda t, c: vote_labels(t, t, c, 3, temperature=0.0), r"temperature \(0.0\) of votes"),
        (lambda t, c: vote_labels(t, t, c, 3, k=0), r"k \(0\)"),
        (lambda t, c: linear_label_map(t, c, 3, ridge=0.0), r"ridge \(0.0\) must be above 0"),
        (lambda t, c: linear_label_map(t, c.float(), 3), r"labels \(torch.float32\) must be int64"),
        (lambda t, c: linear_label_map(t / 0, c, 3), "tokens row 0"),
        (lambda t, c: segmentation(-c, c, 3), "predicted has a class -2; they must be at least 0"),
        (lambda t, c: segmentation(c[:2], c, 3), r"predicted \(2,\) must be \(3,\)"),
        (lambda t, c: segmentation(c, c, 0), r"num_classes \(0\) must be at least 1"),
        (lambda t, c: patch_text_retrieval(t[None], c), r"scores \(1, 3, 3\) must be \(B, T, K\)"),
        (
            lambda t, c: patch_text_retrieval(t[None], c[None] + 1),
            "labels has a class 3; they must",
        ),
        (lambda t, c: pointing_accuracy(t[None], c), r"scores \(1, 3, 3\) must be \(B, T, K\)"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.eye(3), torch.arange(3))
