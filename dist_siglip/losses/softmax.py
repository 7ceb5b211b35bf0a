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

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from dist_siglip.distributed import AccumulatorSpec, Exchange, ExchangeName, sum_over_ranks
from dist_siglip.losses.arguments import (
    FiniteCheck,
    Nonfinite,
    check_negatives,
    check_pairs,
    check_scalar,
    describe_wanted,
    tile_shape_of,
)
from dist_siglip.losses.kernels.pair_terms import Kernel, choose_kernel
from dist_siglip.losses.kernels.softmax_tiles import NegativeSumTiles, SoftmaxTiles
from dist_siglip.losses.kernels.tiles import inner_product, logits_dtype, sum_dtype
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


def softmax_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    negative_text_features: Tensor | None = None,
    nonfinite: Nonfinite = "raise",
    finite_check: FiniteCheck | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Symmetric cross-entropy (InfoNCE) of images and texts over the batch of all ranks.

    Over the global batch of N pairs on W ranks, z = logit_scale * image_features @ text_features.T:

        loss = W/N * sum_{i on this rank} 1/2 * (
            log sum_{j < N} exp(z[i, j]) - z[i, i] + log sum_{j < N} exp(z[j, i]) - z[i, i] )

    ``negative_text_features`` are further texts on all ranks, which no picture belongs to: the
    first sum of each image is over them, too. They are no queries.

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
        negative_text_features: (m, D), as for ``siglip_loss``; on a GPU the host waits for their
            number.
        nonfinite: "raise" refuses features and scale that are not finite; "propagate" looks for
            nothing. The same on every rank.
        finite_check: memory of earlier calls, see ``nonfinite``; None checks on a CPU only.
        exchange: how features reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time. None is 1024 on a
            CPU, 8192 rows and 4096 columns on a GPU.
        kernel: who computes the terms of a tile, as for ``siglip_loss``.

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
    check_negatives(negative_text_features, text_features)
    tile_shape = tile_shape_of(chunk_rows, image_features.device)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    chosen = choose_kernel(kernel, image_features)
    dtype = logits_dtype(image_features)
    named = {
        "image_features": image_features.detach(),
        "text_features": text_features.detach(),
        "logit_scale": logit_scale.detach().reshape(()),
    }
    num_pairs = len(image_features)
    if negative_text_features is not None:
        named["negative_text_features"] = negative_text_features.detach()
        there = negative_text_features[(negative_text_features.detach() != 0).any(dim=1)]
        text_features = torch.cat([text_features, there])
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
            SoftmaxSides(rows.detach(), columns.detach(), scale, tile_shape, chosen),
            own=num_pairs,
            row_gradient=wanted["text" if swapped else "image"],
            column_gradient=wanted["image" if swapped else "text"],
            scale_gradient=wanted["scale"],
            purpose=f"softmax loss; gradients: {describe_wanted(wanted)}"
            f"{'' if negative_text_features is None else '; with negative texts'}",
            named=named,
            nonfinite=nonfinite,
            finite_check=finite_check,
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
class SoftmaxSides:
    """Inputs of both passes: this rank's rows stay, its columns travel."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    tile_shape: tuple[int, int]
    kernel: Kernel


@dataclass(frozen=True)
class _Result:
    """The loss and its gradients; each gradient times ``factor`` (and scale) is the true one."""

    value: Tensor
    factor: float | Tensor
    row_gradient: Tensor | None
    column_gradient: Tensor | None
    scale_gradient: Tensor | None


def _run_passes(
    sides: SoftmaxSides,
    *,
    own: int,
    row_gradient: bool,
    column_gradient: bool,
    scale_gradient: bool,
    purpose: str,
    named: Mapping[str, Tensor],
    nonfinite: Nonfinite,
    finite_check: FiniteCheck | None,
    exchange: ExchangeName,
    group: ProcessGroup | None,
) -> _Result:
    """Make both passes; rows behind the first ``own`` of a side are texts without a picture."""
    dtype = sides.scale.dtype
    plan = prepare_pass(
        [sides.columns],
        named=named,
        nonfinite=nonfinite,
        finite_check=finite_check,
        accumulators=[AccumulatorSpec((), dtype)],
        combine="logaddexp",
        exchange=exchange,
        group=group,
        purpose=purpose,
        shared={"logit_scale": sides.scale},
        comes_again=row_gradient or column_gradient or scale_gradient,
    )
    first = SumPass(sides, plan)
    (column_negatives,) = first.run(plan)
    # Half of both directions; mean over ranks of (W / N * own pairs) is the mean over all pairs.
    factor: float | Tensor = 0.5 * plan.world_size / max(plan.total_rows, 1)
    if "negative_text_features" in named:  # rows that travel may be more than pairs
        num_pairs = sum_over_ranks(
            torch.full((), own, dtype=dtype, device=sides.rows.device), group
        )
        factor = 0.5 * plan.world_size / num_pairs.clamp(min=1)
    row_negatives, positives = (each[:own] for each in first.tiles.sums)
    negatives = torch.stack([row_negatives, column_negatives[:own]])
    excess = negatives - positives
    # softplus, without its shortcut above 20.
    value = torch.logaddexp(excess, torch.zeros_like(excess)).sum(dtype=sum_dtype(excess.device))
    value = (value * factor).to(dtype)
    if not (row_gradient or column_gradient or scale_gradient):
        return _Result(value, factor, None, None, None)

    # Texts without a picture are no queries: exp(logits - inf) is 0.
    row_sums, column_sums = (
        pad(sums, (0, len(side) - own), value=torch.inf)
        for sums, side in zip(
            torch.logaddexp(negatives, positives), (sides.rows, sides.columns), strict=True
        )
    )
    positive_derivative = pad(-torch.sigmoid(excess).sum(dim=0), (0, len(sides.rows) - own))
    plan = prepare_pass(
        [sides.columns, column_sums],
        named={},
        nonfinite="propagate",
        accumulators=[AccumulatorSpec(sides.columns.shape[1:], dtype)] * column_gradient,
        exchange=exchange,
        group=group,
        purpose=purpose,
        comes_again=True,
    )
    second = GradientPass(
        sides,
        plan,
        row_sums,
        positive_derivative,
        row_gradient=row_gradient,
        with_scale=scale_gradient and not (row_gradient or column_gradient),
    )
    home = second.run(plan)
    finished = home[0] if column_gradient else None
    by_scale = second.tiles.scale_sum()
    # sum_ij derivative_ij * similarity_ij, from what is already there.
    if scale_gradient and second.home_gradient is not None:
        by_scale = inner_product(sides.rows, second.home_gradient)
    elif scale_gradient and finished is not None:
        by_scale = inner_product(sides.columns, finished)
    return _Result(value, factor, second.home_gradient, finished, by_scale)


class SumPass(RingPass):
    """First pass: log-sum-exp over the negatives of every row here and every column there."""

    def __init__(self, sides: SoftmaxSides, plan: Exchange) -> None:
        super().__init__(sides.rows, plan, sides.tile_shape, with_home_gradient=False)
        largest = largest_tile(sides.rows, plan, sides.tile_shape)
        self.tiles = NegativeSumTiles(sides.rows, largest, sides.scale, kernel=sides.kernel)

    def begin(self, contributions: Shard) -> None:
        """Start the sums of the columns."""
        contributions[0].fill_(-torch.inf)

    def replayed(self) -> tuple[Hashable, Sequence[Tensor]] | None:
        """Say what the tiles depend on."""
        return self.tiles.replayed()

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> None:
        """Add one tile to the sums."""
        self.tiles.add(place.rows, shard[0], added[0], diagonal=place.diagonal)


class GradientPass(RingPass):
    """Second pass: everything it sums is unscaled, and feature gradients lack logit_scale."""

    def __init__(
        self,
        sides: SoftmaxSides,
        plan: Exchange,
        row_sums: Tensor,
        positive_derivative: Tensor,
        *,
        row_gradient: bool,
        with_scale: bool,
    ) -> None:
        super().__init__(sides.rows, plan, sides.tile_shape, with_home_gradient=row_gradient)
        self.tiles = SoftmaxTiles(
            sides.rows,
            largest_tile(sides.rows, plan, sides.tile_shape),
            sides.scale,
            row_sums,
            positive_derivative,
            with_scale=with_scale,
            kernel=sides.kernel,
        )

    def replayed(self) -> tuple[Hashable, Sequence[Tensor]] | None:
        """Say what the tiles depend on."""
        return self.tiles.replayed()

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> Tensor:
        """Return the derivative of one tile; ``shard`` is features and the sums of columns."""
        return self.tiles.derivative(place.rows, *shard, diagonal=place.diagonal)


def _shaped(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.reshape(like.shape)
