"""Running statistics that a skipped step has moved come back."""

import torch
from torch import nn

from dist_siglip.training.optim import StepCheck


def one_step(model, optimizer, check, value):
    """A step on a batch that holds ``value``; return what the check found."""
    check.keep(model.buffers())
    images = torch.randn(4, 3)
    images[1, 0] = value
    features = model(images)
    loss = check.look(features.square().sum(), features, features, torch.arange(4))
    optimizer.zero_grad()
    loss.backward()
    check.decide(optimizer, nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    optimizer.step()
    return check.take()


def test_statistics_of_batch_norm_are_those_before_a_skipped_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    check = StepCheck()
    assert not one_step(model, optimizer, check, 0.5).is_skipped
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = one_step(model, optimizer, check, torch.nan)
    assert found.is_skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not one_step(model, optimizer, check, 0.5).is_skipped
    assert model[1].num_batches_tracked == 2


def test_rows_that_are_not_finite_are_pointed_out():
    check = StepCheck()
    features, infinite = torch.ones(4, 2), torch.ones(4, 2)
    infinite[2, 1] = -torch.inf
    weight = nn.Parameter(torch.ones(1))
    check.look(weight.sum(), features, infinite, torch.arange(4))
    check.decide(torch.optim.SGD([weight]), torch.tensor(1.0))
    assert check.take().bad_rows.tolist() == [False, False, True, False]
    assert check.take() is None
