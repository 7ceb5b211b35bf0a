"""The distributed loss is the loss of one process: value and every gradient.

The reference is a plain loop in float64. Gradients are averaged over ranks as DDP does. Negative
controls show that the comparison rejects an exchange that detaches remote features, a bias of
the wrong sign and the mean over the local instead of the global batch.
"""

from functools import lru_cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_siglip.distributed import gather_rows, set_local_world_size, sum_over_ranks
from dist_siglip.losses import siglip_loss
from dist_siglip.losses.sigmoid import siglip_loss_output
from tests.support.parity import (
    EXCHANGES,
    LAYOUT_CASES,
    LAYOUTS,
    global_result,
    largest_error,
    make_rows,
)
from tests.support.processes import run_ranks
from tests.support.reference import sigmoid_loss_and_gradients

SCALE, BIAS = 7.0, -3.0
FROZEN = ("none", "image", "text", "features", "scalars")
CHUNKS = (1, 2, 1024)
DUPLICATES = ("positive", "masked", "negative")


def make_features(num_pairs, dtype=torch.float64):
    return tuple(make_rows(("image", "text"), num_pairs, dtype).values())


def local_arguments(layout, rank, dtype, frozen="none"):
    start = sum(layout[:rank])
    images, texts = make_features(sum(layout), dtype)
    rows = slice(start, start + layout[rank])
    scalar_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "image": images[rows].clone(),
        "text": texts[rows].clone(),
        "scale": torch.tensor([SCALE], dtype=scalar_dtype),
        "bias": torch.tensor([BIAS], dtype=scalar_dtype),
    }
    off = {"features": ("image", "text"), "scalars": ("scale", "bias")}.get(frozen, (frozen,))
    for name, value in arguments.items():
        value.requires_grad_(name not in off)
    return arguments


def caption_ids(num_pairs):
    """Equal ids within and across ranks, and some without an equal."""
    return torch.tensor([(7, 7, 5, -3, 7, 5, 11, 12)[i % 8] for i in range(num_pairs)])


def picture_ids(num_pairs):
    """Equal within and across ranks, of rows whose captions differ, and of some that are equal."""
    return torch.tensor([(1, 2, 2, 3, 3, 1, 1, 4)[i % 8] for i in range(num_pairs)])


def with_duplicates(layout, rank, exchange, frozen, duplicates, with_pictures=False):
    """Loss and gradients with ids, and the duplicates counted over all ranks."""
    start = sum(layout[:rank])
    rows = slice(start, start + layout[rank])
    ids = caption_ids(sum(layout))[rows]
    pictures = picture_ids(sum(layout))[rows] if with_pictures else None
    counted = []

    def loss_fn(*tensors):
        output = siglip_loss_output(
            *tensors,
            caption_ids=ids,
            picture_ids=pictures,
            duplicates=duplicates,
            exchange=exchange,
            chunk_rows=2,
        )
        counted[:] = [output.duplicate_pairs]
        return output.loss

    result = run_loss(loss_fn, local_arguments(layout, rank, torch.float64, frozen))
    return result, sum_over_ranks(counted[0]).item()


def run_loss(loss_fn, arguments):
    """``global_result`` of a loss that takes its arguments by position."""
    return global_result(lambda **named: loss_fn(*named.values()), arguments)


def all_cases(rank, world_size, layouts):
    if world_size == 4:
        set_local_world_size(2)  # two nodes of two ranks, for two_level
    results = {}
    for layout in layouts:
        for exchange in EXCHANGES:
            for frozen, duplicates in product(("none", "image"), DUPLICATES):
                results[layout, exchange, frozen, duplicates] = with_duplicates(
                    LAYOUTS[layout], rank, exchange, frozen, duplicates
                )
                results[layout, exchange, frozen, duplicates, "pictures"] = with_duplicates(
                    LAYOUTS[layout], rank, exchange, frozen, duplicates, with_pictures=True
                )
            for frozen in FROZEN:
                for chunk_rows in CHUNKS:

                    def loss_fn(*tensors, exchange=exchange, chunk_rows=chunk_rows):
                        return siglip_loss(*tensors, exchange=exchange, chunk_rows=chunk_rows)

                    arguments = local_arguments(LAYOUTS[layout], rank, torch.float64, frozen)
                    results[layout, exchange, frozen, chunk_rows] = run_loss(loss_fn, arguments)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                arguments = local_arguments(LAYOUTS[layout], rank, dtype)

                def loss_fn(*tensors, exchange=exchange):
                    return siglip_loss(*tensors, exchange=exchange)

                results[layout, exchange, str(dtype)] = run_loss(loss_fn, arguments)
        arguments = local_arguments(LAYOUTS[layout], rank, torch.float64)
        with torch.no_grad():
            results[layout, "no_grad"] = run_loss(siglip_loss, arguments)
        for name, broken in BROKEN.items():
            arguments = local_arguments(LAYOUTS[layout], rank, torch.float64)
            results[layout, name] = run_loss(broken, arguments)
    return results


def _dense(images, all_texts, scale, bias, first):
    logits = scale * images @ all_texts.T + bias
    signs = -torch.ones_like(logits)
    rows = torch.arange(len(images))
    signs[rows, rows + first] = 1
    return F.softplus(-signs * logits).sum()


def _first_row(rows):
    counts = gather_rows(torch.tensor([len(rows)]))
    rank = dist.get_rank() if dist.is_initialized() else 0
    return int(counts[:rank].sum()), int(counts.sum()), len(counts)


def detached(images, texts, scale, bias):
    """Right loss, but remote texts carry no gradient home."""
    first, total, world_size = _first_row(images)
    everyone = gather_rows(texts)
    everyone = torch.cat([everyone[:first], texts, everyone[first + len(texts) :]])
    return _dense(images, everyone, scale, bias, first) * world_size / total


def wrong_sign(images, texts, scale, bias):
    return siglip_loss(images, texts, scale, -bias)


def wrong_mean(images, texts, scale, bias):
    """Divides by the local batch instead of N / W."""
    _, total, world_size = _first_row(images)
    return siglip_loss(images, texts, scale, bias) * total / (world_size * max(len(images), 1))


def local_only(images, texts, scale, bias):
    """Every rank its own problem: no negatives from other ranks."""
    return _dense(images, texts, scale, bias, 0) / max(len(images), 1)


BROKEN = {
    "detached": detached,
    "wrong_sign": wrong_sign,
    "wrong_mean": wrong_mean,
    "local_only": local_only,
}


@lru_cache
def results_of(world_size):
    """One spawn per world size computes everything; the tests read it."""
    layouts = tuple(name for name, sizes in LAYOUTS.items() if len(sizes) == world_size)
    if world_size == 1:
        return [all_cases(0, 1, layouts)]
    return run_ranks(all_cases, world_size, layouts)


@lru_cache
def reference_of(num_pairs):
    images, texts = make_features(num_pairs)
    return sigmoid_loss_and_gradients(images, texts, SCALE, BIAS)


@pytest.fixture(scope="module", params=LAYOUT_CASES)
def layout(request):
    """Name of a layout, whose ranks have run by now."""
    results_of(len(LAYOUTS[request.param]))
    return request.param


def cases(layout):
    sizes = LAYOUTS[layout]
    return results_of(len(sizes)), reference_of(sum(sizes))


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_loss_and_gradients_match_one_process(layout, exchange, frozen):
    by_rank, reference = cases(layout)
    off = {"features": ("image", "text"), "scalars": ("scale", "bias")}.get(frozen, (frozen,))
    for results in by_rank:
        for chunk_rows in CHUNKS:
            result = results[layout, exchange, frozen, chunk_rows]
            assert largest_error(result, reference) < 1e-12
            for name in ("image", "text", "scale", "bias"):
                assert (result[name] is None) == (name in off)


@lru_cache
def reference_with_duplicates(num_pairs, duplicates):
    images, texts = make_features(num_pairs)
    ids = caption_ids(num_pairs)
    return sigmoid_loss_and_gradients(images, texts, SCALE, BIAS, ids, duplicates)


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_duplicates_within_and_across_ranks_match_one_process(layout, duplicates):
    by_rank, plain = cases(layout)
    reference = dict(reference_with_duplicates(sum(LAYOUTS[layout]), duplicates))
    num_duplicates = reference.pop("duplicates")
    assert num_duplicates > 0
    for results in by_rank:
        for exchange, frozen in product(EXCHANGES, ("none", "image")):
            result, counted = results[layout, exchange, frozen, duplicates]
            assert largest_error(result, reference) < 1e-12
            assert counted == num_duplicates
            if duplicates != "negative":  # the comparison can tell
                assert largest_error(result, plain) > 1e-3


@lru_cache
def reference_with_pictures(num_pairs, duplicates):
    images, texts = make_features(num_pairs)
    ids = torch.stack([caption_ids(num_pairs), picture_ids(num_pairs)], dim=1)
    return sigmoid_loss_and_gradients(images, texts, SCALE, BIAS, ids, duplicates)


@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_captions_of_one_picture_are_duplicates_on_whatever_ranks(layout, duplicates):
    by_rank, _ = cases(layout)
    num_pairs = sum(LAYOUTS[layout])
    reference = dict(reference_with_pictures(num_pairs, duplicates))
    num_duplicates = reference.pop("duplicates")
    captions_alone = dict(reference_with_duplicates(num_pairs, duplicates))
    assert num_duplicates > captions_alone.pop("duplicates")
    for results in by_rank:
        for exchange, frozen in product(EXCHANGES, ("none", "image")):
            result, counted = results[layout, exchange, frozen, duplicates, "pictures"]
            assert largest_error(result, reference) < 1e-12
            assert counted == num_duplicates
            if duplicates != "negative":  # pictures left out of sight would be seen
                assert largest_error(result, captions_alone) > 1e-3


# float32: rounding of sums of up to 100 terms. bfloat16: 8 bits of mantissa in the features and
# in the derivative that enters the gradient products. float16: 11 bits in the features only.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("torch.float32", 3e-6), ("torch.bfloat16", 5e-2), ("torch.float16", 5e-3)],
)
def test_reduced_precision_stays_within_its_rounding(layout, dtype, tolerance):
    by_rank, reference = cases(layout)
    for results in by_rank:
        for exchange in EXCHANGES:
            assert largest_error(results[layout, exchange, dtype], reference) < tolerance


def test_without_gradients_only_the_loss_is_computed(layout):
    by_rank, reference = cases(layout)
    for results in by_rank:
        result = results[layout, "no_grad"]
        assert largest_error(result, reference) < 1e-12
        assert [name for name, value in result.items() if value is not None] == ["loss"]


REJECTED = [
    (layout, broken)
    for layout in ("even-2", "uneven-2", "even-3", "uneven-3")
    for broken in BROKEN
    # With even local batches the local mean is the global one.
    if not (broken == "wrong_mean" and layout.startswith("even"))
]


@pytest.mark.parametrize(("layout", "broken"), REJECTED, indirect=["layout"])
def test_the_comparison_rejects_a_broken_loss(layout, broken):
    by_rank, reference = cases(layout)
    assert largest_error(by_rank[0][layout, broken], reference) > 1e-3


@pytest.mark.parametrize("layout", ["even-2", "uneven-2", "even-3", "uneven-3"], indirect=True)
def test_a_detached_exchange_has_the_right_loss_and_a_wrong_text_gradient(layout):
    """Why loss values alone prove nothing."""
    by_rank, reference = cases(layout)
    result = by_rank[0][layout, "detached"]
    assert largest_error({"loss": result["loss"], "image": result["image"]}, reference) < 1e-12
    assert largest_error({"text": result["text"]}, reference) > 1e-2
