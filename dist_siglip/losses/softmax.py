"""Softmax (CLIP) loss over the global batch, in two passes of the shards around the ranks.

A softmax is normalised over all texts of an image and all images of a text, so no tile knows its
derivative before the sums are complete:

    pass 1   text features travel; the log-sum-exp of every text's column collects what each rank's
             images add and comes home (4 bytes per row); the loss is known
    pass 2   text features travel again with their column sums and collect their gradient

Without gradients there is no second pass. The loss is symmetric in its two sides; if only the
texts learn, the images travel instead and no gradient does. Backward communicates nothing.

Memory per rank: O(B * D + chunk_rows^2), whatever the number of ranks (exchange "ring").
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import AccumulatorSpec, ExchangeName, prepare_exchange
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    FiniteCheck,
    Nonfinite,
    check_chunk_rows,
    check_pairs,
    check_scalar,
    default_chunk_rows,
    describe_wanted,
    find_nonfinite,
)
from dist_siglip.losses.kernels.softmax_tiles import negative_sums_tile, softmax_tile
from dist_siglip.losses.kernels.tiles import (
    add_product,
    inner_product,
    logits_dtype,
    product_dtype,
    sum_dtype,
    tile_slices,
)
from dist_siglip.losses.precomputed_gradients import (
    PrecomputedGradient,
    attach_gradients,
    wants_gradient,
)


def softmax_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    nonfinite: Nonfinite = "raise",
    finite_check: FiniteCheck | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Symmetric cross-entropy (InfoNCE) of images and texts over the batch of all ranks.

    Over the global batch of N pairs on W ranks, z = logit_scale * image_features @ text_features.T:

        loss = W/N * sum_{i on this rank} 1/2 * (
            log sum_{j < N} exp(z[i, j]) - z[i, i] + log sum_{j < N} exp(z[j, i]) - z[i, i] )

    Distributed contract: every rank passes its own rows; the mean over ranks of the returned
    value is the loss of the global batch, and the mean over ranks of the gradients (what DDP and
    FSDP compute) is its gradient: for both towers and the scale, for even and uneven local
    batches. Two passes of the exchange with gradients, one without, each with one small all-gather
    on the CPU; backward communicates nothing. First-order gradients only: create_graph=True
    raises.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised, same dtype; row i belongs to image i. B may differ
            between ranks.
        logit_scale: one element > 0, the multiplier (not its logarithm).
        logit_bias: without effect, there so that the sigmoid loss can be called alike: a softmax
            does not see a shift. Its gradient is exactly zero, so DDP waits for no parameter
            (open_clip#1076).
        nonfinite: "raise" refuses features and scale that are not finite; "propagate" looks for
            nothing. The same on every rank.
        finite_check: memory of earlier calls, see ``nonfinite``; None checks on a CPU only.
        exchange: how features reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time. None is 1024 on a
            CPU, 4096 on a GPU.

    Returns:
        (), float32 (float64 for float64 features); a sum over pairs times W/N.

    Raises:
        UserError: if features are not real (B, D), shapes or dtypes of the two sides differ,
            chunk_rows < 1, features or scale are not finite or the scale not above 0 (names rank
            and row), or ranks disagree on dtype, D, exchange, which gradients they need or the
            scale (names the rank; on a device the scale is compared at the first call only).

    Example:
        >>> features = torch.eye(2, requires_grad=True)
        >>> softmax_loss(features, torch.eye(2), torch.tensor(10.0))
        tensor(4.5399e-05, grad_fn=<_AttachBackward>)

    Source:
        Radford et al. 2021, arXiv:2103.00020, figure 3; the sums over the global batch travel as
        in Inf-CL (Cheng et al. 2024, arXiv:2410.17243), but with the text gradient of the second
        pass.
    """
    check_pairs(image_features, text_features)
    chunk_rows = default_chunk_rows(image_features.device) if chunk_rows is None else chunk_rows
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    check_chunk_rows(chunk_rows)
    dtype = logits_dtype(image_features)
    named = {
        "image_features": image_features.detach(),
        "text_features": text_features.detach(),
        "logit_scale": logit_scale.detach().reshape(()),
    }
    found = find_nonfinite(named, nonfinite, finite_check)
    wanted = {
        "image": wants_gradient(image_features),
        "text": wants_gradient(text_features),
        "scale": wants_gradient(logit_scale),
    }
    # The side that travels should be the one that needs no gradient.
    swapped = wanted["text"] and not wanted["image"]
    sides = (image_features, text_features)
    rows, columns = reversed(sides) if swapped else sides
    scale = logit_scale.detach().reshape(()).to(dtype)
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        result = _run_passes(
            _Sides(rows.detach(), columns.detach(), scale, chunk_rows),
            row_gradient=wanted["text" if swapped else "image"],
            column_gradient=wanted["image" if swapped else "text"],
            scale_gradient=wanted["scale"],
            purpose=f"softmax loss; gradients: {describe_wanted(wanted)}; {found or 'finite'}",
            found=found,
            exchange=exchange,
            group=group,
        )
    if finite_check is not None:
        finite_check.remember(result.value)
    feature_factor = scale * result.factor
    gradients = [
        PrecomputedGradient(rows, result.row_gradient, feature_factor),
        PrecomputedGradient(columns, result.column_gradient, feature_factor),
        PrecomputedGradient(
            logit_scale, _shaped(result.scale_gradient, logit_scale), result.factor
        ),
    ]
    if logit_bias is not None:
        gradients.append(PrecomputedGradient(logit_bias, torch.zeros_like(logit_bias)))
    return attach_gradients("softmax_loss", result.value, gradients)


@dataclass(frozen=True)
class _Sides:
    """Inputs of both passes: this rank's rows stay, its columns travel."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    chunk_rows: int


@dataclass(frozen=True)
class _Result:
    """The loss and its gradients; each gradient times ``factor`` (and scale) is the true one."""

    value: Tensor
    factor: float
    row_gradient: Tensor | None
    column_gradient: Tensor | None
    scale_gradient: Tensor | None


def _run_passes(
    sides: _Sides,
    *,
    row_gradient: bool,
    column_gradient: bool,
    scale_gradient: bool,
    purpose: str,
    found: str,
    exchange: ExchangeName,
    group: ProcessGroup | None,
) -> _Result:
    dtype = sides.scale.dtype
    plan = prepare_exchange(
        [sides.columns],
        accumulators=[AccumulatorSpec((), dtype)],
        combine="logaddexp",
        exchange=exchange,
        group=group,
        purpose=purpose,
        shared={"logit_scale": sides.scale},
    )
    if found:
        raise UserError(f"rank {plan.rank}: {found}")
    first = _SumPass(sides, plan.rank)
    (column_negatives,) = plan.run(first.visit)
    # Half of both directions; mean over ranks of (W / N * own pairs) is the mean over all pairs.
    factor = 0.5 * plan.world_size / max(plan.total_rows, 1)
    negatives = torch.stack([first.row_negatives, column_negatives])
    excess = negatives - first.positives
    # softplus, without its shortcut above 20.
    value = torch.logaddexp(excess, torch.zeros_like(excess)).sum(dtype=sum_dtype(excess.device))
    value = (value * factor).to(dtype)
    if not (row_gradient or column_gradient or scale_gradient):
        return _Result(value, factor, None, None, None)

    row_sums, column_sums = torch.logaddexp(negatives, first.positives).unbind()
    positive_derivative = -torch.sigmoid(excess).sum(dim=0)
    plan = prepare_exchange(
        [sides.columns, column_sums],
        accumulators=[AccumulatorSpec(sides.columns.shape[1:], dtype)] * column_gradient,
        exchange=exchange,
        group=group,
        purpose=purpose,
    )
    second = _GradientPass(
        sides,
        plan.rank,
        row_sums,
        positive_derivative,
        row_gradient=row_gradient,
        scale_gradient=scale_gradient and not (row_gradient or column_gradient),
    )
    home = plan.run(second.visit)
    finished = home[0] if column_gradient else None
    by_scale = second.scale_gradient
    # sum_ij derivative_ij * similarity_ij, from what is already there.
    if scale_gradient and second.row_gradient is not None:
        by_scale = inner_product(sides.rows, second.row_gradient)
    elif scale_gradient and finished is not None:
        by_scale = inner_product(sides.columns, finished)
    return _Result(value, factor, second.row_gradient, finished, by_scale)


class _SumPass:
    """First pass: log-sum-exp over the negatives of every row here and every column there."""

    def __init__(self, sides: _Sides, rank: int) -> None:
        self.sides, self.rank = sides, rank
        self.positives = sides.scale.new_zeros(sides.rows.shape[0])
        self.row_negatives = torch.full_like(self.positives, -torch.inf)

    def visit(
        self, owner: int, shard: tuple[Tensor, ...], contributions: tuple[Tensor, ...]
    ) -> None:
        """Add the tiles of one shard; overwrite the sums of its columns."""
        (travelling,), (column_negatives,) = shard, contributions
        column_negatives.fill_(-torch.inf)
        all_rows, chunk_rows = self.sides.rows, self.sides.chunk_rows
        for rows, columns in tile_slices(len(all_rows), len(travelling), chunk_rows):
            tile = negative_sums_tile(
                all_rows[rows],
                travelling[columns],
                self.sides.scale,
                on_diagonal=owner == self.rank and rows == columns,
            )
            for total, part in (
                (self.row_negatives[rows], tile.rows),
                (column_negatives[columns], tile.columns),
            ):
                torch.logaddexp(total, part, out=total)
            if tile.positives is not None:
                self.positives[rows] = tile.positives


class _GradientPass:
    """Second pass: everything it sums is unscaled, and feature gradients lack logit_scale."""

    def __init__(
        self,
        sides: _Sides,
        rank: int,
        row_sums: Tensor,
        positive_derivative: Tensor,
        *,
        row_gradient: bool,
        scale_gradient: bool,
    ) -> None:
        self.sides, self.rank = sides, rank
        self.row_sums, self.positive_derivative = row_sums, positive_derivative
        self.product_dtype = product_dtype(sides.rows)
        self.row_gradient: Tensor | None = None
        if row_gradient:
            self.row_gradient = torch.zeros_like(sides.rows, dtype=sides.scale.dtype)
        self.scale_gradient: Tensor | None = None
        if scale_gradient:
            device = sides.rows.device
            self.scale_gradient = torch.zeros((), dtype=sum_dtype(device), device=device)

    def visit(
        self, owner: int, shard: tuple[Tensor, ...], contributions: tuple[Tensor, ...]
    ) -> None:
        """Add the tiles of one shard; overwrite the gradient of its columns."""
        travelling, column_sums = shard
        for contribution in contributions:
            contribution.zero_()
        all_rows, chunk_rows = self.sides.rows, self.sides.chunk_rows
        for rows, columns in tile_slices(len(all_rows), len(travelling), chunk_rows):
            on_diagonal = owner == self.rank and rows == columns
            tile = softmax_tile(
                all_rows[rows],
                travelling[columns],
                self.sides.scale,
                self.row_sums[rows],
                column_sums[columns],
                self.positive_derivative[rows] if on_diagonal else None,
            )
            if self.scale_gradient is not None:
                self.scale_gradient += (tile.derivative * tile.similarity).sum()
            derivative = tile.derivative.to(self.product_dtype)
            if self.row_gradient is not None:
                others = travelling[columns].to(self.product_dtype)
                add_product(self.row_gradient[rows], derivative, others)
            for contribution in contributions:
                mine = all_rows[rows].to(self.product_dtype)
                add_product(contribution[columns], derivative.T, mine)


def _shaped(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.reshape(like.shape)
