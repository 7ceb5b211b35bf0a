"""Cross-entropy in chunks: numbers, gradients, precision, and the memory it takes."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.objectives import token_losses
from tests.support.allocations import allocated_peak, tensor_peak
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


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_peak_bytes_at_256_000_words_are_those_of_a_chunk_whatever_the_batch(narrow):
    """Forward and backward; the logits of the batch are 4 and 8 chunks."""
    vocab_size, width, chunk_rows = 256_000, 4, 16
    chunk, matrix = 4 * chunk_rows * vocab_size, 4 * width * vocab_size

    def ours(num_rows):
        hidden, weight, bias, labels = inputs_of(num_rows, vocab_size, width, torch.float32)

        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                losses, _ = token_losses(hidden, weight, bias, labels, chunk_rows=chunk_rows)
            losses.mean().backward()

        return (tensor_peak if narrow else allocated_peak)(run)

    few, many = ours(4 * chunk_rows), ours(8 * chunk_rows)
    # A chunk; in bfloat16 its copy, and that of the matrix; the gradients of matrix and bias.
    held = (1.5 * (chunk + matrix) if narrow else chunk + matrix) + 2 * 4 * vocab_size
    assert few < 1.1 * held
    assert many < few + chunk / 100
    hidden, weight, bias, labels = inputs_of(8 * chunk_rows, vocab_size, width, torch.float32)
    whole = allocated_peak(
        lambda: F.cross_entropy(F.linear(hidden, weight, bias), labels).backward()
    )
    assert whole > 8 * chunk


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
