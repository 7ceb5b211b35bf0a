"""Both libraries behind float32 products on a CPU give the same loss."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.losses import siglip_loss
from dist_siglip.losses.kernels import tiles

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_products_are_products(transposed):
    """Checked wherever the operation exists, whichever library this processor gets."""
    left = torch.randn(33, 17) if not transposed else torch.randn(17, 33).T
    right = torch.randn(9, 17) if transposed else torch.randn(17, 9).T
    exact = left.double() @ right.double().T
    assert torch.allclose(tiles.product(left, right).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "onednn",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
        ),
    ],
)
def test_the_loss_is_the_same_by_either_library(onednn, monkeypatch):
    monkeypatch.setattr(tiles, "_onednn_is_faster", lambda: onednn)
    generator = torch.Generator().manual_seed(0)
    sides = F.normalize(torch.randn(2, 70, 12, generator=generator), dim=-1)
    results = {}
    for dtype in (torch.float32, torch.float64):
        arguments = [side.to(dtype).requires_grad_() for side in sides]
        arguments += [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (12.0, -4.0)]
        loss = siglip_loss(*arguments, chunk_rows=32)
        loss.backward()
        results[dtype] = [loss.detach(), *(tensor.grad for tensor in arguments)]
    for narrow, wide in zip(*results.values(), strict=True):
        assert (narrow - wide).abs().max() < 2e-6 * wide.abs().max()
