"""Cross-entropy in chunks: numbers, gradients, precision, and the memory it takes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_siglip.objectives import token_losses
from tests.support.reference_captioning import cross_entropy


def inputs_of(num_rows=7, vocab_size=11, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((num_rows, width), (vocab_size, width), (vocab_size,))
    )
    return hidden, weight, bias, torch.randint(vocab_size, (num_rows,), generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, None])
def test_losses_and_gradients_are_those_of_all_rows_at_once(chunk_rows):
    hidden, weight, bias, labels = inputs_of()
    losses, best = token_losses(hidden, weight, bias, labels, chunk_rows=chunk_rows)
    logits = F.linear(hidden, weight, bias)
    expected = [
        cross_entropy(row, label)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    assert best.equal(logits.argmax(dim=1))
    slopes = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    found = torch.autograd.grad((losses * slopes).sum(), (hidden, weight, bias))
    whole = F.cross_entropy(logits, labels, reduction="none")
    for ours, theirs in zip(
        found, torch.autograd.grad((whole * slopes).sum(), (hidden, weight, bias)), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_of_bfloat16_products_the_softmax_is_float32():
    hidden, weight, bias, labels = inputs_of(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = token_losses(hidden, weight, bias, labels, chunk_rows=2)
        products = F.linear(hidden, weight)
    losses.sum().backward()
    assert losses.dtype == weight.grad.dtype == hidden.grad.dtype == torch.float32
    expected = F.cross_entropy(products.float() + bias, labels, reduction="none")
    assert torch.allclose(losses, expected, atol=1e-6)
    rounded = F.cross_entropy((products + bias.bfloat16()), labels, reduction="none").float()
    assert not torch.allclose(rounded, expected, atol=1e-3)


class Peak(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return made


def test_no_tensor_is_as_large_as_the_logits_of_a_batch_at_256_000_words():
    """Forward and backward: one chunk of logits, or the matrix and its gradient."""
    vocab_size, width, num_rows, chunk_rows = 256_000, 4, 64, 16
    hidden, weight, bias, labels = inputs_of(num_rows, vocab_size, width, torch.float32)
    chunk = 4 * chunk_rows * vocab_size
    with Peak() as peak:
        losses, _ = token_losses(hidden, weight, bias, labels, chunk_rows=chunk_rows)
        losses.mean().backward()
    assert peak.largest == chunk
    with Peak() as peak:
        F.cross_entropy(F.linear(hidden, weight, bias), labels)
    assert peak.largest == 4 * chunk


def test_the_default_chunk_holds_256_mb_of_logits(monkeypatch):
    from dist_siglip.objectives import token_loss

    sizes = []
    make = token_loss._logits

    def note(rows, matrix, bias):
        sizes.append(len(rows))
        return make(rows, matrix, bias)

    monkeypatch.setattr(token_loss, "_logits", note)
    monkeypatch.setattr(token_loss, "_CHUNK_LOGITS", 22)
    token_losses(*inputs_of())
    assert sizes == [2, 2, 2, 1]


def test_a_matrix_of_zeros_gives_the_logarithm_of_the_number_of_words():
    hidden, _, _, labels = inputs_of()
    zeros = torch.zeros(11, 5, dtype=torch.float64)
    losses, _ = token_losses(hidden, zeros, zeros[:, 0], labels)
    assert losses.tolist() == pytest.approx([torch.tensor(11.0).log().item()] * 7, abs=1e-6)
