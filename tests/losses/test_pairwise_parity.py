"""Softmax, geometry, weighted and multimodal losses are those of one process, with gradients.

References are plain loops in float64. Negative controls show that the comparison rejects remote
rows without gradient, a normaliser over the local batch and a missing or doubled factor.
"""

from functools import lru_cache, partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_siglip.distributed import gather_rows, set_local_world_size, sum_over_ranks
from dist_siglip.losses import (
    ClipLoss,
    SigLipLoss,
    WeightedLoss,
    alignment_loss,
    cross_uniformity_loss,
    multimodal_sigmoid_loss,
    softmax_loss,
    uniformity_loss,
)
from tests.support.parity import (
    EXCHANGES,
    LAYOUT_CASES,
    LAYOUTS,
    global_result,
    largest_error,
    layouts_of,
    local_rows,
    make_rows,
)
from tests.support.processes import run_ranks
from tests.support.reference import sigmoid_loss_and_gradients
from tests.support.reference_pairwise import (
    alignment_and_gradients,
    cross_uniformity_and_gradients,
    multimodal_loss_and_gradients,
    softmax_loss_and_gradients,
    uniformity_and_gradients,
    weighted_sum,
)

SCALE, BIAS = 7.0, -3.0
SIDES, SCALARS = ("image", "text", "audio"), {"scale": SCALE, "bias": BIAS}


def alignment(image, text, **options):
    return alignment_loss(image, text)


def softmax(image, text, scale, **options):
    return softmax_loss(image, text, scale, **options)


def uniformity(image, **options):
    return uniformity_loss(image, **options)


def cross_uniformity(image, text, **options):
    return cross_uniformity_loss(image, text, **options)


def cua(image, text, scale, **options):
    return WeightedLoss(ClipLoss(**options), **options)(image, text, scale, None)


def cuaxu(image, text, scale, bias, **options):
    loss = WeightedLoss(SigLipLoss(**options), 0.7, 0.5, 0.3, **options)
    return loss(image, text, scale, bias)


def complete(image, text, audio, scale, bias, **options):
    return multimodal_sigmoid_loss([image, text, audio], scale, bias, **options)


def star(image, text, audio, scale, bias, **options):
    return multimodal_sigmoid_loss([image, text, audio], scale, bias, graph="star", **options)


LOSSES = {
    softmax: ("image", "text", "scale"),
    alignment: ("image", "text"),
    uniformity: ("image",),
    cross_uniformity: ("image", "text"),
    cua: ("image", "text", "scale"),
    cuaxu: ("image", "text", "scale", "bias"),
    complete: ("image", "text", "audio", "scale", "bias"),
    star: ("image", "text", "audio", "scale", "bias"),
}
BY_NAME = {loss.__name__: loss for loss in LOSSES}
FROZEN = {
    softmax: (("image",), ("text",), ("image", "text"), ("scale",), ("image", "scale")),
    cross_uniformity: (("image",), ("text",), ("image", "text")),
    cuaxu: (("text", "bias"),),
}
FEW_EXCHANGES = ("ring", "all_gather")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache
def reference_of(loss_name, num_rows):
    rows = make_rows(SIDES, num_rows)
    images, texts = rows["image"], rows["text"]
    if loss_name in ("complete", "star"):
        edges = [("image", "text"), ("image", "audio"), ("text", "audio")]
        edges = edges if loss_name == "complete" else edges[:2]
        return multimodal_loss_and_gradients(rows, SCALE, BIAS, edges)
    parts = {
        "softmax": softmax_loss_and_gradients(images, texts, SCALE),
        "alignment": alignment_and_gradients(images, texts),
        "uniformity": uniformity_and_gradients(images),
        "cross_uniformity": cross_uniformity_and_gradients(images, texts),
    }
    if loss_name in parts:
        return parts[loss_name]
    both = weighted_sum(
        (0.5, parts["uniformity"]), (0.5, uniformity_and_gradients(texts, name="text"))
    )
    if loss_name == "cua":
        return weighted_sum((1, parts["softmax"]), (1, parts["alignment"]), (1, both))
    return weighted_sum(
        (1, sigmoid_loss_and_gradients(images, texts, SCALE, BIAS)),
        (0.7, parts["alignment"]),
        (0.5, both),
        (0.3, parts["cross_uniformity"]),
    )


def local_arguments(names, layout, rank, dtype=torch.float64, frozen=()):
    rows = local_rows(make_rows(SIDES, sum(layout), dtype), layout, rank)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = {**rows, **{name: torch.tensor([x], dtype=wide) for name, x in SCALARS.items()}}
    return {name: values[name].requires_grad_(name not in frozen) for name in names}


def all_cases(rank, world_size):
    if world_size == 4:
        set_local_world_size(2)  # two nodes of two ranks, for two_level
    results = {}
    for layout_name in layouts_of(world_size):
        layout = LAYOUTS[layout_name]
        for loss, names in LOSSES.items():
            key = (layout_name, loss.__name__)
            for exchange in EXCHANGES:
                fn = partial(loss, exchange=exchange, chunk_rows=2)
                arguments = local_arguments(names, layout, rank)
                results[(*key, exchange)] = global_result(fn, arguments)
            for exchange, frozen in product(FEW_EXCHANGES, FROZEN.get(loss, ())):
                fn = partial(loss, exchange=exchange, chunk_rows=3)
                arguments = local_arguments(names, layout, rank, frozen=frozen)
                results[(*key, exchange, frozen)] = global_result(fn, arguments)
            for dtype in DTYPES:
                arguments = local_arguments(names, layout, rank, dtype)
                results[(*key, str(dtype))] = global_result(loss, arguments)
            with torch.no_grad():
                arguments = local_arguments(names, layout, rank)
                results[(*key, "no_grad")] = global_result(loss, arguments)
        for name, (broken, loss) in BROKEN.items():
            arguments = local_arguments(LOSSES[loss], layout, rank)
            results[layout_name, name] = global_result(broken, arguments)
    return results


def _everyone(rows, *, detached):
    """All ranks' rows in rank order, with this rank's own as they are; and its first row."""
    counts = gather_rows(torch.tensor([len(rows)]))
    rank = dist.get_rank() if dist.is_initialized() else 0
    first = int(counts[:rank].sum())
    gathered = gather_rows(rows)
    own = rows.detach() if detached else rows
    return torch.cat([gathered[:first], own, gathered[first + len(rows) :]]), first


def _half_softmax(rows, all_columns, scale, first):
    logits = scale * rows @ all_columns.T
    return F.cross_entropy(logits, torch.arange(len(rows)) + first, reduction="sum") / 2


def detached_columns(image, text, scale):
    """Right loss, but rows of other ranks carry no gradient home."""
    all_images, first = _everyone(image, detached=False)
    all_texts, _ = _everyone(text, detached=False)
    total = _half_softmax(image, all_texts, scale, first)
    total = total + _half_softmax(text, all_images, scale, first)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return total * world_size / len(all_images)


def local_softmax(image, text, scale):
    """Every rank normalises over its own rows."""
    if not len(image):
        return 0 * (image.sum() + text.sum() + scale.sum())
    total = _half_softmax(image, text, scale, 0) + _half_softmax(text, image, scale, 0)
    return total / len(image)


def doubled_scale(image, text, scale):
    """The gradient of the scale is summed over ranks before DDP takes its mean (Inf-CL)."""
    loss = softmax_loss(image, text, scale)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    through_scale = softmax_loss(image.detach(), text.detach(), scale)
    return loss + (world_size - 1) * (through_scale - through_scale.detach())


def _kernel_sum(rows, columns, first):
    kernel = (-2 * torch.cdist(rows, columns).square()).exp()
    own = torch.arange(len(rows))
    keep = torch.ones_like(kernel)
    keep[own, own + first] = 0
    return (kernel * keep).sum()


def local_uniformity(image):
    """Every rank takes the logarithm of its own mean."""
    if len(image) < 2:
        return 0 * image.sum()
    return (_kernel_sum(image, image, 0) / (len(image) * (len(image) - 1))).log()


def one_sided_uniformity(image):
    """Pairs push the row but not the column: half of every gradient."""
    everyone, first = _everyone(image, detached=True)
    total = _kernel_sum(image, everyone, first)
    mean = sum_over_ranks(total) / (len(everyone) * (len(everyone) - 1))
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    share = total / sum_over_ranks(total)  # gradient of the log of the global sum
    return mean.log() + world_size * (share - share.detach())


def unscaled_uniformity(image):
    """The factor W that DDP's mean takes away is missing."""
    loss = uniformity_loss(image)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return loss.detach() + (loss - loss.detach()) / world_size


BROKEN = {
    "detached_columns": (detached_columns, softmax),
    "local_softmax": (local_softmax, softmax),
    "doubled_scale": (doubled_scale, softmax),
    "local_uniformity": (local_uniformity, uniformity),
    "one_sided_uniformity": (one_sided_uniformity, uniformity),
    "unscaled_uniformity": (unscaled_uniformity, uniformity),
}


@lru_cache
def results_of(world_size):
    """One spawn per world size computes everything; the tests read it."""
    return [all_cases(0, 1)] if world_size == 1 else run_ranks(all_cases, world_size)


@pytest.fixture(scope="module", params=LAYOUT_CASES)
def layout(request):
    """Name of a layout, whose ranks have run by now."""
    results_of(len(LAYOUTS[request.param]))
    return request.param


def cases(layout, loss_name):
    sizes = LAYOUTS[layout]
    return results_of(len(sizes)), reference_of(loss_name, sum(sizes))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss_name", BY_NAME)
def test_loss_and_gradients_match_one_process(loss_name, layout, exchange):
    by_rank, reference = cases(layout, loss_name)
    names = LOSSES[BY_NAME[loss_name]]
    for results in by_rank:
        result = results[layout, loss_name, exchange]
        assert largest_error(result, reference) < 1e-12
        assert all(result[name] is not None for name in names)


@pytest.mark.parametrize(
    ("loss_name", "frozen"),
    [(loss.__name__, frozen) for loss, choices in FROZEN.items() for frozen in choices],
)
def test_what_is_frozen_has_no_gradient_and_the_rest_is_unchanged(loss_name, frozen, layout):
    by_rank, reference = cases(layout, loss_name)
    for results in by_rank:
        for exchange in FEW_EXCHANGES:
            result = results[layout, loss_name, exchange, frozen]
            assert largest_error(result, reference) < 1e-12
            for name in LOSSES[BY_NAME[loss_name]]:
                assert (result[name] is None) == (name in frozen)


# float32: rounding of sums of up to 100 terms. bfloat16: 8 bits of mantissa in the features and in
# the weights of the gradient products (and, on a CPU, in the sigmoid loss's products). float16: 11
# bits in the features.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("torch.float32", 3e-6), ("torch.bfloat16", 4e-2), ("torch.float16", 1e-2)],
)
@pytest.mark.parametrize("loss_name", BY_NAME)
def test_reduced_precision_stays_within_its_rounding(loss_name, layout, dtype, tolerance):
    by_rank, reference = cases(layout, loss_name)
    for results in by_rank:
        assert largest_error(results[layout, loss_name, dtype], reference) < tolerance


@pytest.mark.parametrize("loss_name", BY_NAME)
def test_without_gradients_only_the_loss_is_computed(loss_name, layout):
    by_rank, reference = cases(layout, loss_name)
    for results in by_rank:
        result = results[layout, loss_name, "no_grad"]
        assert largest_error(result, reference) < 1e-12
        assert [name for name, value in result.items() if value is not None] == ["loss"]


@pytest.mark.parametrize("layout", ["even-2", "uneven-2", "even-3", "uneven-3"], indirect=True)
@pytest.mark.parametrize("broken", BROKEN)
def test_the_comparison_rejects_a_broken_loss(broken, layout):
    by_rank, reference = cases(layout, BROKEN[broken][1].__name__)
    assert largest_error(by_rank[0][layout, broken], reference) > 1e-3


@pytest.mark.parametrize("layout", ["even-2", "uneven-2", "even-3", "uneven-3"], indirect=True)
@pytest.mark.parametrize(
    "broken", ["detached_columns", "doubled_scale", "one_sided_uniformity", "unscaled_uniformity"]
)
def test_a_loss_with_wrong_gradients_can_have_the_right_value(broken, layout):
    """Why loss values alone prove nothing."""
    by_rank, reference = cases(layout, BROKEN[broken][1].__name__)
    value = {"loss": by_rank[0][layout, broken]["loss"]}
    assert largest_error(value, reference) < 1e-12
