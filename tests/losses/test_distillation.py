"""Distillation is that of one process, with gradients; what averages or gathers too little is not.

The reference is plain loops in float64. Negative controls: logits of two teachers averaged before
the softmax, and negatives of this rank alone.
"""

import math
from functools import lru_cache, partial

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.losses import (
    ClipLoss,
    DistillationLoss,
    SigLipLoss,
    WeightedLoss,
    ring_pass,
    siglip_loss,
)
from dist_siglip.losses.arguments import TeacherFeatures, uses_logit_bias, uses_teachers
from dist_siglip.losses.distillation import distillation_loss
from tests.support.devices import on_devices
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
from tests.support.reference import sigmoid_loss_and_gradients
from tests.support.reference_pairwise import softmax_loss_and_gradients

DIMS, SCALES, BIASES = (2, 5), (6.0, 9.0), (-2.0, -4.0)
SCALE, BIAS = 7.0, -3.0
FORMS = ("sigmoid", "softmax")
LAYOUT_NAMES = [name for name, sizes in LAYOUTS.items() if len(sizes) < 4]
FROZEN = ((), ("image",), ("text",), ("image", "text"), ("scale", "bias"))


def all_rows(num_rows, dtype=torch.float64):
    """Student and teachers, each teacher's block of length 1, the second unlike the first."""
    rows = make_rows(("image", "text", "I0", "T0", "I1", "T1"), num_rows)
    for side in "IT":
        cut = rows.pop(f"{side}0")[:, : DIMS[0]]
        blocks = [cut / cut.norm(dim=1, keepdim=True), rows.pop(f"{side}1")]
        rows[f"teacher_{side}"] = torch.cat(blocks, dim=1)
    return {name: value.to(dtype) for name, value in rows.items()}


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def softmax(values):
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def reference(form, rows, scale, bias, dims, scales, biases):
    """Loss, gradients, and the terms, from the definitions."""
    images, texts = rows["image"].tolist(), rows["text"].tolist()
    pairs = range(len(images))
    s = [[dot(images[i], texts[j]) for j in pairs] for i in pairs]
    z = [[scale * s[i][j] + bias for j in pairs] for i in pairs]
    t, start = [], 0
    for dim, of_scale, of_bias in zip(dims, scales, biases, strict=True):
        left = rows["teacher_I"][:, start : start + dim].tolist()
        right = rows["teacher_T"][:, start : start + dim].tolist()
        t.append([[of_scale * dot(left[i], right[j]) + of_bias for j in pairs] for i in pairs])
        start += dim
    n, k = len(images), len(dims)
    loss = entropy = even = 0.0
    d_z = [[0.0] * n for _ in pairs]
    for i in pairs:
        if form == "sigmoid":
            for j in pairs:
                q = sum(1 / (1 + math.exp(-each[i][j])) for each in t) / k
                loss += (math.log1p(math.exp(z[i][j])) - q * z[i][j]) / n
                entropy -= (q * math.log(q) + (1 - q) * math.log(1 - q)) / n
                even -= (q * math.log(1 / n) + (1 - q) * math.log(1 - 1 / n)) / n
                d_z[i][j] += (1 / (1 + math.exp(-z[i][j])) - q) / n
            continue
        for place in (lambda a, b: (a, b), lambda a, b: (b, a)):
            of_teachers = [
                softmax([each[place(i, j)[0]][place(i, j)[1]] for j in pairs]) for each in t
            ]
            student = softmax([z[place(i, j)[0]][place(i, j)[1]] for j in pairs])
            for j in pairs:
                p = sum(each[j] for each in of_teachers) / k
                loss -= p * math.log(student[j]) / (2 * n)
                entropy -= p * math.log(p) / (2 * n)
                even += p * math.log(n) / (2 * n)
                row, column = place(i, j)
                d_z[row][column] += (student[j] - p) / (2 * n)
    d = torch.tensor(d_z, dtype=torch.float64)
    found = {
        "loss": loss,
        "image": scale * d @ rows["text"].double(),
        "text": scale * d.T @ rows["image"].double(),
        "scale": sum(d_z[i][j] * s[i][j] for i in pairs for j in pairs),
        "bias": sum(map(sum, d_z)) if form == "sigmoid" else 0.0,
        "distillation_kl": loss - entropy,
        "distillation_gain": even - loss,
    }
    return {name: torch.as_tensor(each, dtype=torch.float64) for name, each in found.items()}


@lru_cache
def reference_of(form, num_rows):
    return reference(form, all_rows(num_rows), SCALE, BIAS, DIMS, SCALES, BIASES)


def arguments(layout, rank, dtype=torch.float64, frozen=()):
    """Arguments of a loss by name, and the teachers of this rank."""
    rows = local_rows(all_rows(sum(layout), dtype), layout, rank)
    teachers = TeacherFeatures(rows.pop("teacher_I"), rows.pop("teacher_T"), DIMS, SCALES, BIASES)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = {
        **rows,
        "scale": torch.tensor(SCALE, dtype=wide),
        "bias": torch.tensor(BIAS, dtype=wide),
    }
    return {name: v.requires_grad_(name not in frozen) for name, v in values.items()}, teachers


def ours(teachers, form, term=None, **options):
    def loss(image, text, scale, bias):
        found = distillation_loss(image, text, scale, bias, teachers=teachers, form=form, **options)
        return found.loss if term is None else found.terms[term]

    return loss


def mixed(module, teachers, image, text, scale, bias):
    return module(image, text, scale, bias, teachers=teachers)


def logits_averaged(teachers):
    """The softmax of the mean of the teachers' logits: one teacher of scaled columns."""
    factors = torch.cat(
        [torch.full((d,), s / len(DIMS)) for d, s in zip(DIMS, SCALES, strict=True)]
    )
    return ours(
        TeacherFeatures(teachers.image * factors, teachers.text, (sum(DIMS),), (1.0,), (0.0,)),
        "softmax",
    )


def local_negatives(teachers, form):
    """Each rank alone, as if its batch were all."""

    def loss(image, text, scale, bias):
        n = len(image)
        z = scale * image @ text.T + bias
        sides = (side.split(DIMS, dim=1) for side in teachers[:2])
        t = [s * a @ b.T + c for a, b, s, c in zip(*sides, SCALES, BIASES, strict=True)]
        if form == "sigmoid":
            q = sum(each.sigmoid() for each in t) / len(t)
            return (torch.nn.functional.softplus(z) - q * z).sum() / max(n, 1)
        total = z.sum() * 0
        for way in (0, 1):
            p = sum(each.softmax(dim=way) for each in t) / len(t)
            total = total - (p * z.log_softmax(dim=way)).sum() / (2 * max(n, 1))
        return total

    return loss


def all_cases(rank, world_size):
    results = {}
    for name in layouts_of(world_size):
        layout = LAYOUTS[name]
        for form, base in (("sigmoid", SigLipLoss), ("softmax", ClipLoss)):
            # Joined, and with a base in passes of its own, which any other class has.
            for kind in (base, type("Other", (base,), {})):
                given, teachers = arguments(layout, rank)
                module = DistillationLoss(kind(), 0.25, form, chunk_rows=2)
                fn = partial(mixed, module, teachers)
                results[name, form, kind is base] = global_result(fn, given)
            for exchange in EXCHANGES:
                given, teachers = arguments(layout, rank)
                fn = ours(teachers, form, exchange=exchange, chunk_rows=2)
                results[name, form, exchange] = global_result(fn, given)
            for frozen in FROZEN:
                given, teachers = arguments(layout, rank, frozen=frozen)
                results[name, form, frozen] = global_result(ours(teachers, form), given)
            for dtype in (torch.float32, torch.bfloat16):
                given, teachers = arguments(layout, rank, dtype)
                results[name, form, str(dtype)] = global_result(ours(teachers, form), given)
            for term in ("distillation_kl", "distillation_gain"):
                given, teachers = arguments(layout, rank)
                fn = ours(teachers, form, term)
                results[name, form, term] = global_result(fn, given)["loss"]
            given, teachers = arguments(layout, rank)
            results[name, form, "local"] = global_result(local_negatives(teachers, form), given)
        given, teachers = arguments(layout, rank)
        results[name, "logits averaged"] = global_result(logits_averaged(teachers), given)
    return results


@lru_cache
def results_of(world_size):
    """One spawn per world size computes everything; the tests read it."""
    return [all_cases(0, 1)] if world_size == 1 else run_ranks(all_cases, world_size)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_loss_gradients_and_terms_match_one_process(form, layout):
    truth = reference_of(form, sum(LAYOUTS[layout]))
    for results in results_of(len(LAYOUTS[layout])):
        for exchange in EXCHANGES:
            assert largest_error(results[layout, form, exchange], truth) < 1e-12, exchange
        for frozen in FROZEN:
            result = results[layout, form, frozen]
            assert largest_error(result, truth) < 1e-12, frozen
            missing = {name for name, value in result.items() if value is None}
            assert missing == set(frozen), frozen
        for term in ("distillation_kl", "distillation_gain"):
            assert results[layout, form, term] == pytest.approx(truth[term].item(), abs=1e-12)
        assert largest_error(results[layout, form, "torch.float32"], truth) < 1e-5
        assert largest_error(results[layout, form, "torch.bfloat16"], truth) < 6e-2


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_base_in_the_passes_of_distillation_is_that_in_its_own(form, layout):
    num_rows = sum(LAYOUTS[layout])
    learned, rows = reference_of(form, num_rows), all_rows(num_rows)
    if form == "sigmoid":
        base = sigmoid_loss_and_gradients(rows["image"], rows["text"], SCALE, BIAS)
    else:
        base = softmax_loss_and_gradients(rows["image"], rows["text"], SCALE)
    truth = {
        name: 0.75 * torch.as_tensor(base.get(name, 0.0)) + 0.25 * learned[name]
        for name in ("loss", "image", "text", "scale", "bias")
    }
    for results in results_of(len(LAYOUTS[layout])):
        for is_joined in (True, False):
            assert largest_error(results[layout, form, is_joined], truth) < 1e-12, is_joined


@pytest.mark.parametrize("form", FORMS)
def test_a_joined_base_costs_no_pass_and_rows_of_teachers_travel_once_in_each(form, monkeypatch):
    sent, real = [], ring_pass.prepare_exchange

    def spy(columns, **options):
        sent.append([tuple(column.shape[1:]) for column in columns])
        return real(columns, **options)

    monkeypatch.setattr(ring_pass, "prepare_exchange", spy)
    given, teachers = arguments((6,), 0)
    base = SigLipLoss() if form == "sigmoid" else ClipLoss()
    mixed(DistillationLoss(base, 0.5, form), teachers, **given)
    rows = [(WIDTH,), (sum(DIMS),)]
    assert sent == ([rows] if form == "sigmoid" else [rows, [*rows, (1 + len(DIMS),)]])


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_comparison_rejects_logits_averaged_and_local_negatives(layout):
    results = results_of(len(LAYOUTS[layout]))[0]
    truth = reference_of("softmax", sum(LAYOUTS[layout]))
    assert largest_error(results[layout, "logits averaged"], truth) > 1e-2
    for form in FORMS:
        truth = reference_of(form, sum(LAYOUTS[layout]))
        error = largest_error(results[layout, form, "local"], truth)
        assert error > 1e-2 if len(LAYOUTS[layout]) > 1 else error < 1e-3


@on_devices
@pytest.mark.parametrize("form", FORMS)
def test_each_device_gives_loss_and_gradients(form, device):
    truth = reference_of(form, 6)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 6e-2)):
        given, teachers = arguments((6,), 0, dtype)
        given = {name: value.detach().to(device).requires_grad_() for name, value in given.items()}
        teachers = teachers._replace(image=teachers.image.to(device), text=teachers.text.to(device))
        found = global_result(ours(teachers, form, chunk_rows=4), given)
        assert largest_error({k: v.cpu() for k, v in found.items()}, truth) < bound


IMAGES = torch.tensor([[0.6, 0.8, 0.0, 0.0], [1 / 3, 2 / 3, 2 / 3, 0.0]])
TEXTS = torch.tensor([[0.8, 0.6, 0.0, 0.0], [2 / 3, 1 / 3, 2 / 3, 0.0]])
TEACHER_TEXTS = torch.tensor([[0.8, 0.6], [0.6, 0.8]])


def test_the_pairs_worked_out_by_hand():
    ten = torch.tensor(10.0)
    one = TeacherFeatures(torch.eye(2), TEACHER_TEXTS, (2,), (20.0,), (None,))
    found = distillation_loss(IMAGES, TEXTS, ten, None, teachers=one, form="softmax")
    assert found.loss.item() == pytest.approx(0.123735, abs=2e-6)
    assert found.terms["distillation_kl"].item() == pytest.approx(0.033640, abs=2e-6)
    loss = DistillationLoss(ClipLoss(), 0.75, "softmax")
    output = loss(IMAGES, TEXTS, ten, None, teachers=one, return_statistics=True)
    assert output.terms["base_loss"].item() == pytest.approx(0.077370, abs=2e-6)
    assert output.loss.item() == pytest.approx(0.112143, abs=2e-6)
    second = torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]])
    both = TeacherFeatures(
        torch.cat([torch.eye(2), second], dim=1),
        torch.cat([TEACHER_TEXTS] * 2, dim=1),
        (2, 2),
        (20.0, 20.0),
        (None, None),
    )
    found = distillation_loss(IMAGES, TEXTS, ten, None, teachers=both, form="softmax")
    assert found.loss.item() == pytest.approx(0.560726, abs=2e-6)
    biased = one._replace(biases=(-12.0,))
    found = distillation_loss(IMAGES, TEXTS, ten, torch.tensor(-5.0), teachers=biased)
    assert found.loss.item() == pytest.approx(1.097814, abs=2e-6)
    assert found.terms["distillation_kl"].item() == pytest.approx(0.314573, abs=2e-6)


def test_a_teacher_that_knows_each_pair_gives_the_loss_without_one():
    rows = make_rows(("image", "text"), 6)
    eye = torch.eye(6, dtype=torch.float64)
    sure = TeacherFeatures(eye, eye, (6,), (2000.0,), (-1000.0,))
    given = (*rows.values(), torch.tensor(7.0), torch.tensor(-3.0))
    assert torch.allclose(distillation_loss(*given, teachers=sure).loss, siglip_loss(*given))


def test_a_student_that_agrees_has_no_gradient_however_sure_it_is():
    rows = [torch.eye(4, requires_grad=True), torch.eye(4)]
    for scale in (5.0, 1000.0):
        given = (*rows, torch.tensor(scale), torch.tensor(-scale / 2))
        same = TeacherFeatures(torch.eye(4), torch.eye(4), (4,), (scale,), (-scale / 2,))
        for form in FORMS:
            found = distillation_loss(*given, teachers=same, form=form)
            (gradient,) = torch.autograd.grad(found.loss, rows[:1])
            assert gradient.abs().max() < 1e-4
            assert abs(found.terms["distillation_kl"].item()) < 1e-5


def test_module_passes_wishes_on_and_leaves_out_a_base_without_share():
    ids = torch.tensor([1, 2, 1, 3])
    rows = all_rows(4)
    teachers = TeacherFeatures(rows["teacher_I"], rows["teacher_T"], DIMS, SCALES, BIASES)
    given = (rows["image"], rows["text"], torch.tensor(7.0), torch.tensor(-3.0))
    module = WeightedLoss(DistillationLoss(SigLipLoss(duplicates="masked"), 0.25), 1.0, 0.0)
    assert module.uses_caption_ids
    assert uses_teachers(module)
    output = module(*given, caption_ids=ids, teachers=teachers, return_statistics=True)
    assert output.duplicate_pairs == 2
    base = siglip_loss(*given, caption_ids=ids, duplicates="masked")
    learned = distillation_loss(*given, teachers=teachers).loss
    apart = (given[0] - given[1]).square().sum(dim=1).mean()
    assert torch.allclose(output.loss, 0.75 * base + 0.25 * learned + apart)
    assert torch.allclose(output.terms["distillation_loss"], learned)
    alone = DistillationLoss(torch.nn.Identity(), share=1.0)
    assert torch.allclose(alone(*given, teachers=teachers), learned)
    assert uses_logit_bias(DistillationLoss(ClipLoss()))
    assert not uses_logit_bias(DistillationLoss(ClipLoss(), form="softmax"))
    assert not uses_logit_bias(DistillationLoss(share=1.0, form="softmax"))


EYE = torch.eye(4)
GIVEN = (EYE, EYE, torch.tensor(1.0), torch.tensor(0.0))
GOOD = TeacherFeatures(EYE, EYE, (4,), (10.0,), (-5.0,))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: DistillationLoss(share=0.0), r"share \(0.0\)"),
        (lambda: DistillationLoss(form="hinge"), r"form \('hinge'\)"),
        (lambda: DistillationLoss()(*GIVEN), "needs teachers"),
        (lambda: _refused(scales=(None,)), r"scale \(None\) of teacher 0"),
        (lambda: _refused(form="softmax", scales=(None,)), r"scale \(None\) of teacher 0"),
        (lambda: _refused(biases=(None,)), r"bias \(None\) of teacher 0"),
        (lambda: _refused(dims=(2, 3)), "one of each for every teacher|must be"),
        (lambda: _refused(dims=(3,)), r"must be \(4, 3\)"),
        (lambda: _refused(text=EYE[:3]), r"teacher_text_features \(3, 4\)"),
        (lambda: _refused(text=EYE * torch.inf), "teacher_text_features row 0 is not finite"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, named):
    with pytest.raises(UserError, match=named) as raised:
        call()
    assert "\n" not in str(raised.value)


def _refused(form="sigmoid", **changed):
    return DistillationLoss(form=form)(*GIVEN, teachers=GOOD._replace(**changed))
