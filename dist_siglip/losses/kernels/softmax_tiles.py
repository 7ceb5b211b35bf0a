"""Formulas of the softmax loss on one rectangle (tile) of logits; no ranks, no autograd.

A softmax needs the sum over a whole row (and column), so it takes two visits: the first adds up
the negatives, the second knows the sums and gives derivatives. The positive is kept out of the
sums, because against its negatives a softmax is a sigmoid: with n the log-sum-exp of the negatives
of a row and z the logit of its positive,

    -log softmax = softplus(n - z)        its derivative by z = -sigmoid(n - z)

which keeps its digits when the positive has nearly all the probability, where logsumexp - z and
probability - 1 would cancel.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.losses.kernels.pair_terms import Kernel, choose_kernel, compiled
from dist_siglip.losses.kernels.tiles import TileBuffers, product_dtype, similarity, sum_dtype


class NegativeSums(NamedTuple):
    """Sums of the first pass.

    Attributes:
        rows: (B,), log-sum-exp over the negatives of each row at home; -inf without any.
        positives: (B,), logits of the positives of the rows at home.
    """

    rows: Tensor
    positives: Tensor


class NegativeSumTiles:
    """Tiles of the first pass: log sum exp(logits) over negatives, by rows and by columns.

    Args:
        home: (B, D), the rows at home.
        largest: most rows and columns of a tile.
        logit_scale: () in the logits' dtype, the multiplier.
        kernel: who computes the terms, see ``choose_kernel``.

    Attributes:
        sums: of the rows at home, complete after the pass.

    Example:
        >>> one, columns = torch.ones(2, 1), torch.full((2,), -torch.inf)
        >>> tiles = NegativeSumTiles(one, (2, 2), torch.tensor(3.0))
        >>> tiles.add(slice(0, 2), one, columns, diagonal=0)
        >>> tiles.sums, columns
        (NegativeSums(rows=tensor([3., 3.]), positives=tensor([3., 3.])), tensor([3., 3.]))
    """

    def __init__(
        self,
        home: Tensor,
        largest: tuple[int, int],
        logit_scale: Tensor,
        *,
        kernel: Kernel = "auto",
    ) -> None:
        self._home, self._scale = home, logit_scale.to(home.device)
        self._kernel = choose_kernel(kernel, home)
        positives = self._scale.new_zeros(len(home))
        self.sums = NegativeSums(torch.full_like(positives, -torch.inf), positives)
        self._buffers = TileBuffers(largest, home, None) if self._kernel == "triton" else None

    def replayed(self) -> tuple[Hashable, Sequence[Tensor]] | None:
        """Return settings and tensors that tiles depend on; None if they are more than launches."""
        if self._buffers is None:
            return None
        return (), (self._scale, *self.sums, *self._buffers.tensors())

    def add(
        self, rows: slice, column_features: Tensor, column_sums: Tensor, *, diagonal: int | None
    ) -> None:
        """Add one tile to the sums of its rows and columns.

        Args:
            rows: which rows at home.
            column_features: (columns, D).
            column_sums: (columns,), log-sum-exp so far; updated.
            diagonal: pairs (i, i + diagonal) are positives; None for none.
        """
        home, row_sums = self._home[rows], self.sums.rows[rows]
        positives = self.sums.positives[rows]
        if self._buffers is not None:
            from dist_siglip.losses.kernels import triton_terms

            out = self._buffers.logits(len(home), len(column_features))
            products = similarity(home, column_features, out=out)
            triton_terms.add_softmax_sums(
                products, row_sums, column_sums, positives, self._scale, diagonal
            )
            return
        of_rows, of_columns, of_positives = (
            compiled(_negative_sums) if self._kernel == "compiled" else _negative_sums
        )(similarity(home, column_features), self._scale, diagonal)
        for total, part in ((row_sums, of_rows), (column_sums, of_columns)):
            torch.logaddexp(total, part, out=total)
        if diagonal is not None:
            first = max(0, -diagonal)
            positives[first : first + len(of_positives)] = of_positives


def _negative_sums(
    products: Tensor, logit_scale: Tensor, diagonal: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = products * logit_scale
    positives = logits[:0, 0]
    if diagonal is not None:
        positives = logits.diagonal(diagonal).clone()
        logits.diagonal(diagonal).fill_(-torch.inf)
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0), positives


class SoftmaxTiles:
    """Tiles of the second pass: derivatives of the sum of both directions' losses by the logits.

        derivative = exp(logits - row_sums) + exp(logits - column_sums)    of a negative

    Args:
        home: (B, D), the rows at home.
        largest: most rows and columns of a tile.
        logit_scale: () in the logits' dtype, the multiplier.
        row_sums: (B,), log-sum-exp over the whole row, positive included.
        positive_derivative: (B,), the derivative by the logits of the positives.
        with_scale: whether to sum the derivative by the scale.
        kernel: who computes the terms, see ``choose_kernel``.

    Example:
        >>> one, zero = torch.ones(1, 1), torch.zeros(1)
        >>> tiles = SoftmaxTiles(one, (1, 1), torch.tensor(0.0), zero, zero, with_scale=True)
        >>> tiles.derivative(slice(0, 1), one, zero, diagonal=None), tiles.scale_sum().item()
        (tensor([[2.]]), 2.0)
    """

    def __init__(
        self,
        home: Tensor,
        largest: tuple[int, int],
        logit_scale: Tensor,
        row_sums: Tensor,
        positive_derivative: Tensor,
        *,
        with_scale: bool,
        kernel: Kernel = "auto",
    ) -> None:
        self._home, self._scale, self._row_sums = home, logit_scale.to(home.device), row_sums
        self._positive_derivative, self._with_scale = positive_derivative, with_scale
        self._kernel = choose_kernel(kernel, home)
        self._scale_sum = torch.zeros((), dtype=sum_dtype(home.device), device=home.device)
        self._buffers: TileBuffers | None = None
        self._block_sums: Tensor | None = None
        if self._kernel == "triton":
            from dist_siglip.losses.kernels import triton_terms

            self._buffers = TileBuffers(largest, home, product_dtype(home))
            if with_scale:
                self._block_sums = triton_terms.sums_buffer(
                    *largest, triton_terms.TERMS_BLOCK, home.device
                )

    def replayed(self) -> tuple[Hashable, Sequence[Tensor]] | None:
        """Return settings and tensors that tiles depend on; None if they are more than launches."""
        if self._buffers is None:
            return None
        own = (self._scale, self._row_sums, self._positive_derivative)
        sums = () if self._block_sums is None else (self._block_sums,)
        return self._with_scale, (*own, *sums, *self._buffers.tensors())

    def derivative(
        self, rows: slice, column_features: Tensor, column_sums: Tensor, *, diagonal: int | None
    ) -> Tensor:
        """Return the derivative of one tile, in ``product_dtype``; it lives until the next.

        Args:
            rows: which rows at home.
            column_features: (columns, D).
            column_sums: (columns,), log-sum-exp over the whole column.
            diagonal: pairs (i, i + diagonal) are positives; None for none.
        """
        home, row_sums = self._home[rows], self._row_sums[rows]
        of_positives = self._positive_derivative[rows]
        if self._buffers is not None:
            from dist_siglip.losses.kernels import triton_terms

            shape = (len(home), len(column_features))
            products = similarity(home, column_features, out=self._buffers.logits(*shape))
            derivative = self._buffers.narrow(*shape)
            triton_terms.write_softmax_derivative(
                products,
                derivative,
                self._block_sums,
                row_sums,
                column_sums,
                of_positives,
                self._scale,
                diagonal,
            )
            return derivative
        derivative, by_scale = (
            compiled(_softmax_derivative) if self._kernel == "compiled" else _softmax_derivative
        )(
            similarity(home, column_features),
            self._scale,
            row_sums,
            column_sums,
            of_positives,
            diagonal,
            self._with_scale,
            product_dtype(home),
        )
        if by_scale is not None:
            self._scale_sum += by_scale
        return derivative

    def scale_sum(self) -> Tensor | None:
        """Return the sum of derivative * similarity over all tiles so far; None if not wanted."""
        if not self._with_scale:
            return None
        return self._scale_sum if self._block_sums is None else self._block_sums[:, 2].sum()


def _softmax_derivative(
    products: Tensor,
    logit_scale: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    positive_derivative: Tensor,
    diagonal: int | None,
    with_scale: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    logits = products * logit_scale
    derivative = (logits - row_sums[:, None]).exp_()
    derivative += logits.sub_(column_sums).exp_()
    if diagonal is not None:
        on_diagonal = derivative.diagonal(diagonal)
        first = max(0, -diagonal)
        on_diagonal.copy_(positive_derivative[first : first + len(on_diagonal)])
    by_scale = (derivative * products).sum() if with_scale else None
    return derivative.to(dtype), by_scale
