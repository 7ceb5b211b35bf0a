"""The pass of the shards around the ranks that pairwise losses make, and its way into autograd.

A pass visits the shard of every rank with the rows at home, one tile at a time. What a tile gives
is the derivative by its logits; the two products that make it gradients of the features are the
same for every loss. The first product into a gradient overwrites it: nothing has to be zeroed.

The loss and its gradients are known after forward. They are kept unscaled, in float32 or float64,
and multiplied by the incoming gradient in backward before they are cast: so a fp16 GradScaler
reaches them in time, backward communicates nothing, and a second backward (retain_graph) finds
them unchanged.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import AccumulatorSpec, Exchange, ExchangeName, prepare_exchange
from dist_siglip.distributed.combine import Combine
from dist_siglip.distributed.cost_model import GRADIENT_PIECE_ROWS
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import FiniteCheck, Nonfinite, find_nonfinite, refuse_second_order
from dist_siglip.losses.kernels.tiles import add_product, logits_dtype, tile_slices
from dist_siglip.losses.kernels.visit_graphs import graphs_for, key_of

Shard = tuple[Tensor, ...]

_numbers = count()


def prepare_pass(
    columns: Sequence[Tensor],
    *,
    named: Mapping[str, Tensor],
    nonfinite: Nonfinite,
    finite_check: FiniteCheck | None = None,
    purpose: str,
    accumulators: Sequence[AccumulatorSpec] = (),
    combine: Combine = "sum",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    shared: Mapping[str, Tensor] | None = None,
    comes_again: bool = False,
) -> Exchange:
    """Look for what is not finite, agree with the other ranks on a pass, and raise together.

    Distributed contract: that of ``prepare_exchange``, whose other arguments these are.

    Args:
        columns: what travels.
        named: what must be finite, see ``find_nonfinite``.
        nonfinite: whether to look.
        finite_check: memory of earlier calls.
        purpose: what all ranks must agree on.
        accumulators: what each shard collects.
        combine: how contributions meet.
        exchange: how features reach other ranks.
        group: process group.
        shared: numbers that must be equal.
        comes_again: whether a training makes this pass at every step.

    Raises:
        UserError: on every rank, if any found something that is not finite or they disagree.
    """
    found = find_nonfinite(named, nonfinite, finite_check)
    plan = prepare_exchange(
        columns,
        accumulators=accumulators,
        combine=combine,
        exchange=exchange,
        group=group,
        purpose=f"{purpose}; {found or 'finite'}",
        shared=shared,
        comes_again=comes_again,
    )
    if found:
        raise UserError(f"rank {plan.rank}: {found}")
    return plan


class Tile(NamedTuple):
    """Place of a tile in the matrix of the rows at home and the rows of one shard.

    Attributes:
        owner: rank whose shard it is.
        rows: which rows at home.
        columns: which rows of the shard.
        diagonal: offset of the matching pairs: pair (i, i + diagonal) of the tile is one; None if
            the tile has none.
    """

    owner: int
    rows: slice
    columns: slice
    diagonal: int | None

    @property
    def matching(self) -> slice:
        """Rows at home whose matching row lies in this tile of the own shard."""
        return slice(
            max(self.rows.start, self.columns.start), min(self.rows.stop, self.columns.stop)
        )


def largest_tile(home: Tensor, plan: Exchange, tile_shape: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of the largest tile of a pass, at most ``tile_shape``."""
    return min(tile_shape[0], len(home)), min(tile_shape[1], plan.most_rows)


class RingPass:
    """Visits the shards of all ranks with the rows at home.

    A loss derives from it and says in ``tile`` what one tile gives.

    Args:
        home: (B, D), the rows that stay, without a graph.
        plan: what the ranks agreed on.
        tile_shape: rows and columns of the largest tile.
        with_home_gradient: whether to collect the gradient of the rows at home.

    Attributes:
        home: the rows that stay.
        home_gradient: (B, D) in the logits' dtype, complete after ``run``; None if not wanted.
    """

    def __init__(
        self,
        home: Tensor,
        plan: Exchange,
        tile_shape: tuple[int, int],
        *,
        with_home_gradient: bool,
    ) -> None:
        self.home, self.rank, self.tile_shape = home, plan.rank, tile_shape
        self.home_gradient: Tensor | None = None
        if with_home_gradient:
            self.home_gradient = torch.empty_like(home, dtype=logits_dtype(home))
        self._is_begun = False
        self._number = next(_numbers)

    def run(self, plan: Exchange) -> Shard:
        """Make the pass; return what the own shard has collected on its way."""
        brought = plan.run(self.visit)
        self.finish()
        return brought

    def finish(self) -> None:
        """Complete ``home_gradient`` after the last visit."""
        if self.home_gradient is not None and not self._is_begun:
            self.home_gradient.zero_()

    def visit(self, owner: int, shard: Shard, contributions: Shard) -> None:
        """Take the tiles of one shard; overwrite what this rank adds to its accumulators."""
        adds = self._is_begun or self.home_gradient is None
        graphs = graphs_for(self.home.device) if adds and owner != self.rank else None
        fixed = None if graphs is None else self.replayed()
        if graphs is None or fixed is None:
            self._take_tiles(owner, shard, contributions)
            return
        settings, tensors = fixed
        gradient = () if self.home_gradient is None else (self.home_gradient,)
        key = key_of(
            (type(self), self.tile_shape, settings),
            (self.home, *gradient, *tensors, *shard, *contributions),
        )
        graphs.visit(key, self._number, lambda: self._take_tiles(owner, shard, contributions))

    def replayed(self) -> tuple[Hashable, Sequence[Tensor]] | None:
        """Say what the visits of other ranks' shards depend on, if they may be CUDA graphs.

        Returns:
            The settings of the tiles, and all tensors that they read or write beside the rows at
            home, their gradient, the shard and the contributions. None for passes whose work
            depends on the owner, or is more than launches.
        """
        return None

    def _take_tiles(self, owner: int, shard: Shard, contributions: Shard) -> None:
        self.begin(contributions)
        home, gradient = self.home, self.home_gradient
        is_own, is_begun = owner == self.rank, self._is_begun
        for rows, columns in tile_slices(home.shape[0], shard[0].shape[0], self.tile_shape):
            diagonal = rows.start - columns.start
            meets = is_own and -(rows.stop - rows.start) < diagonal < columns.stop - columns.start
            mine, theirs = _cut(home, rows), tuple(_cut(column, columns) for column in shard)
            added = tuple(_cut(contribution, columns) for contribution in contributions)
            place = Tile(owner, rows, columns, diagonal if meets else None)
            derivative = self.tile(place, mine, theirs, added)
            if derivative is None:
                continue
            dtype = derivative.dtype
            if gradient is not None:
                is_first = not is_begun and columns.start == 0
                total = _cut(gradient, rows)
                add_product(total, derivative, _as(dtype, theirs[0]), overwrite=is_first)
            for total in added:
                add_product(total, derivative.T, _as(dtype, mine), overwrite=rows.start == 0)
            self._is_begun = True

    def begin(self, contributions: Shard) -> None:
        """Prepare the contributions to a shard: without rows at home nothing overwrites them."""
        if not self.home.shape[0]:
            for contribution in contributions:
                contribution.zero_()

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> Tensor | None:
        """Take one tile.

        Args:
            place: where it is.
            home: (rows, D), the rows at home.
            shard: the columns' part of each tensor that travels.
            added: the columns' part of the contributions.

        Returns:
            (rows, columns), the derivative by the logits, for the gradients; None for none.
        """
        raise NotImplementedError


def _as(dtype: torch.dtype, rows: Tensor) -> Tensor:
    return rows if rows.dtype == dtype else rows.to(dtype)


def _cut(rows: Tensor, some: slice) -> Tensor:
    """Return some rows; the tensor itself for all of them, which is cheaper than a view."""
    return rows if some.stop - some.start == rows.shape[0] else rows[some]


class PrecomputedGradient(NamedTuple):
    """The gradient of a value with respect to one tensor is factor * unscaled.

    Attributes:
        tensor: what the value depends on.
        unscaled: shape of ``tensor``; None if its gradient was not wanted.
        factor: one number.
    """

    tensor: Tensor
    unscaled: Tensor | None
    factor: Tensor | float = 1.0


def wants_gradient(tensor: Tensor) -> bool:
    """Whether a backward pass can ask for the gradient of ``tensor``."""
    return torch.is_grad_enabled() and tensor.requires_grad


def attach_gradients(name: str, value: Tensor, gradients: Sequence[PrecomputedGradient]) -> Tensor:
    """Return ``value`` as a function of the tensors whose gradients are given.

    Args:
        name: of the loss, for the error under create_graph=True.
        value: (), without a graph.
        gradients: one entry per tensor.

    Returns:
        (), equal to ``value``.

    Raises:
        RuntimeError: in backward, if second-order gradients are asked for.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> by_x = PrecomputedGradient(x, 2 * x.detach())
        >>> y = attach_gradients("square", x.detach() ** 2, [by_x])
        >>> y.backward()
        >>> x.grad
        tensor(6.)
    """
    tensors = [entry.tensor for entry in gradients]
    unscaled = [entry.unscaled for entry in gradients]
    factors = [entry.factor for entry in gradients]
    return _Attach.apply(name, value, unscaled, factors, *tensors)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        value: Tensor,
        unscaled: list[Tensor | None],
        factors: list[Tensor | float],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.name, ctx.factors = name, factors
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*unscaled)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(ctx.name)
        scaled = [
            None if gradient is None else _scale(gradient, incoming * factor, dtype)
            for gradient, factor, dtype in zip(
                ctx.saved_tensors, ctx.factors, ctx.dtypes, strict=True
            )
        ]
        return (None, None, None, None, *scaled)


def _scale(gradient: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * weight, multiplied before the cast and out of place."""
    if gradient.ndim == 0 or gradient.dtype == dtype:
        return (gradient * weight).to(dtype)
    result = torch.empty_like(gradient, dtype=dtype)
    # In pieces: all rows at once would need the gradient's memory a second time.
    for start in range(0, gradient.shape[0], GRADIENT_PIECE_ROWS):
        rows = slice(start, start + GRADIENT_PIECE_ROWS)
        result[rows].copy_(gradient[rows] * weight)
    return result
