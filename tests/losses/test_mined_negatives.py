"""Mined negatives are the hardest texts of all ranks, on any ranks, with gradients.

The reference is plain loops in float64. Negative controls: texts mined on the own rank alone, equal
captions that are mined, and gradients that do not reach other ranks.
"""

import math
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.losses import DistillationLoss, MatryoshkaLoss, SigLipLoss, siglip_loss
from dist_siglip.losses.arguments import LossOutput, TeacherFeatures, mined_of
from dist_siglip.losses.calibration import calibrate_on_features
from dist_siglip.losses.mined_negatives import mine_negatives
from dist_siglip.losses.ring_pass import RingPass
from dist_siglip.losses.sigmoid import siglip_loss_output
from tests.support.devices import on_devices
from tests.support.parity import (
    EXCHANGES,
    LAYOUTS,
    global_result,
    largest_error,
    layouts_of,
    local_rows,
    make_rows,
)
from tests.support.processes import run_ranks
from tests.support.reference_pairwise import mined_sigmoid_and_gradients

SCALE, BIAS, WEIGHT, WIDTH = 7.0, -3.0, 0.75, 5
STEP = 2.0**-16
LAYOUT_NAMES = [name for name, sizes in LAYOUTS.items() if len(sizes) < 4]
FROZEN = ((), ("image",), ("text",), ("image", "text"), ("image", "scale"), ("scale", "bias"))
IDS = [4, 9, 4, 1, 9, 0, 2]
KINDS = {"plain": None, "positive": "positive", "masked": "masked", "counted": "negative"}


@lru_cache
def all_rows(num_rows):
    """Pairs of all ranks; three texts are equal, so that which of them is mined is a tie."""
    rows = make_rows(("image", "text"), num_rows)
    rows["text"][[3, -1]] = rows["text"][1].clone()
    return rows


@lru_cache
def reference(kind, num_rows, k):
    """Loss and gradients from the definition."""
    ids = None if kind == "plain" else IDS[:num_rows]
    sides = all_rows(num_rows).values()
    return mined_sigmoid_and_gradients(*sides, SCALE, BIAS, k, WEIGHT, ids, KINDS[kind])


def arguments(layout, rank, frozen=()):
    own = local_rows(all_rows(sum(layout)), layout, rank)
    own |= {name: torch.tensor([x]).double() for name, x in (("scale", SCALE), ("bias", BIAS))}
    return {name: each.clone().requires_grad_(name not in frozen) for name, each in own.items()}


def loss_of(kind, ids, image, text, scale, bias, k=2, **options):
    if kind != "plain":
        options |= {"caption_ids": ids, "duplicates": KINDS[kind]}
    options |= {"mined_negatives": k, "mined_weight": WEIGHT}
    return siglip_loss(image, text, scale, bias, **options)


def ids_of(layout, rank):
    return torch.tensor(IDS)[sum(layout[:rank]) : sum(layout[: rank + 1])]


def with_stored(kind, ids, rank, image, text, scale, bias, **options):
    """A stored text of each rank stands behind the others, and is not mined."""
    stored = F.normalize(torch.arange(1.0, 1 + WIDTH).double() ** (rank + 1), dim=0)[None]
    options |= {"negative_text_features": stored}
    whole = loss_of(kind, ids, image, text, scale, bias, **options)
    everyone = gather_rows(stored)
    size = len(gather_rows(image.detach())) / len(everyone)
    return whole - F.softplus(scale * image @ everyone.T + bias).sum() / size


def all_cases(rank, world_size):
    found = {}
    for name in layouts_of(world_size):
        layout = LAYOUTS[name]
        for kind in KINDS:
            run = partial(loss_of, kind, ids_of(layout, rank))
            for frozen in FROZEN:
                given = arguments(layout, rank, frozen)
                found[name, kind, frozen] = global_result(run, given)
            for exchange in EXCHANGES[: 2 if kind != "plain" else None]:
                options = {"exchange": exchange, "chunk_rows": 2}
                given = arguments(layout, rank)
                found[name, kind, exchange] = global_result(partial(run, **options), given)
            given = arguments(layout, rank)
            run = partial(with_stored, kind, ids_of(layout, rank), rank)
            found[name, kind, "stored"] = global_result(run, given)
        given = arguments(layout, rank)
        run = partial(loss_of, "counted", ids_of(layout, rank), k=9)
        found[name, "all of them", "k = 9"] = global_result(run, given)
    return found


@lru_cache
def results_of(world_size):
    return [all_cases(0, 1)] if world_size == 1 else run_ranks(all_cases, world_size)


@pytest.mark.parametrize("kind", [*KINDS, "all of them"])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_any_ranks_give_the_loss_and_gradients_of_plain_loops(layout, kind):
    sizes = LAYOUTS[layout]
    k, of_kind = (2, kind) if kind in KINDS else (9, "counted")
    truth = reference(of_kind, sum(sizes), k)
    for of_rank in results_of(len(sizes)):
        cases = {key[2]: result for key, result in of_rank.items() if key[:2] == (layout, kind)}
        assert len(cases) >= (len(FROZEN) if kind in KINDS else 1)
        for case, result in cases.items():
            error = largest_error(result, truth)
            assert error < 1e-11, (case, error)
            if isinstance(case, tuple):
                assert {name for name, value in result.items() if value is None} == set(case)


def added_by_hand(image, texts, scale, bias, excluded, k=2):
    """Mined among ``texts``, with autograd, in the share of an even layout."""
    logits = scale * image @ texts.T + bias
    hard = logits.masked_fill(excluded, -math.inf).topk(k, dim=1).indices
    return WEIGHT * F.softplus(logits.gather(1, hard)).sum() / len(image)


def mined_locally(image, text, scale, bias):
    own = torch.eye(len(image)).bool()
    return siglip_loss(image, text, scale, bias) + added_by_hand(image, text, scale, bias, own)


def mined_with_equal_captions(ids, image, text, scale, bias):
    counted = loss_of("counted", ids, image, text, scale, bias, k=1)
    return (
        counted
        + loss_of("plain", ids, image, text, scale, bias)
        - siglip_loss(image, text, scale, bias, mined_negatives=1, mined_weight=WEIGHT)
    )


def mined_without_a_way_back(rank, image, text, scale, bias):
    texts = gather_rows(text.detach())
    start = rank * len(text)
    texts = torch.cat([texts[:start], text, texts[start + len(text) :]])
    own = torch.arange(len(image))[:, None] + start == torch.arange(len(texts))
    return siglip_loss(image, text, scale, bias) + added_by_hand(image, texts, scale, bias, own)


def broken_cases(rank, world_size):
    layout = LAYOUTS["even-2"]
    ids = ids_of(layout, rank)
    return [
        global_result(broken, arguments(layout, rank))
        for broken in (
            mined_locally,
            partial(mined_with_equal_captions, ids),
            partial(mined_without_a_way_back, rank),
        )
    ]


@pytest.mark.e2e
def test_the_comparison_rejects_local_mining_equal_captions_and_lost_gradients():
    truths = [reference(kind, 6, 2) for kind in ("plain", "counted", "plain")]
    found = run_ranks(broken_cases, 2)[0]
    for result, truth in zip(found, truths, strict=True):
        assert largest_error(result, truth) > 1e-3
    # Lost gradients are seen in nothing but the gradients of texts.
    assert largest_error({name: found[2][name] for name in ("loss", "image")}, truths[2]) < 1e-11


def test_one_picture_and_its_hardest_text_in_closed_form():
    """Its text at .6, others at .8 and 0: softplus(10 * .8 - 5) counts twice."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    text = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    plain = siglip_loss_output(image, text, scale, bias)
    mined = siglip_loss_output(image, text, scale, bias, mined_negatives=1)
    # The others' hardest: the last text of the second, the first (.8) of the third.
    added = (math.log1p(math.exp(3)) + math.log1p(math.exp(5)) + math.log1p(math.exp(3))) / 3
    assert mined.loss.item() - plain.loss.item() == pytest.approx(added, rel=1e-6)
    assert mined.terms["mined_loss"].item() == pytest.approx(added, rel=1e-6)
    assert mined.terms["base_loss"].item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert not plain.terms
    by_image = [torch.autograd.grad(each.loss, image)[0][0] for each in (mined, plain)]
    push = 10 / (1 + math.exp(-3)) / 3
    assert (by_image[0] - by_image[1]).tolist() == pytest.approx([push * 0.8, push * 0.6])


def test_equal_texts_tie_and_the_first_of_them_is_mined():
    rows = all_rows(7)
    image, text = rows["image"].float(), rows["text"].float()
    for shape in ((7, 7), (2, 3), (1, 1)):
        mined = mine_negatives(image, text, 3, ids=None, tile_shape=shape)
        assert mined.exist.all()
        for i, positions in enumerate(mined.positions.tolist()):
            steps = (text.double() @ image[i].double() / STEP).round().tolist()
            others = sorted((j for j in range(7) if j != i), key=lambda j: (-steps[j], j))
            assert positions == others[:3], shape
        assert torch.allclose(
            mined.similarities, torch.einsum("id,ikd->ik", image, text[mined.positions])
        )


def test_mining_costs_one_product_of_each_tile_and_one_way_of_the_texts(monkeypatch):
    passes, products = [], []
    run, multiply = RingPass.run, torch.mm

    def counted_run(self, plan):
        passes.append((type(self).__name__, len(plan._columns), len(plan._specs)))
        return run(self, plan)

    monkeypatch.setattr(RingPass, "run", counted_run)
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (products.append(1), multiply(*a, **k))[1])
    given = arguments((6,), 0)
    counts = []
    for k in (0, 2):
        products.clear()
        loss_of("plain", None, **given, k=k, chunk_rows=3)
        counts.append(len(products))
    assert passes == [("SigmoidPass", 1, 1), ("_MiningPass", 1, 0), ("SigmoidPass", 1, 1)]
    assert counts[1] - counts[0] == 4  # of (6 / 3)^2 tiles
    assert mine_negatives(
        given["image"], given["text"], 2, ids=None, tile_shape=(3, 3)
    ).positions.shape == (6, 2)


def test_modules_around_it_pass_it_on_or_refuse_it():
    given = [each.detach() for each in arguments((6,), 0).values()]
    loss = SigLipLoss(mined_negatives=2, mined_weight=WEIGHT)
    assert loss(*given).item() == pytest.approx(reference("plain", 6, 2)["loss"].item())
    teachers = TeacherFeatures(*given[:2], dims=(WIDTH,), scales=(5.0,), biases=(-2.0,))
    around = DistillationLoss(loss, share=0.5)
    assert mined_of(around) == (2, WEIGHT)
    assert mined_of(DistillationLoss()) == mined_of(torch.nn.Identity()) == (0, 0.0)
    found = around(*given, teachers=teachers, return_statistics=True)
    assert isinstance(found, LossOutput)
    without = DistillationLoss(SigLipLoss(), share=0.5)(*given, teachers=teachers)
    mined = found.terms["mined_loss"]
    assert found.loss.item() == pytest.approx(without.item() + 0.5 * mined.item())
    with pytest.raises(UserError, match=r"mined_negatives \(2\) of the base: .*; set it to 0"):
        MatryoshkaLoss([3], loss)


@pytest.mark.parametrize(
    ("k", "weight", "words"),
    [
        (-1, 1.0, r"mined_negatives \(-1\) must be at least 0"),
        (1, 0.0, r"mined_weight \(0.0\) must be a finite number above 0"),
        (1, math.nan, r"mined_weight \(nan\) must be a finite"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(k, weight, words):
    eye, one = torch.eye(3), torch.tensor(1.0)
    for make in (SigLipLoss, partial(siglip_loss, eye, eye, one, one)):
        with pytest.raises(UserError, match=words) as caught:
            make(mined_negatives=k, mined_weight=weight)
        assert "\n" not in str(caught.value)


def test_calibration_counts_the_hardest_and_lowers_the_loss_of_batches():
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(240, 16, generator=generator).double(), dim=1)
    noise = torch.randn(240, 16, generator=generator).double()
    text = F.normalize(image + 1.5 * F.normalize(noise, dim=1), dim=1)
    # Without the hardest 0 nothing changes, and all of them are as many more.
    plain = calibrate_on_features(image, text, 24)
    every = calibrate_on_features(image, text, 24, mined_negatives=23, mined_weight=2.0)
    more = calibrate_on_features(image, text, 1 + 3 * 23)
    assert (every.scale, every.bias) == pytest.approx((more.scale, more.bias), rel=1e-9)
    mining = {"mined_negatives": 2, "mined_weight": 4.0}
    fitted = calibrate_on_features(image, text, 24, **mining)
    assert plain.bias > fitted.bias
    losses = [
        sum(
            siglip_loss(i, t, torch.tensor(each.scale), torch.tensor(each.bias), **mining).item()
            for i, t in zip(image.split(24), text.split(24), strict=True)
        )
        / 10
        for each in (plain, fitted)
    ]
    assert losses[1] < losses[0]
    # The hardest of all pictures together are harder than those of each.
    assert losses[1] == pytest.approx(fitted.loss_after, rel=0.25)
    print("mined loss of batches, plain and mined fit:", losses, fitted, plain)


@on_devices
@pytest.mark.parametrize(
    ("kind", "kernel"), [*((kind, "auto") for kind in KINDS), ("positive", "compiled")]
)
def test_each_device_and_kernel_gives_the_loss_and_gradients_of_plain_loops(kind, kernel, device):
    given = arguments((6,), 0)
    there = {
        name: value.detach().to(device, torch.float32).requires_grad_()
        for name, value in given.items()
    }
    ids = torch.tensor(IDS[:6], device=device)
    result = global_result(partial(loss_of, kind, ids, kernel=kernel), there)
    found = {name: value.cpu() for name, value in result.items()}
    assert largest_error(found, reference(kind, 6, 2)) < 1e-4
