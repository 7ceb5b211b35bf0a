"""TopK autoencoders: codes by hand, what training must reach, and reproducibility."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.lab.sparse_features import (
    SparseAutoencoder,
    SparseSettings,
    _revive,
    train_sparse_autoencoder,
    unexplained_share,
)

SMALL = SparseSettings(
    num_features=40, num_active=2, steps=800, batch_rows=64, learning_rate=1e-2, revive_every=100
)


def sparse_rows(count=2000, width=32, seed=1):
    """Sums of two of sixteen directions, and which ones."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(16, width, generator=generator), dim=1)
    chosen = torch.rand(count, 16, generator=generator).argsort(dim=1)[:, :2]
    values = 0.5 + torch.rand(count, 2, generator=generator)
    codes = torch.zeros(count, 16).scatter(1, chosen, values)
    return codes @ directions, codes, directions


@pytest.fixture(scope="module")
def trained():
    return train_sparse_autoencoder(sparse_rows()[0], SMALL)


def test_codes_by_hand():
    model = SparseAutoencoder(2, 3, 2)
    with torch.no_grad():
        model.center.copy_(torch.tensor([1.0, 0.0]))
        model.encoder.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]))
        model.encoder.bias.copy_(torch.tensor([0.0, 0.5, -9.0]))
        model.directions.copy_(torch.eye(3)[:, :2])
    # x - c = (2, -1): 2, -0.5, -6: relu leaves one; (3, 4): 3, 4.5, 1: the two largest.
    codes = model.encode(torch.tensor([[3.0, -1.0], [4.0, 4.0]]))
    assert codes.tolist() == [[2, 0, 0], [3, 4.5, 0]]
    assert model.decode(codes).tolist() == [[3, 0], [4, 4.5]]


def test_training_explains_sparse_rows(trained):
    rows, _, _ = sparse_rows()
    assert unexplained_share(trained, rows) < 0.02
    start = train_sparse_autoencoder(rows, SparseSettings(num_features=24, num_active=2, steps=1))
    assert unexplained_share(start, rows) > 0.5


def test_training_finds_the_directions_that_made_the_rows(trained):
    _, _, directions = sparse_rows()
    best = (directions @ trained.directions.T).amax(dim=1)
    assert (best > 0.95).all()


def test_codes_have_at_most_so_many_positive_entries(trained):
    codes = trained.encode(sparse_rows()[0])
    assert int((codes > 0).sum(dim=1).max()) <= 2
    assert float(codes.min()) == 0


def test_directions_have_length_one(trained):
    assert torch.allclose(trained.directions.norm(dim=1), torch.ones(40))


def test_unused_directions_are_made_anew_from_what_is_unexplained():
    torch.manual_seed(3)
    model = SparseAutoencoder(3, 4, 1)
    rows = torch.randn(2, 3)
    left = F.normalize(rows - model.decode(model.encode(rows)), dim=1)
    kept = model.directions[[0, 2]].clone()
    _revive(model, torch.tensor([1, 3]), rows)
    assert torch.allclose(model.directions[[1, 3]], left)
    assert torch.allclose(model.encoder.weight[[1, 3]], 0.1 * left)
    assert model.encoder.bias[[1, 3]].tolist() == [0, 0]
    assert torch.equal(model.directions[[0, 2]], kept)


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    rows = sparse_rows()[0]
    few = SparseSettings(num_features=8, num_active=2, steps=3, batch_rows=8)
    before = torch.random.get_rng_state()
    there, again = (train_sparse_autoencoder(rows, few) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(there.directions, again.directions)


def test_progress_is_told_after_every_step():
    told = []
    few = SparseSettings(num_features=8, num_active=2, steps=3, batch_rows=8)
    train_sparse_autoencoder(sparse_rows()[0], few, on_step=lambda *step: told.append(step))
    assert [number for number, _ in told] == [1, 2, 3]
    assert all(error > 0 for _, error in told)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"sparse.steps \(0\) must be at least 1"),
        ({"num_active": 9, "num_features": 8}, r"sparse.num_active \(9\) must be at most"),
        ({"learning_rate": 0.0}, r"sparse.learning_rate \(0.0\) must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        train_sparse_autoencoder(torch.ones(3, 2), SparseSettings(**settings))


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="there are no rows"):
        train_sparse_autoencoder(torch.ones(0, 2), SMALL)
