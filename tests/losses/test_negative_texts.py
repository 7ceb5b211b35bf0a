"""Texts without a picture are negatives of all images, on any ranks, with gradients.

The reference is plain loops in float64. Negative controls: negatives of the own rank alone, a
divisor that counts them as pairs, and rows of zeros that are left in.
"""

import math
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.losses import ClipLoss, SigLipLoss, siglip_loss, softmax_loss
from dist_siglip.losses.sigmoid import siglip_loss_output
from tests.support.devices import on_devices
from tests.support.parity import EXCHANGES, LAYOUTS, global_result, largest_error, layouts_of
from tests.support.processes import run_ranks

SCALE, BIAS, WIDTH = 7.0, -3.0, 5
LAYOUT_NAMES = [name for name, sizes in LAYOUTS.items() if len(sizes) < 4]
FROZEN = ((), ("image",), ("text", "negative"), ("image", "text", "negative"), ("scale", "bias"))
IDS = [4, 9, 4, 1, 9, 0, 2]
KINDS = ("sigmoid", "sigmoid, duplicates", "sigmoid, masked", "softmax")


def num_negatives(rank):
    """Of a rank; that of none has images all the same, and that without images has some."""
    return (3, 0, 2)[rank]


@lru_cache
def all_rows(num_rows, num_ranks, dtype=torch.float64):
    """Pairs and negatives of all ranks; one negative is a row of zeros."""
    generator = torch.Generator().manual_seed(num_rows)
    total = sum(map(num_negatives, range(num_ranks)))
    sizes = {"image": num_rows, "text": num_rows, "negative": total}
    rows = {
        name: F.normalize(torch.randn(size, WIDTH, generator=generator).double(), dim=1)
        for name, size in sizes.items()
    }
    rows["negative"][1] = 0
    return {name: value.to(dtype) for name, value in rows.items()}


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def sigma(x):
    return 1 / (1 + math.exp(-x))


@lru_cache
def reference(kind, num_rows, num_ranks):
    """Loss and gradients from the definitions."""
    rows = all_rows(num_rows, num_ranks)
    images, texts, extra = (rows[name].tolist() for name in ("image", "text", "negative"))
    pairs, n = range(num_rows), num_rows
    there = [k for k, row in enumerate(extra) if any(row)]
    columns = [*texts, *(extra[k] for k in there)]
    s = [[dot(image, column) for column in columns] for image in images]
    d_z = [[0.0] * len(columns) for _ in pairs]
    loss = 0.0
    if kind == "softmax":
        z = [[SCALE * each for each in row] for row in s]
        for i in pairs:
            total = sum(math.exp(each) for each in z[i])
            loss += (math.log(total) - z[i][i]) / (2 * n)
            for j in range(len(columns)):
                d_z[i][j] += (math.exp(z[i][j]) / total - (i == j)) / (2 * n)
            total = sum(math.exp(z[j][i]) for j in pairs)
            loss += (math.log(total) - z[i][i]) / (2 * n)
            for j in pairs:
                d_z[j][i] += (math.exp(z[j][i]) / total - (i == j)) / (2 * n)
    else:
        for i in pairs:
            for j in range(len(columns)):
                is_equal = "," in kind and j < n and i != j and IDS[i] == IDS[j]
                if is_equal and "masked" in kind:
                    continue
                y = 1 if i == j or is_equal else -1
                z = SCALE * s[i][j] + BIAS
                loss += math.log1p(math.exp(-y * z)) / n
                d_z[i][j] = -y * sigma(-y * z) / n
    d = torch.tensor(d_z, dtype=torch.float64)
    by_column = SCALE * d.T @ rows["image"]
    negative = torch.zeros_like(rows["negative"])
    negative[there] = by_column[n:]
    found = {
        "loss": loss,
        "image": SCALE * d @ torch.tensor(columns, dtype=torch.float64),
        "text": by_column[:n],
        "negative": negative,
        "scale": sum(d_z[i][j] * s[i][j] for i in pairs for j in range(len(columns))),
        "bias": 0.0 if kind == "softmax" else float(d.sum()),
    }
    return {name: torch.as_tensor(each, dtype=torch.float64) for name, each in found.items()}


def arguments(layout, rank, dtype=torch.float64, frozen=()):
    start, first = sum(layout[:rank]), sum(map(num_negatives, range(rank)))
    rows = all_rows(sum(layout), len(layout), dtype)
    own = {name: rows[name][start : start + layout[rank]] for name in ("image", "text")}
    own["negative"] = rows["negative"][first : first + num_negatives(rank)]
    own |= {name: torch.tensor([x]).double() for name, x in (("scale", SCALE), ("bias", BIAS))}
    return {name: each.clone().requires_grad_(name not in frozen) for name, each in own.items()}


def loss_of(kind, ids, image, text, negative, scale, bias, **options):
    if kind == "softmax":
        return softmax_loss(image, text, scale, bias, negative_text_features=negative, **options)
    if "," in kind:
        options |= {"caption_ids": ids, "duplicates": "positive"}
    if "masked" in kind:
        options["duplicates"] = "masked"
    return siglip_loss(image, text, scale, bias, negative_text_features=negative, **options)


def ids_of(layout, rank):
    return torch.tensor(IDS)[sum(layout[:rank]) : sum(layout[: rank + 1])]


def all_cases(rank, world_size):
    found = {}
    for name in layouts_of(world_size):
        layout = LAYOUTS[name]
        for kind in KINDS:
            run = partial(loss_of, kind, ids_of(layout, rank))
            for frozen in FROZEN:
                given = arguments(layout, rank, frozen=frozen)
                found[name, kind, frozen] = global_result(run, given)
            for exchange in EXCHANGES[: 2 if kind != "sigmoid" else None]:
                options = {"exchange": exchange, "chunk_rows": 2}
                given = arguments(layout, rank)
                found[name, kind, exchange] = global_result(partial(run, **options), given)
    return found


@lru_cache
def results_of(world_size):
    return [all_cases(0, 1)] if world_size == 1 else run_ranks(all_cases, world_size)


def compared(result):
    """``global_result`` takes (m, D) for rows of ranks, as images and texts."""
    return {name: value for name, value in result.items() if value is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_any_ranks_give_the_loss_and_gradients_of_plain_loops(layout, kind):
    sizes = LAYOUTS[layout]
    truth = reference(kind, sum(sizes), len(sizes))
    for of_rank in results_of(len(sizes)):
        cases = {key[2]: result for key, result in of_rank.items() if key[:2] == (layout, kind)}
        assert len(cases) > len(FROZEN)
        for case, result in cases.items():
            error = largest_error(compared(result), truth)
            assert error < 1e-11, (case, error)
            if not isinstance(case, str):
                left = {name for name, value in result.items() if value is None}
                assert left == set(case)


def local_negatives(image, text, negative, scale, bias):
    alone = (siglip_loss(image, text, scale, bias), 0)
    z = scale * image @ negative[(negative != 0).any(dim=1)].T + bias
    return alone[0] + F.softplus(z).sum() / len(image)


def counted_as_pairs(image, text, negative, scale, bias):
    whole = siglip_loss(image, text, scale, bias, negative_text_features=negative)
    return whole * 6 / (6 + 3)


def zeros_left_in(image, text, negative, scale, bias):
    whole = siglip_loss(image, text, scale, bias, negative_text_features=negative)
    return whole + F.softplus(bias).sum()


def broken_cases(rank, world_size):
    layout = LAYOUTS["even-2"]
    return [
        global_result(broken, arguments(layout, rank))
        for broken in (local_negatives, counted_as_pairs, zeros_left_in)
    ]


@pytest.mark.e2e
def test_the_comparison_rejects_negatives_of_one_rank_other_divisors_and_zeros():
    truth = reference("sigmoid", 6, 2)
    for result in run_ranks(broken_cases, 2)[0]:
        assert largest_error(compared(result), truth) > 1e-3


def test_one_pair_and_one_negative_in_closed_form():
    """softplus(-(10 * .6 - 5)) + softplus(10 * .8 - 5), and log(1 + e^2) on the way to it."""
    image = torch.tensor([[1.0, 0.0]], requires_grad=True)
    text, negative = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, 0.6]])
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    loss = siglip_loss(image, text, scale, bias, negative_text_features=negative)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(3)))
    loss.backward()
    pull, push = -10 * sigma(-1), 10 * sigma(3)
    expected = [pull * 0.6 + push * 0.8, pull * 0.8 + push * 0.6]
    assert image.grad[0].tolist() == pytest.approx(expected)
    both = softmax_loss(image, text, scale, negative_text_features=negative)
    assert both.item() == pytest.approx(math.log1p(math.exp(2)) / 2)


def test_modules_take_them_and_count_no_duplicates_among_them():
    given = arguments((6,), 0)
    image, text, negative, scale, bias = (each.detach() for each in given.values())
    found = siglip_loss_output(
        image,
        text,
        scale,
        bias,
        negative_text_features=negative,
        caption_ids=torch.tensor(IDS[:6]),
        duplicates="negative",
    )
    assert found.duplicate_pairs.item() == 4
    for loss, expected in (
        (SigLipLoss(), siglip_loss),
        (ClipLoss(), softmax_loss),
    ):
        assert loss.uses_negative_texts
        options = {"negative_text_features": negative}
        pairs = (image, text, scale, bias)
        assert torch.equal(loss(*pairs, **options), expected(*pairs, **options))
        assert loss(*pairs, **options) > loss(*pairs)
        nothing = torch.zeros(4, WIDTH, dtype=torch.float64)
        assert loss(*pairs, negative_text_features=nothing).item() == pytest.approx(
            loss(*pairs).item(), rel=1e-12
        )
        assert loss(*pairs, negative_text_features=nothing[:0]).item() == pytest.approx(
            loss(*pairs).item(), rel=1e-12
        )


@on_devices
@pytest.mark.parametrize("kind", KINDS)
def test_each_device_gives_the_loss_and_gradients_of_plain_loops(kind, device):
    given = arguments((6,), 0, torch.float32)
    there = {
        name: value.detach().to(device, torch.float32).requires_grad_()
        for name, value in given.items()
    }
    result = global_result(partial(loss_of, kind, torch.tensor(IDS[:6], device=device)), there)
    found = {name: value.cpu() for name, value in compared(result).items()}
    assert largest_error(found, reference(kind, 6, 1)) < 1e-4


@pytest.mark.parametrize(
    ("negative", "words"),
    [
        (torch.eye(2, 4), r"negative_text_features \(\*, 4\) \(torch.float32\) must be \(\*, 3\)"),
        (torch.eye(2, 3).double(), r"\(torch.float64\) must be \(\*, 3\) \(torch.float32\)"),
        (torch.eye(3)[0], r"negative_text_features \(3,\) must be \(B, D\)"),
        (torch.full((2, 3), torch.nan), "negative_text_features row 0 is not finite"),
    ],
)
def test_what_is_no_text_of_these_is_refused_in_one_line(negative, words):
    eye, one = torch.eye(3), torch.tensor(1.0)
    for loss in (siglip_loss, softmax_loss):
        with pytest.raises(UserError, match=words) as caught:
            loss(eye, eye, one, one, negative_text_features=negative)
        assert "\n" not in str(caught.value)
