"""The loss of chosen pairs; parity over ranks: tests/training/module/test_hard_negatives.py."""

import math

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.losses import siglip_loss
from dist_siglip.losses.sampled_pairs import match_loss


def test_all_negatives_give_the_sigmoid_loss_of_the_batch():
    features = torch.nn.functional.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1)
    images, texts = features[0].requires_grad_(), features[1]
    scale, bias = torch.tensor(10.0).double(), torch.tensor(-10.0).double()
    logits = scale * images @ texts.T + bias
    is_positive = torch.eye(5, dtype=torch.bool)
    chosen = match_loss(logits[is_positive], logits[~is_positive])
    whole = siglip_loss(images, texts, scale, bias)
    assert chosen.item() == pytest.approx(whole.item(), rel=1e-12)
    (ours,) = torch.autograd.grad(chosen, images)
    (theirs,) = torch.autograd.grad(whole, images)
    assert torch.allclose(ours, theirs, rtol=1e-10)


def test_the_divisor_is_the_number_of_positives():
    logits = torch.zeros(3), torch.zeros(9)
    assert match_loss(*logits).item() == pytest.approx(12 * math.log(2) / 3)


def test_large_logits_neither_overflow_nor_saturate():
    logits = torch.tensor([-1000.0], requires_grad=True)
    loss = match_loss(logits, torch.tensor([-1000.0]))
    loss.backward()
    assert loss.item() == 1000
    assert logits.grad.item() == -1


def test_half_precision_is_summed_in_float32():
    assert match_loss(torch.zeros(2).bfloat16(), torch.zeros(4).bfloat16()).dtype == torch.float32


def test_no_pairs_at_all_are_no_loss():
    assert match_loss(torch.zeros(0), torch.zeros(0)).item() == 0


def test_a_matrix_of_logits_is_refused():
    with pytest.raises(UserError, match=r"negative_logits \(2, 2\) .* must be one-dimensional"):
        match_loss(torch.zeros(2), torch.zeros(2, 2))
    with pytest.raises(UserError, match=r"positive_logits .*\(torch.int64\) must be"):
        match_loss(torch.arange(2), torch.zeros(2))
