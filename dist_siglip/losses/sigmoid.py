"""The sigmoid loss over the global batch, in a single trip around the ranks.

Because a tile gives its loss and all gradients at once (``tiles``), a text shard and its gradient
accumulator visit every rank together, once. After the trip the loss is known and every gradient
is at home; backward only multiplies by the incoming scalar and communicates nothing. Gradients
are kept without any factor of the loss (in float32), so that a fp16 GradScaler multiplies them
before they are cast.

Memory per rank: O(B * D + chunk_rows^2), whatever the number of ranks (exchange "ring").
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import (
    AccumulatorSpec,
    Exchange,
    ExchangeName,
    prepare_exchange,
)
from dist_siglip.losses.tiles import logits_dtype, sigmoid_tile
from dist_siglip.losses.trip import (
    DEFAULT_CHUNK_ROWS,
    add_product,
    check_chunk_rows,
    check_pairs,
    check_scalar,
    inner_product,
    product_dtype,
    refuse_second_order,
    sum_dtype,
)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Tensor:
    """Sigmoid loss of this rank's images against the texts of all ranks.

    With y[i, j] = +1 if i == j else -1 over the global batch of N pairs on W ranks:

        loss = W/N * sum_{i on this rank} sum_{j < N} softplus(-y[i, j] * logits[i, j])
        logits = logit_scale * image_features @ text_features.T + logit_bias

    Distributed contract: every rank passes its own rows; the mean over ranks of the returned
    value is the loss of the global batch, and the mean over ranks of the gradients (what DDP and
    FSDP compute) is its gradient: for both towers, scale and bias, for even and uneven local
    batches (W/N, not 1/B). One small all-gather on the CPU, then one trip of the exchange;
    backward communicates nothing. First-order gradients only: create_graph=True raises.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised, same dtype; row i belongs to image i. B may differ
            between ranks.
        logit_scale: one element > 0, the multiplier (not its logarithm).
        logit_bias: one element, added to every logit; None for none.
        exchange: how text features reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time.

    Returns:
        (), float32 (float64 for float64 features); a sum over pairs times W/N.

    Raises:
        UserError: if shapes or dtypes of the two sides differ, chunk_rows < 1, or ranks disagree
            on dtype, D or on which gradients they need (names the rank).

    Example:
        >>> features = torch.eye(2, requires_grad=True)
        >>> loss = siglip_loss(features, torch.eye(2), torch.tensor(10.0), torch.tensor(-10.0))
        >>> loss
        tensor(0.6932, grad_fn=<_SigmoidLossBackward>)

    Source:
        Zhai et al. 2023, arXiv:2303.15343, Algorithm 1 and section 3.3 (chunked form); the bias
        is added to the logits as in the authors' big_vision code.
    """
    check_pairs(image_features, text_features)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    check_chunk_rows(chunk_rows)
    dtype = logits_dtype(image_features)
    scale = logit_scale.reshape(()).to(dtype)
    bias = torch.zeros_like(scale) if logit_bias is None else logit_bias.reshape(()).to(dtype)
    tensors = (image_features, text_features, scale, bias)
    wanted = _Wanted(*(torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors))
    accumulators = []
    if wanted.text:
        accumulators.append(AccumulatorSpec((text_features.shape[1],), dtype))
    plan = prepare_exchange(
        [text_features], accumulators=accumulators, exchange=exchange, group=group
    )
    return _SigmoidLoss.apply(*tensors, plan, wanted, chunk_rows)


class _Wanted(NamedTuple):
    """Which gradients are needed on this rank."""

    image: bool
    text: bool
    scale: bool
    bias: bool

    @property
    def any(self) -> bool:
        return any(self)


class _SigmoidLoss(torch.autograd.Function):
    """Computes loss and gradients in forward; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        scale: Tensor,
        bias: Tensor,
        plan: Exchange,
        wanted: _Wanted,
        chunk_rows: int,
    ) -> Tensor:
        with torch.autocast(image_features.device.type, enabled=False):
            trip = _Trip(image_features, scale, bias, plan.rank, wanted, chunk_rows)
            home = plan.run(trip.visit)
        # Mean over ranks of (W / N * own rows) is the sum over all rows divided by N.
        factor = plan.world_size / max(plan.total_rows, 1)
        text_gradient = home[0] if home else None
        scale_gradient = trip.scale_gradient
        if wanted.scale and trip.image_gradient is not None:
            # sum_ij derivative_ij * similarity_ij, from what is already there.
            scale_gradient = inner_product(image_features, trip.image_gradient)
        elif wanted.scale and text_gradient is not None:
            scale_gradient = inner_product(text_features, text_gradient)
        ctx.save_for_backward(
            trip.image_gradient, text_gradient, scale_gradient, trip.bias_gradient, scale
        )
        ctx.factor = factor
        ctx.feature_dtype = image_features.dtype
        return (trip.value * factor).to(scale.dtype)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("siglip_loss")
        image, text, scale_gradient, bias_gradient, scale = ctx.saved_tensors
        # Out of place: the saved gradients serve a second backward (retain_graph) unchanged.
        weight = incoming * ctx.factor

        def feature_gradient(unscaled: Tensor | None) -> Tensor | None:
            return None if unscaled is None else (unscaled * (weight * scale)).to(ctx.feature_dtype)

        def scalar_gradient(unscaled: Tensor | None) -> Tensor | None:
            return None if unscaled is None else (unscaled * weight).to(scale.dtype)

        return (
            feature_gradient(image),
            feature_gradient(text),
            scalar_gradient(scale_gradient),
            scalar_gradient(bias_gradient),
            None,
            None,
            None,
        )


class _Trip:
    """Visits text shards with this rank's images, one square tile at a time.

    Everything it sums is unscaled: without W/N, without the incoming gradient, and the feature
    gradients without logit_scale.
    """

    def __init__(
        self,
        image_features: Tensor,
        scale: Tensor,
        bias: Tensor,
        rank: int,
        wanted: _Wanted,
        chunk_rows: int,
    ) -> None:
        self.image_features = image_features
        self.scale, self.bias = scale, bias
        self.rank, self.wanted, self.chunk_rows = rank, wanted, chunk_rows
        self.product_dtype = product_dtype(image_features)
        device = image_features.device
        self.value = torch.zeros((), dtype=sum_dtype(device), device=device)
        self.image_gradient: Tensor | None = None
        if wanted.image:
            self.image_gradient = torch.zeros_like(image_features, dtype=scale.dtype)
        self.bias_gradient = torch.zeros_like(self.value) if wanted.bias else None
        from_features = wanted.image or wanted.text
        self.scale_gradient = (
            torch.zeros_like(self.value) if wanted.scale and not from_features else None
        )

    def visit(
        self, owner: int, shard: tuple[Tensor, ...], contributions: tuple[Tensor, ...]
    ) -> None:
        """Add the tiles of one text shard; overwrite its gradient contribution."""
        (text_features,) = shard
        for contribution in contributions:
            contribution.zero_()
        for column in range(0, text_features.shape[0], self.chunk_rows):
            columns = slice(column, column + self.chunk_rows)
            for row in range(0, self.image_features.shape[0], self.chunk_rows):
                rows = slice(row, row + self.chunk_rows)
                self._tile(
                    rows,
                    text_features[columns],
                    contributions[0][columns] if contributions else None,
                    on_diagonal=owner == self.rank and row == column,
                )

    def _tile(
        self, rows: slice, text: Tensor, text_gradient: Tensor | None, *, on_diagonal: bool
    ) -> None:
        image = self.image_features[rows]
        tile = sigmoid_tile(
            image,
            text,
            self.scale,
            self.bias,
            on_diagonal=on_diagonal,
            with_derivative=self.wanted.any,
        )
        self.value += tile.value
        if tile.derivative is None:
            return
        if self.bias_gradient is not None:
            self.bias_gradient += tile.derivative.sum()
        if self.scale_gradient is not None:
            self.scale_gradient += (tile.derivative * tile.similarity).sum()
        derivative = tile.derivative.to(self.product_dtype)
        if self.image_gradient is not None:
            add_product(self.image_gradient[rows], derivative, text.to(self.product_dtype))
        if text_gradient is not None:
            add_product(text_gradient, derivative.T, image.to(self.product_dtype))
