"""A skipped step leaves parameters, moments and counts as they were, to the bit."""

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW

from dist_siglip.training.optim.step_check import carry_not_finite, restore_where, skip_where

OPTIMIZERS = {
    "fused AdamW": lambda p: AdamW(p, lr=0.1, fused=True),
    "fused Adam, amsgrad": lambda p: Adam(p, lr=0.1, fused=True, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=0.1, fused=False),
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.1),
}


def trained(optimizer_of, bad_steps, num_steps=6, skips=skip_where):
    """Parameters and state after steps whose gradients are nan in ``bad_steps``."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    optimizer = optimizer_of(parameters)
    for step in range(num_steps):
        is_bad = step in bad_steps
        for parameter in parameters:
            # Good steps have the same gradients however many bad ones are in between.
            parameter.grad = torch.full((5,), torch.nan) if is_bad else torch.randn(5)
        skips(optimizer, torch.tensor(is_bad))
        optimizer.step()
    state = optimizer.state_dict()["state"]
    return [p.detach() for p in parameters], [
        value for number in state for value in state[number].values() if torch.is_tensor(value)
    ]


def are_equal(left, right):
    pairs = [pair for part in zip(left, right, strict=True) for pair in zip(*part, strict=True)]
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad_steps", [{2, 3}, {0, 4}])
def test_a_run_with_skipped_steps_is_the_run_without_them(name, bad_steps):
    expected = trained(OPTIMIZERS[name], set(), num_steps=4)
    assert are_equal(trained(OPTIMIZERS[name], bad_steps), expected)


def test_a_step_with_gradients_of_zero_is_not_a_skipped_one():
    """The broken variant: moments decay, weights move on, the count goes up."""

    def zero(optimizer, is_skipped):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.where(is_skipped, 0.0, parameter.grad)

    name = "fused AdamW"
    broken = trained(OPTIMIZERS[name], {2, 3}, skips=zero)
    assert not are_equal(broken, trained(OPTIMIZERS[name], set(), num_steps=4))


def test_a_finite_loss_keeps_its_gradients_to_the_bit_and_any_other_has_none_that_is():
    for value in (0.3, -7.1e30, torch.inf, -torch.inf, torch.nan):
        plain, carried = (torch.tensor([value, 2.0], requires_grad=True) for _ in range(2))
        plain.sum().backward()
        carry_not_finite(carried.sum()).backward()
        is_finite = torch.tensor(value).isfinite()
        assert torch.equal(plain.grad, carried.grad) if is_finite else carried.grad.isnan().all()


@pytest.mark.parametrize("is_skipped", [True, False])
def test_statistics_are_put_back_only_where_the_step_is_skipped(is_skipped):
    values = [torch.tensor([torch.nan]), torch.tensor(3)]
    restore_where(torch.tensor(is_skipped), values, [torch.tensor([1.0]), torch.tensor(2)])
    assert torch.equal(values[1], torch.tensor(2 if is_skipped else 3))
    assert values[0].isnan().item() is not is_skipped
