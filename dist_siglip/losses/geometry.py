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

from dist_siglip.distributed import AccumulatorSpec, Exchange, ExchangeName, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    Nonfinite,
    check_pairs,
    check_rows,
    describe_wanted,
    tile_shape_of,
)
from dist_siglip.losses.kernels.gaussian_tiles import GaussianTiles
from dist_siglip.losses.kernels.pair_terms import Kernel, choose_kernel
from dist_siglip.losses.kernels.tiles import logits_dtype
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
    plan = prepare_pass(
        [image_features],
        named={"image_features": image_features.detach(), "text_features": text_features.detach()},
        nonfinite=nonfinite,
        group=group,
        purpose="alignment loss",
    )
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
    kernel: Kernel = "auto",
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
            a CPU, 8192 rows and 4096 columns on a GPU.
        kernel: who computes the terms of a tile, as for ``siglip_loss``.

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
    tile_shape = tile_shape_of(chunk_rows, features.device)
    chosen = choose_kernel(kernel, features)
    is_wanted = wants_gradient(features)
    wanted = describe_wanted({"features": is_wanted})
    plan = prepare_pass(
        [features],
        named={"features": features.detach()},
        nonfinite=nonfinite,
        exchange=exchange,
        group=group,
        purpose=f"uniformity loss; gradients: {wanted}",
        comes_again=is_wanted,
    )
    rows = features.detach()
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        ring_pass = _GaussianPass(rows, plan, tile_shape, chosen, row_pull=is_wanted)
        ring_pass.run(plan)
        total, value = _log_mean("uniformity_loss", ring_pass.tiles.value(), plan, group)
    # Twice: as row i of the sum and as row j.
    factor = -8 * plan.world_size / total
    gradient = PrecomputedGradient(features, ring_pass.row_pull(), factor)
    return attach_gradients("uniformity_loss", value.to(logits_dtype(rows)), [gradient])


def cross_uniformity_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    nonfinite: Nonfinite = "raise",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    kernel: Kernel = "auto",
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
            a CPU, 8192 rows and 4096 columns on a GPU.
        kernel: who computes the terms of a tile, as for ``siglip_loss``.

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
    tile_shape = tile_shape_of(chunk_rows, image_features.device)
    chosen = choose_kernel(kernel, image_features)
    wanted = {"image": wants_gradient(image_features), "text": wants_gradient(text_features)}
    # The side that travels should be the one that needs no gradient.
    sides = [("image", image_features), ("text", text_features)]
    if wanted["text"] and not wanted["image"]:
        sides.reverse()
    (row_name, rows), (column_name, columns) = sides
    dtype = logits_dtype(rows)
    plan = prepare_pass(
        [columns],
        named={"image_features": image_features.detach(), "text_features": text_features.detach()},
        nonfinite=nonfinite,
        accumulators=[AccumulatorSpec(columns.shape[1:], dtype)] * wanted[column_name],
        exchange=exchange,
        group=group,
        purpose=f"cross-uniformity; gradients: {describe_wanted(wanted)}",
        comes_again=any(wanted.values()),
    )
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        ring_pass = _GaussianPass(
            rows.detach(), plan, tile_shape, chosen, row_pull=wanted[row_name]
        )
        home = ring_pass.run(plan)
        total, value = _log_mean("cross_uniformity_loss", ring_pass.tiles.value(), plan, group)
    factor = -4 * plan.world_size / total
    gradients = [
        PrecomputedGradient(rows, ring_pass.row_pull(), factor),
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


class _GaussianPass(RingPass):
    """Sums the kernel, and the pull of all others on each row where wanted.

    The pull on row i is sum_j kernel[i, j] * (row i - row j); times -4 it is the gradient of the
    sum. The products that ``RingPass`` collects are its second term.
    """

    def __init__(
        self,
        rows: Tensor,
        plan: Exchange,
        tile_shape: tuple[int, int],
        kernel: Kernel,
        *,
        row_pull: bool,
    ) -> None:
        super().__init__(rows, plan, tile_shape, with_home_gradient=row_pull)
        self.tiles = GaussianTiles(rows, largest_tile(rows, plan, tile_shape), kernel=kernel)
        self.row_sums = rows.new_zeros(len(rows), dtype=logits_dtype(rows))
        self.column_sums = self.row_sums

    def visit(self, owner: int, shard: Shard, contributions: Shard) -> None:
        """Take the tiles of one shard; overwrite the pull on its columns."""
        self.column_sums = self.row_sums.new_zeros(len(shard[0]))
        super().visit(owner, shard, contributions)
        for products in contributions:
            _pull_(products, shard[0], self.column_sums)

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> Tensor | None:
        """Add one tile to the sums; return its kernel."""
        tile = self.tiles.tile(home, shard[0], diagonal=place.diagonal)
        self.row_sums[place.rows] += tile.row_sums
        self.column_sums[place.columns] += tile.column_sums
        return tile.kernel

    def row_pull(self) -> Tensor | None:
        """Return the pull on the rows at home, after the pass."""
        if self.home_gradient is not None:
            _pull_(self.home_gradient, self.home, self.row_sums)
        return self.home_gradient


def _pull_(products: Tensor, rows: Tensor, sums: Tensor) -> None:
    """Turn sum_j kernel[i, j] * row j into the pull on row i."""
    products.neg_().addcmul_(rows.to(products.dtype), sums[:, None])
