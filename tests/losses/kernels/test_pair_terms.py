"""Value and derivative of a tile keep their digits, on both ways, from tiny to saturated logits."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.losses import siglip_loss
from dist_siglip.losses.kernels.pair_terms import pair_terms, pair_terms_in_place

# Below this float32 has fewer digits (subnormal numbers): softplus(-87) and less.
SMALLEST = torch.finfo(torch.float32).tiny


def truth(logits, positive=None, masked=None):
    """Sum of softplus and the derivative in float64 from the same float32 logits."""
    wide = logits.double()
    signed = wide if positive is None else torch.where(positive, -wide, wide)
    values = torch.log1p(torch.exp(-signed.abs())) + signed.clamp_min(0)
    derivative = torch.sigmoid(signed)
    if positive is not None:
        derivative = torch.where(positive, -derivative, derivative)
    if masked is not None:
        values, derivative = (part.masked_fill(masked, 0) for part in (values, derivative))
    return values.sum().item(), derivative


def on_cpu(logits, row_ids=None, column_ids=None, *, on_diagonal=False, duplicates="positive"):
    logits = logits.clone()
    return pair_terms_in_place(
        logits,
        torch.empty_like(logits),
        row_ids,
        column_ids,
        diagonal=0 if on_diagonal else None,
        duplicates=duplicates,
        with_derivative=True,
    )


def branch_free(
    logits,
    row_ids=None,
    column_ids=None,
    *,
    on_diagonal=False,
    duplicates="positive",
    fn=pair_terms,
):
    diagonal = 0 if on_diagonal else None
    one, zero = logits.new_ones(()), logits.new_zeros(())
    return fn(logits, one, zero, row_ids, column_ids, diagonal, duplicates, logits.dtype)


@pytest.mark.parametrize("terms", [on_cpu, branch_free])
@pytest.mark.parametrize("num_pairs", [1, 33, 1000])
def test_every_size_of_logit_keeps_its_digits(terms, num_pairs):
    """All pairs alike, from -100 to 100 in steps of 1/4, and the borders of the branches."""
    grid = [step / 4 for step in range(-400, 401)] + [-7.8, -7.79, -1e-30, 1e-30, -18.2]
    for logit in grid[:: 1 if num_pairs == 1 else 7]:
        logits = torch.full((1, num_pairs), logit)
        value, derivative = truth(logits)
        found = terms(logits)
        assert found.value.item() == pytest.approx(value, rel=1e-6, abs=SMALLEST * num_pairs)
        error = (found.derivative.double() - derivative).abs().max().item()
        assert error <= 5e-7 * derivative.abs().max().item() + SMALLEST


@pytest.mark.parametrize("terms", [on_cpu, branch_free])
@pytest.mark.parametrize("bias", [-60.0, -28.0, -16.5, -10.0, -7.0, -3.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_a_million_terms_keep_their_digits(terms, bias, spread):
    """Tiny terms, a few large ones among them, and a diagonal of saturated positives."""
    generator = torch.Generator().manual_seed(0)
    logits = bias + spread * torch.randn(1000, 1000, generator=generator)
    logits.diagonal().add_(40)
    positive = torch.eye(1000, dtype=torch.bool)
    value, derivative = truth(logits, positive)
    found = terms(logits, on_diagonal=True)
    assert found.value.item() == pytest.approx(value, rel=1e-6)
    # Relative to what is summed: positives and negatives may cancel.
    scale = derivative.abs().sum().item()
    assert abs(found.derivative_sum.item() - derivative.sum().item()) <= 1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (112.0, -16.5), (30.0, -5.0)])
def test_the_whole_loss_in_float32_is_that_in_float64(dtype, scale, bias):
    generator = torch.Generator().manual_seed(1)
    texts = F.normalize(torch.randn(1000, 64, generator=generator), dim=-1)
    noise = torch.randn(1000, 64, generator=generator) / 8
    images = F.normalize(texts + 2 * noise, dim=-1)
    wide = scale * images.double() @ texts.double().T + bias
    value, _ = truth(wide, torch.eye(1000, dtype=torch.bool))
    found = siglip_loss(
        images.to(dtype), texts.to(dtype), torch.tensor(scale), torch.tensor(bias), chunk_rows=256
    )
    assert found.item() == pytest.approx(
        value / 1000, rel=1e-6 if dtype == torch.float32 else 1e-13
    )


# aot_eager translates as for a GPU and runs the result eagerly; fullgraph refuses a way back to
# the host.
COMPILED = torch.compile(pair_terms, backend="aot_eager", fullgraph=True, dynamic=True)


@pytest.mark.parametrize("duplicates", ["positive", "masked", "negative"])
@pytest.mark.parametrize("on_diagonal", [True, False])
@pytest.mark.parametrize("bias", [-20.0, -4.0, 1.0])
def test_both_ways_agree_about_duplicates(duplicates, on_diagonal, bias):
    generator = torch.Generator().manual_seed(2)
    logits = bias + torch.randn(12, 9, generator=generator, dtype=torch.float64)
    row_ids, column_ids = torch.arange(12) % 5, torch.arange(9) % 5
    diagonal = torch.zeros(12, 9, dtype=torch.bool)
    if on_diagonal:
        diagonal.fill_diagonal_(True)
    equal = (row_ids[:, None] == column_ids[None, :]) & ~diagonal
    value, derivative = truth(
        logits,
        equal | diagonal if duplicates == "positive" else diagonal,
        equal if duplicates == "masked" else None,
    )
    settings = {"on_diagonal": on_diagonal, "duplicates": duplicates}
    for terms in (
        on_cpu(logits, row_ids, column_ids, **settings),
        branch_free(logits, row_ids, column_ids, **settings),
        branch_free(logits, row_ids, column_ids, **settings, fn=COMPILED),
    ):
        assert terms.value.item() == pytest.approx(value, rel=1e-13)
        assert torch.allclose(terms.derivative, derivative, rtol=1e-13)
        assert terms.derivative_sum.item() == pytest.approx(derivative.sum().item(), rel=1e-12)
        assert terms.duplicate_pairs.item() == equal.sum().item()


@pytest.mark.parametrize("terms", [on_cpu, branch_free])
def test_nan_is_passed_on(terms):
    logits = torch.full((2, 3), -20.0)
    logits[1, 1] = torch.nan
    assert torch.isnan(terms(logits).value)
