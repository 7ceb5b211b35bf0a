"""Alignment, uniformity and cross-uniformity over the global batch.

Uniformity is the logarithm of a mean over all pairs, so its gradient is that of the sum divided by
the sum. The sum's gradient is collected in a single pass around the ranks, unscaled, and divided
once one all-reduce of one number has told the sum. Within a modality a pair of rows counts from
both sides, so every rank finds the whole gradient of its rows by itself: features travel, no
gradient does.

Memory per rank: O(B * D + chunk_rows^2), whatever the number of ranks (exchange "ring").
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import (
    AccumulatorSpec,
    Exchange,
    ExchangeName,
    prepare_exchange,
    sum_over_ranks,
)
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    Nonfinite,
    check_chunk_rows,
    check_pairs,
    check_rows,
    default_chunk_rows,
    describe_wanted,
    find_nonfinite,
)
from dist_siglip.losses.kernels.tiles import kernel_tile, logits_dtype, sum_dtype, tile_slices
from dist_siglip.losses.precomputed_gradients import (
    PrecomputedGradient,
    attach_gradients,
    wants_gradient,
)


def alignment_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    nonfinite: Nonfinite = "raise",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Mean squared distance of matching pairs; 0 where image and text coincide, 4 opposite.

        loss = W/N * sum_{i on this rank} |image_features[i] - text_features[i]|^2

    Distributed contract: every rank passes its own rows of the global batch of N pairs on W ranks;
    the mean over ranks of the returned value is the loss of the global batch, the mean over ranks
    of the gradients is its gradient, for even and uneven local batches. One small all-gather on
    the CPU; no features travel.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised, same dtype; row i belongs to image i.
        nonfinite: "propagate" lets features pass that are not finite; the same on every rank.
        group: process group; the default group if None.

    Returns:
        (), float32 (float64 for float64 features); a sum over pairs times W/N.

    Raises:
        UserError: if shapes or dtypes of the two sides differ, features on a CPU are not finite
            (names rank and row), or ranks disagree.

    Example:
        >>> alignment_loss(torch.eye(2), torch.eye(2).flip(0))
        tensor(2.)

    Source:
        Wang and Isola 2020, arXiv:2005.10242, with alpha = 2.
    """
    check_pairs(image_features, text_features)
    found = find_nonfinite(
        {"image_features": image_features.detach(), "text_features": text_features.detach()},
        nonfinite,
    )
    plan = prepare_exchange(
        [image_features], group=group, purpose=f"alignment loss; {found or 'finite'}"
    )
    if found:
        raise UserError(f"rank {plan.rank}: {found}")
    dtype = logits_dtype(image_features)
    with torch.autocast(image_features.device.type, enabled=False):
        distances = (image_features.to(dtype) - text_features.to(dtype)).square().sum(dim=1)
        return distances.sum() * (plan.world_size / max(plan.total_rows, 1))


def uniformity_loss(
    features: Tensor,
    *,
    nonfinite: Nonfinite = "raise",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Log of the mean Gaussian kernel over the distinct rows of all ranks; lower is more even.

        loss = log( 1/(N (N-1)) * sum_{i != j} exp(-2 |features[i] - features[j]|^2) )

    Between -8 (no set of many points reaches it) and 0 (all rows are one point).

    Distributed contract: every rank passes its own rows and gets the same value, the loss of the
    global batch of N rows; the mean over ranks of the gradients is its gradient, for even and
    uneven local batches. One small all-gather on the CPU, one pass of the features without
    accumulators, one all-reduce of one number; backward communicates nothing. First-order
    gradients only.

    Args:
        features: (B, D), L2-normalised, of one modality. B may differ between ranks.
        nonfinite: "propagate" lets features pass that are not finite; the same on every rank.
        exchange: how features reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of distances that exists at a time. None is 1024 on
            a CPU, 4096 on a GPU.

    Returns:
        (), float32 (float64 for float64 features).

    Raises:
        UserError: if all ranks together have fewer than two rows, features are not (B, D),
            chunk_rows < 1, features on a CPU are not finite (names rank and row), or ranks
            disagree (names the rank).

    Example:
        >>> uniformity_loss(torch.eye(3))
        tensor(-4.)

    Source:
        Wang and Isola 2020, arXiv:2005.10242, with t = 2 and distinct pairs, as in their code and
        that of Fahim et al. 2024, arXiv:2405.18570.
    """
    check_rows(features=features)
    chunk_rows = default_chunk_rows(features.device) if chunk_rows is None else chunk_rows
    check_chunk_rows(chunk_rows)
    is_wanted = wants_gradient(features)
    found = find_nonfinite({"features": features.detach()}, nonfinite)
    wanted = describe_wanted({"features": is_wanted})
    plan = prepare_exchange(
        [features],
        exchange=exchange,
        group=group,
        purpose=f"uniformity loss; gradients: {wanted}; {found or 'finite'}",
    )
    if found:
        raise UserError(f"rank {plan.rank}: {found}")
    rows = features.detach()
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        ring_pass = _KernelPass(rows, plan.rank, chunk_rows, row_pull=is_wanted)
        plan.run(ring_pass.visit)
        total, value = _log_mean("uniformity_loss", ring_pass.value, plan, group)
    # Twice: as row i of the sum and as row j.
    factor = -8 * plan.world_size / total
    gradient = PrecomputedGradient(features, ring_pass.row_pull, factor)
    return attach_gradients("uniformity_loss", value.to(logits_dtype(rows)), [gradient])


def cross_uniformity_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    nonfinite: Nonfinite = "raise",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Log of the mean Gaussian kernel over the pairs of all ranks that do not match.

        loss = log( 1/(N (N-1)) * sum_{i != j} exp(-2 |image_features[i] - text_features[j]|^2) )

    Distributed contract: every rank passes its own rows and gets the same value, the loss of the
    global batch of N pairs; the mean over ranks of the gradients is its gradient, for even and
    uneven local batches. One small all-gather on the CPU, one pass, one all-reduce of one number;
    backward communicates nothing. If only the texts learn, the images travel. First-order
    gradients only.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised, same dtype; row i belongs to image i. B may differ
            between ranks.
        nonfinite: "propagate" lets features pass that are not finite; the same on every rank.
        exchange: how features reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of distances that exists at a time. None is 1024 on
            a CPU, 4096 on a GPU.

    Returns:
        (), float32 (float64 for float64 features).

    Raises:
        UserError: if all ranks together have fewer than two pairs, shapes or dtypes of the two
            sides differ, chunk_rows < 1, features on a CPU are not finite (names rank and
            row), or ranks disagree (names the rank).

    Example:
        >>> cross_uniformity_loss(torch.eye(3), torch.eye(3))
        tensor(-4.)

    Source:
        Fahim et al. 2024, arXiv:2405.18570, as in their code (pairs off the diagonal only).
    """
    check_pairs(image_features, text_features)
    chunk_rows = default_chunk_rows(image_features.device) if chunk_rows is None else chunk_rows
    check_chunk_rows(chunk_rows)
    wanted = {"image": wants_gradient(image_features), "text": wants_gradient(text_features)}
    # The side that travels should be the one that needs no gradient.
    sides = [("image", image_features), ("text", text_features)]
    if wanted["text"] and not wanted["image"]:
        sides.reverse()
    (row_name, rows), (column_name, columns) = sides
    dtype = logits_dtype(rows)
    found = find_nonfinite(
        {"image_features": image_features.detach(), "text_features": text_features.detach()},
        nonfinite,
    )
    plan = prepare_exchange(
        [columns],
        accumulators=[AccumulatorSpec(columns.shape[1:], dtype)] * wanted[column_name],
        exchange=exchange,
        group=group,
        purpose=f"cross-uniformity; gradients: {describe_wanted(wanted)}; {found or 'finite'}",
    )
    if found:
        raise UserError(f"rank {plan.rank}: {found}")
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        ring_pass = _KernelPass(rows.detach(), plan.rank, chunk_rows, row_pull=wanted[row_name])
        home = plan.run(ring_pass.visit)
        total, value = _log_mean("cross_uniformity_loss", ring_pass.value, plan, group)
    factor = -4 * plan.world_size / total
    gradients = [
        PrecomputedGradient(rows, ring_pass.row_pull, factor),
        PrecomputedGradient(columns, home[0] if home else None, factor),
    ]
    return attach_gradients("cross_uniformity_loss", value.to(dtype), gradients)


def _log_mean(
    name: str, own_sum: Tensor, plan: Exchange, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the sum over all ranks, and the logarithm of its mean over distinct pairs."""
    num_rows = plan.total_rows
    if num_rows < 2:
        raise UserError(
            f"{name} compares different rows but all ranks together have {num_rows}; pass at "
            "least 2"
        )
    total = sum_over_ranks(own_sum, group)
    return total, (total / (num_rows * (num_rows - 1))).log()


class _KernelPass:
    """Visits shards with this rank's rows; sums the kernel, and the pulls where wanted."""

    def __init__(self, rows: Tensor, rank: int, chunk_rows: int, *, row_pull: bool) -> None:
        self.rows, self.rank, self.chunk_rows = rows, rank, chunk_rows
        self.value = torch.zeros((), dtype=sum_dtype(rows.device), device=rows.device)
        self.row_pull: Tensor | None = None
        if row_pull:
            self.row_pull = torch.zeros_like(rows, dtype=logits_dtype(rows))

    def visit(
        self, owner: int, shard: tuple[Tensor, ...], contributions: tuple[Tensor, ...]
    ) -> None:
        """Add the tiles of one shard; overwrite the pull on its columns."""
        (travelling,) = shard
        for contribution in contributions:
            contribution.zero_()
        for rows, columns in tile_slices(len(self.rows), len(travelling), self.chunk_rows):
            tile = kernel_tile(
                self.rows[rows],
                travelling[columns],
                without_diagonal=owner == self.rank and rows == columns,
                with_row_pull=self.row_pull is not None,
                with_column_pull=bool(contributions),
            )
            self.value += tile.value
            if self.row_pull is not None and tile.row_pull is not None:
                self.row_pull[rows] += tile.row_pull
            if contributions and tile.column_pull is not None:
                contributions[0][columns] += tile.column_pull
