"""Self-distillation and masked prediction: numbers, gradients, draws, and the memory they take."""

import math

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.objectives import (
    MaskedPrediction,
    Rows,
    SelfDistillation,
    Targets,
    prototype_losses,
    prototypes,
)
from dist_siglip.objectives.prototypes import PrototypeHead, choice_sums
from dist_siglip.training.module.ema_teacher import sinkhorn_centre
from tests.support import reference_self_distillation as reference
from tests.support.allocations import allocated_peak, tensor_peak
from tests.support.processes import run_ranks

# The published case of three prototypes: teacher, centre, two views of two rows.
TEACHER = [[0.1, 0.0, -0.1], [0.02, 0.06, 0.04]]
CENTRE = [0.05, 0.03, -0.02]
VIEWS = [[[0.2, 0.1, 0.0], [0.0, 0.1, 0.2]], [[0.05, 0.1, 0.0], [0.1, 0.1, 0.1]]]
COLD = {"student_temperature": 0.1, "teacher_temperature": 0.04}
# And that of hidden patches.
PATCHES = [
    [[0.1, 0], [0, 0.1], [0.1, 0], [0.05, 0.05]],
    [[0, 0.1], [0.1, 0], [0.0, 0.05], [0.05, 0]],
]
SEEN = [
    [[0.2, 0], [0.1, 0], [0, 0.1], [0, 0]],
    [[0, 0.2], [0, 0.1], [0.1, 0.1], [0.2, 0.1]],
]
WARM = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def of_logits(teacher, student, centre, **temperatures):
    """Losses of logits: with prototypes that are axes the vectors are their logits."""
    axes = torch.eye(teacher.shape[-1], dtype=torch.float64)
    return prototype_losses(student, axes, teacher, axes, centre, **temperatures)


def test_the_published_case_of_self_distillation():
    teacher, centre = exact(TEACHER), exact(CENTRE)
    student = exact(VIEWS).transpose(0, 1).contiguous().requires_grad_()
    losses = of_logits(teacher, student, centre, **COLD)
    expected = exact([[0.588921, 1.139149], [0.840601, 1.098612]])
    assert torch.allclose(losses, expected, atol=1e-6)
    assert losses.mean().item() == pytest.approx(0.916821, abs=1e-6)
    (slope,) = torch.autograd.grad(losses.mean(), student)
    assert torch.allclose(slope[0, 0], exact([-0.466171, 0.323655, 0.142516]), atol=1e-6)
    bare = of_logits(teacher, student, torch.zeros_like(centre), **COLD)
    assert bare.mean().item() == pytest.approx(1.006597, abs=1e-6)
    axes = torch.eye(3, dtype=torch.float64)
    total, choices = choice_sums(teacher, axes, centre, 0.04)
    assert total.item() == pytest.approx(0.498372 + 0.830858, abs=1e-6)
    assert torch.allclose(
        choices, exact([0.851709 + 0.066803, 0.115266 + 0.299390, 0.033024 + 0.633808]), atol=2e-6
    )
    assert losses.mean().item() - total.item() / 2 == pytest.approx(0.252206, abs=1e-6)
    flat = of_logits(teacher, torch.zeros(2, 1, 3, dtype=torch.float64), centre, **COLD)
    assert torch.allclose(flat, exact([[math.log(3)]] * 2))
    assert reference.self_distillation(TEACHER, VIEWS, CENTRE, **COLD) == pytest.approx(
        losses.mean().item(), abs=1e-12
    )
    assert reference.next_centre(CENTRE, TEACHER, 0.9) == pytest.approx(
        [0.051, 0.030, -0.021], abs=1e-9
    )


def test_the_case_rejects_a_centre_on_the_student():
    student = exact(VIEWS).transpose(0, 1) - exact(CENTRE)
    losses = of_logits(exact(TEACHER), student, exact(CENTRE), **COLD)
    assert abs(losses.mean().item() - 0.916821) > 1e-2


@pytest.mark.parametrize("all_patches", [False, True])
def test_the_published_case_of_hidden_patches(all_patches):
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    losses = of_logits(
        exact(PATCHES).flatten(0, 1),
        exact(SEEN).flatten(0, 1)[:, None],
        torch.zeros(2, dtype=torch.float64),
        **WARM,
    ).view(2, 4)
    expected = exact(
        [[0.365334, 1.194059, 1.194059, 0.693147], [0.365334, 1.194059, 0.693147, 0.582203]]
    )
    assert torch.allclose(losses, expected, atol=1e-6)
    counts = torch.ones_like(mask) if all_patches else mask
    mean = ((losses * counts).sum(dim=1) / counts.sum(dim=1)).mean().item()
    assert mean == pytest.approx(0.785168 if all_patches else 0.558090, abs=1e-6)
    assert mean == pytest.approx(
        reference.masked_prediction(
            PATCHES, SEEN, mask.tolist(), [0, 0], **WARM, all_patches=all_patches
        ),
        abs=1e-12,
    )


def inputs_of(num_rows=7, num_views=3, prototypes=11, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)

    student, weight = normal(num_rows, num_views, width), normal(prototypes, width)
    return (
        student.requires_grad_(),
        weight.requires_grad_(),
        normal(num_rows, width),
        normal(prototypes, width),
        normal(prototypes),
    )


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, None])
def test_losses_and_gradients_are_those_of_plain_loops_and_of_all_rows_at_once(chunk_rows):
    student, weight, teacher, theirs, centre = inputs_of()
    losses = prototype_losses(
        student, weight, teacher, theirs, centre, **COLD, chunk_rows=chunk_rows
    )
    expected = [
        [
            reference.cross_entropy(
                reference.choice((theirs @ row).tolist(), centre.tolist(), 0.04),
                (weight @ view).tolist(),
                0.1,
            )
            for view in views
        ]
        for row, views in zip(teacher, student, strict=True)
    ]
    assert torch.allclose(losses, exact(expected), atol=1e-12)
    slopes = torch.linspace(-1, 2, losses.numel(), dtype=torch.float64).view_as(losses)
    found = torch.autograd.grad((losses * slopes).sum(), (student, weight))
    shares = ((teacher @ theirs.T - centre) / 0.04).softmax(dim=1)
    whole = -(shares[:, None] * (student @ weight.T / 0.1).log_softmax(dim=2)).sum(dim=2)
    for ours, its in zip(
        found, torch.autograd.grad((whole * slopes).sum(), (student, weight)), strict=True
    ):
        assert torch.allclose(ours, its, atol=1e-12)


def test_under_autocast_probabilities_are_float32():
    student, weight, teacher, theirs, centre = inputs_of(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = prototype_losses(student, weight, teacher, theirs, centre, **COLD, chunk_rows=2)
    losses.sum().backward()
    assert losses.dtype == weight.grad.dtype == student.grad.dtype == torch.float32
    alone = prototype_losses(*inputs_of(dtype=torch.float32), **COLD)
    assert torch.allclose(losses, alone, rtol=0.05)
    assert not torch.equal(losses, alone)


PUBLISHED = 65_536  # prototypes of DINO


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_views", [1, 8])
def test_peak_bytes_at_65_536_prototypes_are_those_of_a_chunk_whatever_the_batch(num_views, narrow):
    """Of each row the logits of its views and of the teacher, forward and backward."""
    chunk_rows, width = 4, 4

    def peak(num_chunks, rows_at_once=chunk_rows):
        inputs = inputs_of(num_chunks * chunk_rows, num_views, PUBLISHED, width, torch.float32)

        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                losses = prototype_losses(*inputs, **COLD, chunk_rows=rows_at_once)
            losses.mean().backward()

        return (tensor_peak if narrow else allocated_peak)(run)

    few, many = peak(4), peak(8)
    chunk, matrix = ((num_views + 1) * 4 * chunk_rows * PUBLISHED, 4 * width * PUBLISHED)
    # In bfloat16 the products beside their float32, copies of both matrices and of a gradient.
    assert few < 1.1 * (1.5 * chunk + 3 * matrix if narrow else chunk + matrix)
    assert many < few + chunk / 50
    assert peak(4, 4 * chunk_rows) > 3.5 * chunk


CHUNK = 2**21 * 4  # bytes, in place of 256 MB


@pytest.mark.parametrize("objective", [SelfDistillation(), MaskedPrediction()])
def test_peak_bytes_of_a_micro_batch_are_those_of_a_chunk(objective, monkeypatch):
    """8 crops of 8 and 16 pictures, or 16 and 32 hidden patches of each, and the teacher's."""
    monkeypatch.setattr(prototypes, "_CHUNK_LOGITS", CHUNK // 4)
    objective.head = PrototypeHead(6, PUBLISHED, 8, 4)
    objective.num_hidden = 16
    per_picture = 1 if isinstance(objective, SelfDistillation) else 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def peak(num_pictures):
        mask = torch.zeros(num_pictures, 32, dtype=torch.bool)
        mask[:, ::2] = True
        target = Targets(
            F.normalize(normal(num_pictures, per_picture, 4), dim=-1),
            F.normalize(normal(PUBLISHED, 4), dim=-1),
            normal(PUBLISHED) * 0.1,
            0.06,
        )
        rows = Rows(
            torch.zeros(num_pictures, 32, 6),
            torch.zeros(num_pictures, 1, dtype=torch.long),
            torch.arange(num_pictures),
            torch.ones(num_pictures, dtype=torch.bool),
            local_views=normal(num_pictures, 8, 6),
            masked_tokens=normal(num_pictures, 32, 6),
            mask=mask,
            targets={objective.name: target},
        )

        def run():
            (term,) = objective(rows).values()
            term.total.backward()

        return allocated_peak(run)

    few, many = peak(8), peak(16)
    matrix = 4 * 4 * PUBLISHED
    assert few < 1.1 * (CHUNK + 3 * matrix)  # prototypes, their gradient and that of the matrix
    assert many < few + CHUNK / 50
    logits = 8 * (9 if per_picture == 1 else 2 * 16) * 4 * PUBLISHED
    assert logits > 2 * CHUNK


@pytest.mark.parametrize(
    "run",
    [
        lambda rows, matrix: choice_sums(rows, matrix, matrix[:, 0] * 0, 0.05),
        lambda rows, matrix: sinkhorn_centre(rows, matrix, 0.05),
    ],
    ids=["gauges", "sinkhorn"],
)
def test_peak_bytes_of_the_teacher_are_those_of_a_chunk(run, monkeypatch):
    monkeypatch.setattr(prototypes, "_CHUNK_LOGITS", CHUNK // 4)
    _, _, rows, matrix, _ = inputs_of(128, 1, PUBLISHED, 4, torch.float32)
    few, many = (allocated_peak(lambda n=n: run(rows[:n], matrix)) for n in (64, 128))
    assert 64 * 4 * PUBLISHED >= 2 * CHUNK
    assert few < 1.1 * CHUNK
    assert many < few + CHUNK / 50


# Two prototypes, four rows, temperature .1, as DINOv2 balances them.
BALANCED = [[0.10, 0.00], [0.08, 0.00], [0.04, 0.02], [0.00, 0.02]]
GLOBAL = [0.633709, 0.586171, 0.437371, 0.342575]
LOCAL = [0.524979, 0.475021, 0.549834, 0.450166]


def balanced(rows):
    axes = torch.eye(rows.shape[1], dtype=torch.float64)
    return ((rows - sinkhorn_centre(rows, axes, 0.1)) / 0.1).softmax(dim=1)


def balanced_on_ranks(rank, world_size):
    """With two rows on each rank, then with one and three."""
    parts = [exact(BALANCED)[:cut] if rank == 0 else exact(BALANCED)[cut:] for cut in (2, 1)]
    return [balanced(rows)[:, 0].tolist() for rows in parts]


def test_the_published_case_of_sinkhorn_on_one_process_and_two():
    found = balanced(exact(BALANCED))
    assert found[:, 0].tolist() == pytest.approx(GLOBAL, abs=1e-6)
    assert torch.allclose(found, exact(reference.sinkhorn(BALANCED, 0.1)), atol=1e-12)
    plain = (exact(BALANCED) / 0.1).softmax(dim=1)[:, 0]
    assert plain.tolist() == pytest.approx([0.731059, 0.689974, 0.549834, 0.450166], abs=1e-6)
    for first, second in zip(*run_ranks(balanced_on_ranks, 2), strict=True):
        assert first + second == pytest.approx(GLOBAL, abs=1e-6)
    # The comparison rejects one that each rank balances by itself.
    alone = [*balanced(exact(BALANCED)[:2])[:, 0], *balanced(exact(BALANCED)[2:])[:, 0]]
    assert [value.item() for value in alone] == pytest.approx(LOCAL, abs=1e-6)
    assert max(abs(a.item() - b) for a, b in zip(alone, GLOBAL, strict=True)) > 0.1


def test_prototypes_are_of_length_1_and_their_gradient_does_not_change_it():
    torch.manual_seed(0)
    head = PrototypeHead(6, 9, 8, 4)
    assert torch.allclose(head.prototypes().norm(dim=1), torch.ones(9))
    assert torch.allclose(head(torch.randn(2, 3, 6)).norm(dim=-1), torch.ones(2, 3))
    (head.prototypes() * torch.randn(9, 4)).sum().backward()
    along = (head.directions.grad * head.directions).sum(dim=1)
    assert along.abs().max() < 1e-4 * head.directions.grad.norm()
    assert head.directions.grad.abs().sum() > 0


def masking(share=0.5, num_tokens=16):
    objective = MaskedPrediction(share=share)
    objective.num_hidden = math.floor(share * num_tokens + 0.5)
    return objective


def test_exactly_half_of_the_patches_are_hidden_by_the_draw_of_each_sample_alone():
    objective = masking()
    draws = torch.randint(2**62, (400,), generator=torch.Generator().manual_seed(1))
    mask = objective.mask(draws, 16)
    assert (mask.sum(dim=1) == 8).all()
    shares = mask.float().mean(dim=0)
    assert (shares - 0.5).abs().max() < 0.13  # five deviations of 400 draws
    assert len({tuple(row) for row in mask.tolist()}) > 380
    order = torch.randperm(400)
    assert torch.equal(objective.mask(draws[order], 16), mask[order])
    assert torch.equal(objective.mask(draws[7:8], 16), mask[7:8])
    # Neighbouring draws have nothing to do with each other.
    near = objective.mask(torch.arange(400), 16).float()
    assert abs(torch.corrcoef(torch.stack([near[:-1].flatten(), near[1:].flatten()]))[0, 1]) < 0.07


def rows_of(objective, width=6, prototypes=9):
    """Rows with views and targets for an objective with a head of its own."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    objective.head = PrototypeHead(width, prototypes, 8, 4).double()
    draws = torch.arange(5) + 11
    mask = masking(num_tokens=8).mask(draws, 8)
    per_row = 1 if isinstance(objective, SelfDistillation) else (8 if objective.all_patches else 4)
    target = Targets(
        F.normalize(torch.randn(5, per_row, 4, generator=generator, dtype=torch.float64), dim=-1),
        F.normalize(torch.randn(9, 4, generator=generator, dtype=torch.float64), dim=-1),
        torch.randn(9, generator=generator, dtype=torch.float64) * 0.1,
        0.06,
    )
    valid = torch.tensor([True, True, False, True, True])
    return Rows(
        torch.zeros(5, 8, width, dtype=torch.float64),
        torch.zeros(5, 1, dtype=torch.long),
        draws,
        valid,
        local_views=torch.randn(5, 3, width, generator=generator, dtype=torch.float64),
        masked_tokens=torch.randn(5, 8, width, generator=generator, dtype=torch.float64),
        mask=mask,
        targets={objective.name: target},
    )


def test_the_term_of_small_crops_is_that_of_plain_loops_over_rows_that_count():
    objective = SelfDistillation()
    rows = rows_of(objective)
    target, head = rows.targets["self_distillation"], objective.head
    with torch.no_grad():
        term = objective(rows)["self_distillation_loss"]
        views = head(rows.local_views) @ head.prototypes().T
    kept = rows.valid.nonzero().flatten().tolist()
    teacher = (target.rows[:, 0] @ target.prototypes.T).tolist()
    expected = reference.self_distillation(
        [teacher[i] for i in kept],
        [[views[i, v].tolist() for i in kept] for v in range(3)],
        target.centre.tolist(),
        teacher_temperature=0.06,
        student_temperature=0.1,
    )
    assert term.number.item() == 4
    assert (term.total / term.number).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("all_patches", [False, True])
def test_the_term_of_hidden_patches_is_that_of_plain_loops(all_patches):
    objective = MaskedPrediction(all_patches=all_patches)
    objective.num_hidden = 4
    rows = rows_of(objective)
    target, head = rows.targets["masked_prediction"], objective.head
    with torch.no_grad():
        term = objective(rows)["masked_prediction_loss"]
        student = head(rows.masked_tokens) @ head.prototypes().T
    seen = rows.mask if not all_patches else torch.ones_like(rows.mask)
    teacher = torch.zeros(5, 8, 9, dtype=torch.float64)
    teacher[seen] = (target.rows @ target.prototypes.T).flatten(0, 1)
    kept = rows.valid.nonzero().flatten().tolist()
    expected = reference.masked_prediction(
        teacher[kept].tolist(),
        student[kept].tolist(),
        rows.mask[kept].tolist(),
        target.centre.tolist(),
        teacher_temperature=0.06,
        student_temperature=0.1,
        all_patches=all_patches,
    )
    assert (term.total / term.number).item() == pytest.approx(expected, abs=1e-10)


def test_what_the_teacher_is_asked_for_are_the_patches_that_are_hidden_in_their_order():
    objective = masking(num_tokens=6)
    tokens = torch.arange(12.0).view(2, 6, 1)
    draws = torch.tensor([5, 6])
    found = objective.chosen(torch.zeros(2, 1), tokens, draws)
    assert torch.equal(found, tokens[objective.mask(draws, 6)].view(2, 3, 1))


def test_numbers_out_of_range_are_refused_in_one_line():
    for make, words in (
        (lambda: SelfDistillation(prototypes=1), r"prototypes \(1\) of SelfDistillation"),
        (lambda: SelfDistillation(local_views=0), r"local_views \(0\)"),
        (lambda: SelfDistillation(local_scale=(0.5, 0.1)), r"local_scale \(\[0.5, 0.1\]\)"),
        (lambda: SelfDistillation(teacher_temperature=0.0), r"teacher_temperature \(0.0\)"),
        (lambda: SelfDistillation(centre_momentum=1.0), r"centre_momentum \(1.0\)"),
        (lambda: MaskedPrediction(share=1.0), r"share \(1.0\) of MaskedPrediction"),
        (lambda: MaskedPrediction(global_scale=(0.0, 1.0)), r"global_scale \(\[0.0, 1.0\]\)"),
        (lambda: MaskedPrediction(assignment="mean"), r"assignment \(mean\)"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)
