"""Losses at prefixes are those of one process, with gradients, and travel once.

The reference cuts, normalises and takes every prefix back in plain loops, in float64. Negative
controls show that the comparison rejects prefixes that are not of length 1 and gradients that miss
the normalisation.
"""

import math
from functools import lru_cache, partial

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.losses import (
    ClipLoss,
    MatryoshkaLoss,
    SigLipLoss,
    matryoshka_sigmoid_loss,
    matryoshka_softmax_loss,
    ring_pass,
    siglip_loss,
    softmax_loss,
)
from dist_siglip.losses.sigmoid import siglip_loss_output
from tests.support.parity import (
    EXCHANGES,
    LAYOUTS,
    WIDTH,
    global_result,
    largest_error,
    layouts_of,
    local_rows,
    make_rows,
)
from tests.support.processes import run_ranks
from tests.support.reference_matryoshka import BIASES, DIMS, SCALES, WEIGHTS, reference_of

LAYOUT_NAMES = [name for name, sizes in LAYOUTS.items() if len(sizes) < 4]


def sigmoid(image, text, scale, bias, **options):
    return matryoshka_sigmoid_loss(
        image, text, scale, bias, dims=DIMS, weights=WEIGHTS, **options
    ).loss


def softmax(image, text, scale, bias, **options):
    return matryoshka_softmax_loss(image, text, scale, bias, dims=DIMS, weights=WEIGHTS, **options)


def not_renormalised(image, text, scale, bias):
    """Prefixes as they are cut."""
    loss = 0
    for number, dim in enumerate(sorted(DIMS, reverse=True)):
        share = WEIGHTS[DIMS.index(dim)] / sum(WEIGHTS)
        cut = (image[:, :dim].contiguous(), text[:, :dim].contiguous())
        loss = loss + share * siglip_loss(*cut, scale[number], bias[number])
    return loss


def not_taken_back(image, text, scale, bias):
    """Right value; the gradient of the cut rows is taken for that of the whole ones."""
    loss = 0
    for number, dim in enumerate(sorted(DIMS, reverse=True)):
        share = WEIGHTS[DIMS.index(dim)] / sum(WEIGHTS)
        cut = []
        for rows in (image, text):
            first = rows[:, :dim]
            unit = first / first.norm(dim=1, keepdim=True)
            cut.append(first + (unit - first).detach())
        loss = loss + share * siglip_loss(*cut, scale[number], bias[number])
    return loss


LOSSES = {"sigmoid": sigmoid, "softmax": softmax}
FROZEN = ((), ("image",), ("text",), ("image", "text"), ("scale", "bias"))
BROKEN = {"not_renormalised": not_renormalised, "not_taken_back": not_taken_back}


def arguments(layout, rank, dtype=torch.float64, frozen=()):
    rows = local_rows(make_rows(("image", "text"), sum(layout), dtype), layout, rank)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    order = sorted(DIMS, reverse=True)
    values = {
        **rows,
        "scale": torch.tensor([SCALES[dim] for dim in order], dtype=wide),
        "bias": torch.tensor([BIASES[dim] for dim in order], dtype=wide),
    }
    return {name: value.requires_grad_(name not in frozen) for name, value in values.items()}


def all_cases(rank, world_size):
    results = {}
    for layout_name in layouts_of(world_size):
        layout = LAYOUTS[layout_name]
        for kind, loss in LOSSES.items():
            for exchange in EXCHANGES:
                fn = partial(loss, exchange=exchange, chunk_rows=2)
                results[layout_name, kind, exchange] = global_result(fn, arguments(layout, rank))
            for frozen in FROZEN:
                given = arguments(layout, rank, frozen=frozen)
                results[layout_name, kind, frozen] = global_result(loss, given)
            for dtype in (torch.float32, torch.bfloat16):
                given = arguments(layout, rank, dtype)
                results[layout_name, kind, str(dtype)] = global_result(loss, given)
            with torch.no_grad():
                given = arguments(layout, rank)
                results[layout_name, kind, "no_grad"] = global_result(loss, given)
        for name, broken in BROKEN.items():
            results[layout_name, name] = global_result(broken, arguments(layout, rank))
    return results


@lru_cache
def results_of(world_size):
    """One spawn per world size computes everything; the tests read it."""
    return [all_cases(0, 1)] if world_size == 1 else run_ranks(all_cases, world_size)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_match_one_process(kind, layout):
    reference = reference_of(kind, sum(LAYOUTS[layout]))
    for results in results_of(len(LAYOUTS[layout])):
        for exchange in EXCHANGES:
            assert largest_error(results[layout, kind, exchange], reference) < 1e-12, exchange
        assert largest_error(results[layout, kind, "no_grad"], reference) < 1e-12
        for frozen in FROZEN:
            result = results[layout, kind, frozen]
            assert largest_error(result, reference) < 1e-12, frozen
            missing = {name for name, value in result.items() if value is None}
            assert missing == set(frozen), frozen
        assert largest_error(results[layout, kind, "torch.float32"], reference) < 1e-5
        assert largest_error(results[layout, kind, "torch.bfloat16"], reference) < 6e-2


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("broken", BROKEN)
def test_the_comparison_rejects_a_broken_loss(broken, layout):
    reference = reference_of("sigmoid", sum(LAYOUTS[layout]))
    result = results_of(len(LAYOUTS[layout]))[0][layout, broken]
    assert largest_error(result, reference) > 1e-2
    if broken == "not_taken_back":
        assert (result["loss"] - reference["loss"]).abs() < 1e-9


def test_the_two_pairs_worked_out_by_hand():
    images = (
        torch.tensor([[3, 4, 0, 0], [0, 0, 0, 0]]) / 5 + torch.tensor([[0] * 4, [1, 2, 2, 0]]) / 3
    )
    texts = (
        torch.tensor([[4, 3, 0, 0], [0, 0, 0, 0]]) / 5 + torch.tensor([[0] * 4, [2, 1, 2, 0]]) / 3
    )
    scale = torch.tensor(10.0)
    for bias, whole, half, mean in (
        (-10.0, 1.189402, 1.818548, 1.503975),
        (-5.0, 1.854806, 3.992747, 2.923776),
    ):
        pairs = (images, texts, scale, torch.tensor(bias))
        for dims, expected in (([4], whole), ([2], half), ([4, 2], mean), ([2, 4], mean)):
            found = matryoshka_sigmoid_loss(*pairs, dims=dims).loss
            assert found.item() == pytest.approx(expected, abs=2e-6)


def test_one_prefix_of_all_columns_is_the_loss_itself():
    rows = make_rows(("image", "text"), 6)
    found = {}
    for name, loss in (
        ("base", siglip_loss),
        ("prefix", lambda *a: matryoshka_sigmoid_loss(*a, dims=[WIDTH]).loss),
    ):
        given = [side.clone().requires_grad_() for side in rows.values()]
        value = loss(*given, torch.tensor(7.0), torch.tensor(-3.0))
        value.backward()
        found[name] = [value.detach(), *(side.grad for side in given)]
    for one, other in zip(found["base"], found["prefix"], strict=True):
        assert torch.allclose(one, other, rtol=1e-14, atol=0)


def test_a_row_of_zeros_gives_finite_gradients():
    images = torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.0, 0.8]], requires_grad=True)
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    loss = matryoshka_sigmoid_loss(
        images, texts, torch.tensor(5.0), torch.tensor(-1.0), dims=[3, 2]
    ).loss
    loss.backward()
    assert images.grad.isfinite().all()


def _sent(monkeypatch, call):
    """What travels at each exchange of a loss: columns and accumulators, in bytes a row."""
    seen, real = [], ring_pass.prepare_exchange

    def spy(columns, *, accumulators=(), **options):
        sizes = [c[0].numel() * c.element_size() for c in columns]
        sizes += [math.prod(a.row_shape) * a.dtype.itemsize for a in accumulators]
        seen.append(sum(sizes))
        return real(columns, accumulators=accumulators, **options)

    monkeypatch.setattr(ring_pass, "prepare_exchange", spy)
    call()
    monkeypatch.undo()
    return seen


def test_prefixes_send_the_bytes_of_the_loss_itself(monkeypatch):
    given = list(arguments((6,), 0).values())
    whole = [given[0], given[1], given[2][:1], given[3][:1]]
    base = _sent(monkeypatch, lambda: siglip_loss(*whole))
    assert _sent(monkeypatch, lambda: sigmoid(*given)) == base
    base = _sent(monkeypatch, lambda: softmax_loss(*whole))
    ours = _sent(monkeypatch, lambda: softmax(*given))
    extra = 8 * (len(DIMS) - 1)  # a sum of columns for each further prefix
    assert ours == [size + extra for size in base]


def test_module_takes_over_what_its_base_does():
    ids = torch.tensor([1, 2, 1, 3])
    rows = list(make_rows(("image", "text"), 4).values())
    scalars = (torch.tensor(7.0), torch.tensor(-3.0))
    module = MatryoshkaLoss([WIDTH, 2], SigLipLoss(duplicates="masked"))
    output = module(*rows, *scalars, caption_ids=ids, return_statistics=True)
    whole = siglip_loss_output(*rows, *scalars, caption_ids=ids, duplicates="masked")
    cut = [torch.nn.functional.normalize(side[:, :2], dim=1) for side in rows]
    half = siglip_loss_output(*cut, *scalars, caption_ids=ids, duplicates="masked")
    assert torch.allclose(output.loss, (whole.loss + half.loss) / 2)
    assert output.duplicate_pairs == whole.duplicate_pairs == 2
    assert module.uses_caption_ids
    assert module.uses_logit_bias
    assert not MatryoshkaLoss([2], ClipLoss()).uses_logit_bias


@pytest.mark.parametrize("base", [SigLipLoss, ClipLoss])
def test_separate_scale_and_bias_start_at_those_of_all_and_learn(base):
    rows = list(make_rows(("image", "text"), 6, torch.float32).values())
    scalars = [torch.tensor([7.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)]
    common, separate = MatryoshkaLoss([5, 2], base()), MatryoshkaLoss([5, 2], base(), None, True)
    first = separate(*rows, *scalars)
    assert torch.allclose(first, common(*rows, *scalars))
    optimizer = torch.optim.SGD(separate.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == (2 if base is SigLipLoss else 1)
    first.backward()
    assert all(p.grad.abs().sum() > 0 for p in separate.parameters())
    optimizer.step()
    assert separate(*rows, *scalars) < first


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: MatryoshkaLoss([]), r"dims \(\[\]\)"),
        (lambda: MatryoshkaLoss([4, 4]), r"dims \(\[4, 4\]\)"),
        (lambda: MatryoshkaLoss([4, 0]), r"dims \(\[4, 0\]\)"),
        (lambda: MatryoshkaLoss([4, 2], weights=[1.0]), r"weights \(\[1.0\]\)"),
        (lambda: MatryoshkaLoss([4], weights=[math.nan]), r"weights \(\[nan\]\)"),
        (lambda: MatryoshkaLoss([4], torch.nn.Identity()), r"base \(Identity\)"),
        (
            lambda: MatryoshkaLoss([8])(
                torch.eye(4), torch.eye(4), torch.tensor(1.0), torch.tensor(0.0)
            ),
            "a prefix of 8 columns is more than the 4",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, named):
    with pytest.raises(UserError, match=named) as raised:
        call()
    assert "\n" not in str(raised.value)
