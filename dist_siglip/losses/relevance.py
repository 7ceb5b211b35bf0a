"""Losses where any query may have several answers: a relevance matrix in place of the diagonal.

Queries stay at home with their rows of the matrix; documents travel with their gradient. The
sigmoid loss needs one trip, because its pairs do not know each other. The softmax loss needs two:
the sum over all documents of a query is known after the first. Backward communicates nothing.

Memory per rank: O(B * D + C * D + chunk_rows^2) beside the matrix itself, which is (B, N).
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName
from dist_siglip.errors import UserError
from dist_siglip.losses.known_gradients import KnownGradient, attach_gradients
from dist_siglip.losses.relevance_trips import RelevanceBatch, SigmoidTrip, SoftmaxTrip, SumTrip
from dist_siglip.losses.trip import check_scalar


def relevance_sigmoid_loss(
    query_features: Tensor,
    document_features: Tensor,
    relevance: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sigmoid loss of this rank's queries against the documents of all ranks.

    With y[q, n] = +1 where document n answers query q and -1 elsewhere, over the Q queries and N
    documents of W ranks:

        loss = W/Q * sum_{q on this rank} sum_{n < N} softplus(-y[q, n] * logits[q, n])
        logits = logit_scale * query_features @ document_features.T + logit_bias

    With the identity as relevance it is ``siglip_loss``.

    Distributed contract: every rank passes its own queries and documents, any numbers of both;
    the mean over ranks of the returned value is the loss of the global batch, and the mean over
    ranks of the gradients is its gradient. One all-reduce of two numbers, one small all-gather on
    the CPU, one trip; backward communicates nothing. First-order gradients only.

    Args:
        query_features: (B, D), L2-normalised.
        document_features: (C, D), L2-normalised, same dtype.
        relevance: (B, N), bool; columns are the documents of all ranks in rank order.
        logit_scale: one element > 0, the multiplier (not its logarithm).
        logit_bias: one element, added to every logit.
        exchange: how documents reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time. None is 1024 on a
            CPU, 4096 on a GPU.

    Returns:
        (), float32 (float64 for float64 features); a sum over pairs times W/Q.

    Raises:
        UserError: if shapes or dtypes do not fit, chunk_rows < 1, features or scalars on a CPU
            are not finite or the scale not above 0 (names rank and row), or ranks disagree (names
            the rank).

    Example:
        >>> everything = torch.ones(2, 2, dtype=torch.bool)
        >>> relevance_sigmoid_loss(torch.eye(2), torch.eye(2), everything,
        ...                        torch.tensor(10.0), torch.tensor(-10.0))
        tensor(10.6932)

    Source:
        Bangachev et al. 2026, arXiv:2605.23556, code BangachevKiril/TopK, which sums where we
        divide by Q and subtracts its (relative) bias.
    """
    check_scalar("logit_bias", logit_bias)
    bias = logit_bias.reshape(())
    batch = RelevanceBatch.of(query_features, document_features, relevance, logit_scale, chunk_rows)
    plan, totals = batch.agree("sigmoid", {"logit_bias": bias}, exchange, group)
    with torch.no_grad(), torch.autocast(query_features.device.type, enabled=False):
        trip = SigmoidTrip(batch, plan, bias)
        gradients = batch.gradients(plan.run(trip.visit), trip.query_gradient)
    factor = plan.world_size / max(totals.queries, 1)
    return attach_gradients(
        "relevance_sigmoid_loss",
        (trip.value * factor).to(batch.scale.dtype),
        [
            *batch.known(gradients, logit_scale, factor),
            KnownGradient(bias, trip.bias_gradient, factor),
        ],
    )


def relevance_softmax_loss(
    query_features: Tensor,
    document_features: Tensor,
    relevance: Tensor,
    logit_scale: Tensor,
    *,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of this rank's queries over the documents of all ranks, queries only.

    With z = logit_scale * query_features @ document_features.T and P the relevant pairs of all
    queries of W ranks:

        loss = W/P * sum_{q on this rank} sum_{p relevant to q} (log sum_{n < N} exp(z[q, n]) -
            z[q, p])

    A query with k answers cannot cost less than k log k. Queries without any cost nothing.

    Distributed contract: that of ``relevance_sigmoid_loss``, with two trips and two small
    all-gathers.

    Args:
        query_features: (B, D), L2-normalised.
        document_features: (C, D), L2-normalised, same dtype.
        relevance: (B, N), bool; columns are the documents of all ranks in rank order.
        logit_scale: one element > 0, the multiplier.
        exchange: how documents reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time. None is 1024 on a
            CPU, 4096 on a GPU.

    Returns:
        (), float32 (float64 for float64 features); a sum over relevant pairs times W/P.

    Raises:
        UserError: if no query of any rank has an answer, or as ``relevance_sigmoid_loss`` does.

    Example:
        >>> everything = torch.ones(2, 2, dtype=torch.bool)
        >>> rows = torch.ones(2, 1)  # all alike
        >>> relevance_softmax_loss(rows, rows, everything, torch.tensor(10.0))
        tensor(0.6931)

    Source:
        Weller et al. 2025, arXiv:2508.21038, code google-deepmind/limit (free embeddings): the
        mean over relevant pairs, rows only.
    """
    batch = RelevanceBatch.of(query_features, document_features, relevance, logit_scale, chunk_rows)
    plan, totals = batch.agree("softmax, sums", {}, exchange, group)
    if totals.positives == 0:
        raise UserError("relevance has no relevant pair on any rank; a softmax needs one")
    factor = plan.world_size / totals.positives
    with torch.no_grad(), torch.autocast(query_features.device.type, enabled=False):
        sums = SumTrip(batch, plan)
        plan.run(sums.visit)
        counts = relevance.sum(dim=1)
        value = (counts * sums.log_sums).sum(dtype=sums.positives.dtype) - sums.positives
        value = (value * factor).to(batch.scale.dtype)
        if not any(batch.wanted.values()):
            return value
        plan = batch.prepare("softmax, gradients", "finite", exchange, group)
        trip = SoftmaxTrip(batch, plan, sums.log_sums, counts)
        gradients = batch.gradients(plan.run(trip.visit), trip.query_gradient)
    return attach_gradients(
        "relevance_softmax_loss", value, batch.known(gradients, logit_scale, factor)
    )
