"""Losses over a relevance matrix: values, gradients, and the same on any number of ranks."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.distributed import gather_rows, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.losses import relevance_sigmoid_loss, relevance_softmax_loss, siglip_loss
from tests.support.parity import largest_error
from tests.support.processes import run_ranks
from tests.support.reference_relevance import (
    relevance_sigmoid_and_gradients,
    relevance_softmax_and_gradients,
)

SCALE, BIAS = 4.0, -1.5
# Queries and documents by rank; one rank without queries, one without documents.
LAYOUTS = {1: ((7,), (5,)), 2: ((4, 3), (0, 5)), 3: ((5, 0, 2), (2, 3, 0))}


def _rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    queries, documents = (
        F.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64), dim=1).to(dtype)
        for n in (7, 5)
    )
    relevance = torch.rand(7, 5, generator=generator) < 0.4
    relevance[3] = False  # a query without an answer
    return queries, documents, relevance


def _leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def _losses(rank, world_size):
    """Both losses with their gradients on this rank's part of the batch, gathered."""
    queries, documents, relevance = _rows()
    query_counts, document_counts = LAYOUTS[world_size]
    mine = slice(sum(query_counts[:rank]), sum(query_counts[: rank + 1]))
    own = slice(sum(document_counts[:rank]), sum(document_counts[: rank + 1]))
    results = {}
    for exchange in ("auto",) if world_size == 1 else ("ring", "two_way", "all_gather"):
        for chunk_rows in (2, None):
            for name in ("sigmoid", "softmax"):
                rows = _leaves(queries[mine], documents[own], torch.tensor(SCALE).double())
                bias = torch.tensor(BIAS).double().requires_grad_()
                how = {"exchange": exchange, "chunk_rows": chunk_rows}
                if name == "sigmoid":
                    arguments = (*rows[:2], relevance[mine], rows[2], bias)
                    loss = relevance_sigmoid_loss(*arguments, **how)
                else:
                    loss = relevance_softmax_loss(*rows[:2], relevance[mine], rows[2], **how)
                loss.backward()
                results[name, exchange, chunk_rows] = {
                    "loss": sum_over_ranks(loss) / world_size,
                    "queries": gather_rows(rows[0].grad) / world_size,
                    "documents": gather_rows(rows[1].grad) / world_size,
                    "scale": sum_over_ranks(rows[2].grad) / world_size,
                    "bias": None if bias.grad is None else sum_over_ranks(bias.grad) / world_size,
                }
    return results


@lru_cache
def _on_ranks(world_size):
    if world_size == 1:
        return [_losses(0, 1)]
    return run_ranks(_losses, world_size)


def _references():
    rows = _rows()
    return {
        "sigmoid": relevance_sigmoid_and_gradients(*rows, SCALE, BIAS),
        "softmax": relevance_softmax_and_gradients(*rows, SCALE),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradients_are_those_of_plain_loops_on_any_number_of_ranks(world_size):
    references = _references()
    for results in _on_ranks(world_size):
        for (name, *_), result in results.items():
            assert largest_error(result, references[name]) < 1e-12


def test_a_gradient_that_stays_at_its_rank_would_be_noticed():
    reference = _references()["sigmoid"]
    kept = _on_ranks(2)[0]["sigmoid", "ring", None]
    kept = kept | {"documents": kept["documents"] / 2}
    assert largest_error(kept, reference) > 0.1


def test_the_identity_gives_the_sigmoid_loss_of_pairs():
    queries, documents, _ = _rows(torch.float32)
    scalars = torch.tensor(SCALE), torch.tensor(BIAS)
    eye = torch.eye(5, dtype=torch.bool)
    expected = siglip_loss(queries[:5], documents, *scalars)
    assert relevance_sigmoid_loss(queries[:5], documents, eye, *scalars).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_gradients_pass_gradcheck():
    queries, documents, relevance = _rows()
    leaves = _leaves(queries, documents, torch.tensor(SCALE).double(), torch.tensor(BIAS).double())

    def sigmoid(queries, documents, scale, bias):
        return relevance_sigmoid_loss(queries, documents, relevance, scale, bias)

    def softmax(queries, documents, scale):
        return relevance_softmax_loss(queries, documents, relevance, scale)

    assert torch.autograd.gradcheck(sigmoid, leaves)
    assert torch.autograd.gradcheck(softmax, leaves[:3])


def test_what_needs_no_gradient_gets_none():
    queries, documents, relevance = _rows()
    (documents,) = _leaves(documents)
    scale, bias = torch.tensor(SCALE).double(), torch.tensor(BIAS).double()
    loss = relevance_sigmoid_loss(queries, documents, relevance, scale, bias)
    loss.backward()
    expected = _references()["sigmoid"]["documents"]
    assert torch.allclose(documents.grad, expected, rtol=1e-12)
    with torch.no_grad():
        assert not relevance_softmax_loss(queries, documents, relevance, scale).requires_grad


@pytest.mark.parametrize("extreme", [-300.0, 300.0])
def test_saturated_pairs_cost_their_logit(extreme):
    one = torch.ones(1, 1)
    relevance = torch.tensor([[extreme < 0]])
    scale = torch.tensor(abs(extreme))
    loss = relevance_sigmoid_loss(
        one, one * (1 if extreme > 0 else -1), relevance, scale, scale * 0
    )
    assert loss.item() == pytest.approx(300.0)


def test_wrong_arguments_are_named():
    queries, documents, relevance = _rows()
    scale = torch.tensor(SCALE)
    with pytest.raises(UserError, match=r"relevance \(7, 5\) \(torch.int64\) must be bool"):
        relevance_softmax_loss(queries, documents, relevance.long(), scale)
    with pytest.raises(UserError, match="relevance has 5 columns, but the ranks hold 4 documents"):
        relevance_softmax_loss(queries, documents[:4], relevance, scale)
    with pytest.raises(UserError, match="no relevant pair"):
        relevance_softmax_loss(queries, documents, relevance & False, scale)
    with pytest.raises(UserError, match="must have one dtype"):
        relevance_softmax_loss(queries, documents.float(), relevance, scale)
    queries[2, 0] = torch.nan
    with pytest.raises(UserError, match="query_features row 2 is not finite"):
        relevance_softmax_loss(queries, documents, relevance, scale)
