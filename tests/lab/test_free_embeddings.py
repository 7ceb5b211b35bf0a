"""Free rows move on the sphere as the authors move theirs."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.lab.free_embeddings import random_rows, train_free_embeddings, warm_up_and_cosine


def rows_of(*sizes, trainable=True):
    generator = torch.Generator().manual_seed(3)
    return [random_rows(size, 4, generator, trainable=trainable) for size in sizes]


def distance(rows):
    return (rows[0] - rows[1]).square().sum()


def test_random_rows_are_those_of_the_global_generator():
    torch.manual_seed(50)
    expected = F.normalize(torch.randn(5, 3), dim=-1)
    assert torch.equal(random_rows(5, 3, torch.Generator().manual_seed(50)), expected)


def test_rows_stay_on_the_sphere_and_locked_ones_where_they_are():
    (moving,), (locked,) = rows_of(6), rows_of(6, trainable=False)
    moving, locked = torch.nn.Parameter(-moving.detach()), locked
    start = locked.clone()
    trained = train_free_embeddings([moving, locked], distance, steps=30)
    assert torch.equal(locked, start)
    assert torch.allclose(trained.rows[0].norm(dim=1), torch.ones(6))
    assert not trained.rows[0].requires_grad


def test_the_first_step_moves_each_coordinate_by_the_learning_rate_along_the_sphere():
    """Adam's first step is the sign of the gradient, here of the normalised rows."""
    (rows,) = rows_of(5)
    target = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(4)), dim=-1)
    start = rows.detach().clone()
    outward = -2 * target
    tangent = outward - (outward * start).sum(dim=1, keepdim=True) * start
    expected = F.normalize(start - 0.01 * tangent.sign(), dim=-1)
    trained = train_free_embeddings([rows], lambda r: -2 * (r[0] * target).sum(), steps=1)
    assert torch.allclose(trained.rows[0], expected, atol=1e-6)
    # Without the normalisation in the loss the gradient has a part along the row.
    assert not torch.allclose(
        F.normalize(start - 0.01 * outward.sign(), dim=-1), expected, atol=1e-3
    )


def test_scalars_that_learn_are_trained_and_locked_ones_not():
    learns, locked = (torch.nn.Parameter(torch.ones(1), requires_grad=on) for on in (True, False))
    pair = rows_of(3, 3)
    train_free_embeddings(
        pair, lambda rows: learns * locked * distance(rows), [learns, locked], steps=3
    )
    assert learns.item() != 1.0
    assert locked.item() == 1.0


def test_watch_ends_the_training_and_sees_unit_rows():
    seen = []

    def watch(step, loss, rows):
        seen.append((step, [tuple(side.shape) for side in rows]))
        return step >= 20

    trained = train_free_embeddings(rows_of(3, 3), distance, steps=100, watch=watch, watch_steps=10)
    assert seen == [(step, [(3, 4), (3, 4)]) for step in (10, 20)]
    assert trained.steps == 20


def test_the_last_step_is_watched_and_recorded():
    seen, progress = [], []
    trained = train_free_embeddings(
        rows_of(3, 3),
        distance,
        steps=1003,
        watch=lambda step, loss, rows: bool(seen.append(step)),
        watch_steps=500,
        progress=progress.append,
    )
    assert seen == [500, 1000, 1003]
    assert trained.recorded_steps[:3] == [1, 2, 5]
    assert trained.recorded_steps[-1] == 1003
    assert trained.recorded_losses[-1] == trained.loss
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_the_schedule_multiplies_the_learning_rate():
    """With a factor of 0 nothing moves, the first step of all included."""
    pair = rows_of(3, 3)
    start = [side.detach().clone() for side in pair]
    trained = train_free_embeddings(pair, distance, steps=5, schedule=lambda done: 0.0)
    assert all(torch.allclose(*two, atol=1e-7) for two in zip(trained.rows, start, strict=True))


@pytest.mark.parametrize(
    ("share", "factor"), [(0.0, 0.1), (0.025, 0.55), (0.05, 1.0), (0.525, 0.505), (1.0, 0.01)]
)
def test_warm_up_is_linear_and_the_end_a_cosine(share, factor):
    assert warm_up_and_cosine(0.05)(share) == pytest.approx(factor)


def test_a_run_that_leaves_numbers_ends_with_nan():
    trained = train_free_embeddings(
        rows_of(3), lambda rows: (rows[0].sum() * torch.inf).sqrt(), steps=3
    )
    assert trained.loss != trained.loss
