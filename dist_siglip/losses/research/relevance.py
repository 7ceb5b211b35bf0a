"""Losses of queries with several answers: a relevance matrix in place of the diagonal.

Queries stay at home with their rows of the matrix; documents travel with their gradient. The
sigmoid loss needs one pass, because its pairs do not know each other. The softmax loss needs two:
the sum over all documents of a query is known after the first. Backward communicates nothing.

Memory per rank: O(B * D + C * D + chunk_rows^2) beside the matrix itself, which is (B, N).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import AccumulatorSpec, Exchange, ExchangeName, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    Nonfinite,
    check_rows,
    check_scalar,
    describe_wanted,
    tile_shape_of,
)
from dist_siglip.losses.kernels.pair_terms import Kernel, choose_kernel
from dist_siglip.losses.kernels.tiles import (
    SigmoidTiles,
    inner_product,
    logits_dtype,
    similarity,
    sum_dtype,
)
from dist_siglip.losses.ring_pass import (
    PrecomputedGradient,
    RingPass,
    Shard,
    Tile,
    attach_gradients,
    largest_tile,
    prepare_pass,
    wants_gradient,
)


@dataclass(frozen=True)
class Totals:
    """Counts over all ranks."""

    queries: int
    positives: int


@dataclass(frozen=True)
class FeatureGradients:
    """Without the loss's factor; those of the features without logit_scale too."""

    query: Tensor | None
    document: Tensor | None
    scale: Tensor | None


@dataclass(frozen=True)
class RelevanceBatch:
    """This rank's part of the batch, detached, and which gradients are wanted."""

    queries: Tensor
    documents: Tensor
    relevance: Tensor
    scale: Tensor
    wanted: dict[str, bool]
    leaves: tuple[Tensor, Tensor]
    tile_shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        query_features: Tensor,
        document_features: Tensor,
        relevance: Tensor,
        logit_scale: Tensor,
        chunk_rows: int | None,
    ) -> "RelevanceBatch":
        """Check the arguments of a loss and detach them.

        Raises:
            UserError: if shapes or dtypes do not fit, or chunk_rows < 1.
        """
        _check(query_features, document_features, relevance)
        check_scalar("logit_scale", logit_scale)
        return cls(
            query_features.detach(),
            document_features.detach(),
            relevance,
            logit_scale.detach().reshape(()).to(logits_dtype(query_features)),
            {
                "queries": wants_gradient(query_features),
                "documents": wants_gradient(document_features),
                "scale": wants_gradient(logit_scale),
            },
            (query_features, document_features),
            tile_shape_of(chunk_rows, query_features.device),
        )

    def agree(
        self,
        purpose: str,
        scalars: dict[str, Tensor],
        nonfinite: Nonfinite,
        exchange: ExchangeName,
        group: ProcessGroup | None,
    ) -> tuple[Exchange, Totals]:
        """Check the batch with all ranks; return the first pass and the totals over ranks."""
        named = {
            "query_features": self.queries,
            "document_features": self.documents,
            "logit_scale": self.scale,
            **{name: value.detach() for name, value in scalars.items()},
        }
        shared = {"logit_scale": self.scale} | {n: v.detach() for n, v in scalars.items()}
        plan = self.prepare(purpose, exchange, group, named, nonfinite, shared)
        if plan.total_rows != self.relevance.shape[1]:
            raise UserError(
                f"relevance has {self.relevance.shape[1]} columns, but the ranks hold "
                f"{plan.total_rows} documents; it needs one for each, in rank order"
            )
        own = torch.stack([self.relevance.new_tensor(len(self.queries), dtype=torch.int64)] * 2)
        own[1] = self.relevance.sum()
        return plan, Totals(*sum_over_ranks(own, group).tolist())

    def prepare(
        self,
        purpose: str,
        exchange: ExchangeName,
        group: ProcessGroup | None,
        named: Mapping[str, Tensor],
        nonfinite: Nonfinite,
        shared: Mapping[str, Tensor] | None = None,
    ) -> Exchange:
        """Plan a pass of the documents; what all ranks must agree on is in its purpose."""
        brings_back = self.wanted["documents"] and purpose != "softmax, sums"
        spec = AccumulatorSpec(self.documents.shape[1:], self.scale.dtype)
        return prepare_pass(
            [self.documents],
            named=named,
            nonfinite=nonfinite,
            accumulators=[spec] * brings_back,
            exchange=exchange,
            group=group,
            purpose=(
                f"relevance {purpose}; {self.relevance.shape[1]} documents; gradients: "
                f"{describe_wanted(self.wanted)}"
            ),
            shared=shared,
        )

    def gradients(
        self, brought: tuple[Tensor, ...], query_gradient: Tensor | None
    ) -> FeatureGradients:
        """Sort what a pass collected; the derivative by the scale follows from either side."""
        document_gradient = brought[0] if brought else None
        by_scale = None
        if self.wanted["scale"] and query_gradient is not None:
            by_scale = inner_product(self.queries, query_gradient)
        wanted = query_gradient if self.wanted["queries"] else None
        return FeatureGradients(wanted, document_gradient, by_scale)

    def known(
        self, gradients: FeatureGradients, logit_scale: Tensor, factor: float
    ) -> list[PrecomputedGradient]:
        """Say what belongs to which argument; ``factor`` is the loss's own."""
        by_scale = gradients.scale
        if by_scale is not None:
            by_scale = by_scale.reshape(logit_scale.shape)
        return [
            PrecomputedGradient(self.leaves[0], gradients.query, self.scale * factor),
            PrecomputedGradient(self.leaves[1], gradients.document, self.scale * factor),
            PrecomputedGradient(logit_scale, by_scale, factor),
        ]


class _RelevancePass(RingPass):
    """Visits the documents of every rank with the queries at home."""

    def __init__(self, batch: RelevanceBatch, plan: Exchange, *, with_gradients: bool) -> None:
        wanted = with_gradients and (batch.wanted["queries"] or batch.wanted["scale"])
        super().__init__(batch.queries, plan, batch.tile_shape, with_home_gradient=wanted)
        self.batch = batch
        counts = plan.row_counts
        self.starts = [sum(counts[:rank]) for rank in range(len(counts))]

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> Tensor | None:
        """Take one tile; return the derivative by the logits, if wanted."""
        start = self.starts[place.owner]
        documents = slice(start + place.columns.start, start + place.columns.stop)
        relevant = self.batch.relevance[place.rows, documents]
        return self.derivative(place.rows, home, shard[0], relevant)

    def derivative(
        self, rows: slice, queries: Tensor, documents: Tensor, relevant: Tensor
    ) -> Tensor | None:
        """Add one tile to the sums; return the derivative by its logits, if wanted."""
        raise NotImplementedError


class SigmoidPass(_RelevancePass):
    """The only pass of the sigmoid loss; ``bias`` is ()."""

    def __init__(self, batch: RelevanceBatch, plan: Exchange, bias: Tensor, kernel: Kernel) -> None:
        wanted = any(batch.wanted.values()) or bias.requires_grad
        super().__init__(batch, plan, with_gradients=wanted)
        self.tiles = SigmoidTiles(
            batch.queries,
            largest_tile(batch.queries, plan, batch.tile_shape),
            batch.scale,
            bias.detach().to(batch.scale.dtype),
            kernel=kernel,
            with_derivative=wanted,
            derivative_dtype=batch.scale.dtype,
        )

    def derivative(
        self, rows: slice, queries: Tensor, documents: Tensor, relevant: Tensor
    ) -> Tensor | None:
        """Add the loss of a tile; return its derivative."""
        return self.tiles.derivative(queries, documents, diagonal=None, relevant=relevant)


class SumPass(_RelevancePass):
    """The first pass of the softmax: what a query sums over all documents."""

    def __init__(self, batch: RelevanceBatch, plan: Exchange) -> None:
        super().__init__(batch, plan, with_gradients=False)
        self.log_sums = batch.scale.new_full(batch.queries.shape[:1], -torch.inf)
        device = batch.scale.device
        self.positives = torch.zeros((), dtype=sum_dtype(device), device=device)

    def derivative(self, rows: slice, queries: Tensor, documents: Tensor, relevant: Tensor) -> None:
        """Add a tile to the sums."""
        logits = similarity(queries, documents) * self.batch.scale
        total = self.log_sums[rows]
        torch.logaddexp(total, logits.logsumexp(dim=1), out=total)
        self.positives += torch.where(relevant, logits, 0).sum()


class SoftmaxPass(_RelevancePass):
    """The second pass of the softmax: the gradients."""

    def __init__(
        self, batch: RelevanceBatch, plan: Exchange, log_sums: Tensor, counts: Tensor
    ) -> None:
        super().__init__(batch, plan, with_gradients=True)
        self.log_sums, self.counts = log_sums, counts

    def derivative(
        self, rows: slice, queries: Tensor, documents: Tensor, relevant: Tensor
    ) -> Tensor:
        """Return the derivative of a tile."""
        logits = similarity(queries, documents) * self.batch.scale
        shares = torch.exp(logits - self.log_sums[rows, None])
        return shares * self.counts[rows, None] - relevant.to(shares.dtype)


def _check(queries: Tensor, documents: Tensor, relevance: Tensor) -> None:
    check_rows(query_features=queries, document_features=documents)
    if queries.shape[1] != documents.shape[1]:
        raise UserError(
            f"query_features {tuple(queries.shape)} and document_features "
            f"{tuple(documents.shape)} must be (B, D) and (C, D)"
        )
    if queries.dtype != documents.dtype:
        raise UserError(
            f"query_features ({queries.dtype}) and document_features ({documents.dtype}) must "
            "have one dtype; cast one of them"
        )
    if relevance.dtype != torch.bool or relevance.shape[:1] != queries.shape[:1]:
        raise UserError(
            f"relevance {tuple(relevance.shape)} ({relevance.dtype}) must be bool with a row for "
            f"each of the {len(queries)} queries"
        )


def relevance_sigmoid_loss(
    query_features: Tensor,
    document_features: Tensor,
    relevance: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    nonfinite: Nonfinite = "raise",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    kernel: Kernel = "auto",
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
    the CPU, one pass; backward communicates nothing. First-order gradients only.

    Args:
        query_features: (B, D), L2-normalised.
        document_features: (C, D), L2-normalised, same dtype.
        relevance: (B, N), bool; columns are the documents of all ranks in rank order.
        logit_scale: one element > 0, the multiplier (not its logarithm).
        logit_bias: one element, added to every logit.
        nonfinite: "propagate" lets pass what is not finite; the same on every rank.
        exchange: how documents reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time. None is 1024 on a
            CPU, 8192 rows and 4096 columns on a GPU.
        kernel: who computes the terms of a tile, as for ``siglip_loss``.

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
    chosen = choose_kernel(kernel, query_features)
    plan, totals = batch.agree("sigmoid", {"logit_bias": bias}, nonfinite, exchange, group)
    with torch.no_grad(), torch.autocast(query_features.device.type, enabled=False):
        ring_pass = SigmoidPass(batch, plan, bias, chosen)
        gradients = batch.gradients(ring_pass.run(plan), ring_pass.home_gradient)
        sums = ring_pass.tiles.sums()
    factor = plan.world_size / max(totals.queries, 1)
    return attach_gradients(
        "relevance_sigmoid_loss",
        (sums.value * factor).to(batch.scale.dtype),
        [
            *batch.known(gradients, logit_scale, factor),
            PrecomputedGradient(bias, sums.derivative, factor),
        ],
    )


def relevance_softmax_loss(
    query_features: Tensor,
    document_features: Tensor,
    relevance: Tensor,
    logit_scale: Tensor,
    *,
    nonfinite: Nonfinite = "raise",
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

    Distributed contract: that of ``relevance_sigmoid_loss``, with two passes and two small
    all-gathers.

    Args:
        query_features: (B, D), L2-normalised.
        document_features: (C, D), L2-normalised, same dtype.
        relevance: (B, N), bool; columns are the documents of all ranks in rank order.
        logit_scale: one element > 0, the multiplier.
        nonfinite: "propagate" lets pass what is not finite; the same on every rank.
        exchange: how documents reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time. None is 1024 on a
            CPU, 8192 rows and 4096 columns on a GPU.

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
    plan, totals = batch.agree("softmax, sums", {}, nonfinite, exchange, group)
    if totals.positives == 0:
        raise UserError("relevance has no relevant pair on any rank; a softmax needs one")
    factor = plan.world_size / totals.positives
    with torch.no_grad(), torch.autocast(query_features.device.type, enabled=False):
        sums = SumPass(batch, plan)
        sums.run(plan)
        counts = relevance.sum(dim=1)
        value = (counts * sums.log_sums).sum(dtype=sums.positives.dtype) - sums.positives
        value = (value * factor).to(batch.scale.dtype)
        if not any(batch.wanted.values()):
            return value
        plan = batch.prepare("softmax, gradients", exchange, group, {}, "propagate")
        ring_pass = SoftmaxPass(batch, plan, sums.log_sums, counts)
        gradients = batch.gradients(ring_pass.run(plan), ring_pass.home_gradient)
    return attach_gradients(
        "relevance_softmax_loss", value, batch.known(gradients, logit_scale, factor)
    )
