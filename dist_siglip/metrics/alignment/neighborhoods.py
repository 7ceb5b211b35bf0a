"""Nearest neighbours that two sets of embeddings of the same things share.

Neighbours are the k rows with the largest inner product, the row itself left out; of equal ones the
lowest row. The neighbours of a side are N * k edges from a row to a row. Every measure here
compares two sets of edges, CKNNA too, so no N x N matrix is made.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, gather_rows
from dist_siglip.errors import UserError
from dist_siglip.metrics.alignment.moments import LEAST_ROWS, check_pairs
from dist_siglip.metrics.retrieval.nearest import Neighbors, nearest_neighbors

NEIGHBORS = 10


class Neighborhoods(NamedTuple):
    """Neighbours of the rows of all ranks, in rank order, on both sides.

    Attributes:
        first: similarities and positions, (N, k) each.
        second: likewise.
    """

    first: Neighbors
    second: Neighbors


class _Edges(NamedTuple):
    """Edges from row i to row j as the number i * N + j, ascending.

    Attributes:
        codes: (E,) int64.
        weights: (E,) float64, the similarities.
    """

    codes: Tensor
    weights: Tensor


@torch.no_grad()
def find_neighborhoods(
    first_features: Tensor,
    second_features: Tensor,
    k: int = NEIGHBORS,
    *,
    chunk_rows: int | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Neighborhoods:
    """Find the k nearest neighbours of every row on both sides.

    Distributed contract: every rank passes its own rows, any number of them (0 too); every rank
    gets the neighbours of all rows. Two exchanges without gradient, and gathers of N * k numbers.

    Args:
        first_features: (B, D), finite; L2-normalised if cosines are meant.
        second_features: (B, E); row i belongs to row i of the first side.
        k: at least 1, below the number of rows of all ranks.
        chunk_rows: longest side of a live rectangle of similarities; see ``tile_side``.
        exchange: how rows reach the other ranks.
        group: process group.

    Raises:
        UserError: if k does not fit the number of rows, or as ``collect_moments``; on every rank.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> find_neighborhoods(rows, rows, 1).first.positions.tolist()
        [[1], [2], [1]]
    """
    own = check_pairs(first_features, second_features, group=group)
    if own.num_rows < 2:
        raise UserError(f"one row has no neighbours; give at least {LEAST_ROWS} rows to compare")
    if not 1 <= k < own.num_rows:
        raise UserError(
            f"k ({k}) must be from 1 to {own.num_rows - 1}, one less than the rows to compare"
        )
    row_ids = torch.arange(own.start, own.stop, device=first_features.device)
    found = []
    for side in (first_features, second_features):
        near = nearest_neighbors(
            side,
            side,
            k,
            query_ids=row_ids,
            key_ids=row_ids,
            chunk_rows=chunk_rows,
            exchange=exchange,
            group=group,
        )
        found.append(Neighbors(*(gather_rows(column, group) for column in near)))
    return Neighborhoods(*found)


def mutual_knn(neighborhoods: Neighborhoods) -> float:
    """Share of the k neighbours of a row that are the same on both sides, averaged over rows.

        1/N sum_i |N_first(i) and N_second(i)| / k

    Args:
        neighborhoods: of both sides.

    Returns:
        In [0, 1]; about k / (N - 1) for sides that have nothing to do with each other.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> mutual_knn(find_neighborhoods(rows, rows[[1, 0, 2]], 1))
        0.0

    Source:
        Huh et al. 2024, arXiv:2405.07987, appendix A; mutual_knn of minyoungg/platonic-rep.
    """
    first, second = _edges(neighborhoods.first), _edges(neighborhoods.second)
    return float(_is_among(first.codes, second.codes).double().mean())


def cycle_knn(neighborhoods: Neighborhoods) -> float:
    """Share of rows i with a second-side neighbour j that has i as first-side neighbour.

    It is not symmetric in the sides.

    Args:
        neighborhoods: of both sides.

    Returns:
        In [0, 1].

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> round(cycle_knn(find_neighborhoods(rows, rows, 1)), 4)
        0.6667

    Source:
        cycle_knn of minyoungg/platonic-rep, with its order of the sides.
    """
    num_rows, k = neighborhoods.second.positions.shape
    first, second = _edges(neighborhoods.first), _edges(neighborhoods.second)
    back = _is_among(second.codes, _reversed(first.codes, num_rows).sort().values)
    return float(back.view(num_rows, k).any(dim=1).double().mean())


def cknna(neighborhoods: Neighborhoods) -> float:
    """Unbiased CKA that looks only at pairs that are neighbours on both sides.

        CKNNA = S(K, L) / sqrt(S(K, K) S(L, L))        S(K, L) = HSIC_u(M * K, M * L)

    M[i, j] is 1 if j is among the k neighbours of i on both of the sides that S compares; HSIC_u as
    in ``unbiased_cka``. M is not symmetric, and S not quite either.

    Args:
        neighborhoods: of both sides, with k of at least 2 and at least 4 rows.

    Returns:
        1 for equal neighbours with proportional similarities; NaN where a root is not real.

    Raises:
        UserError: if k is below 2 or there are fewer than 4 rows.

    Example:
        >>> rows = torch.eye(5) + 0.1 * torch.arange(25.0).view(5, 5).sin()
        >>> round(cknna(find_neighborhoods(rows, 3 * rows, 2)), 6)
        1.0

    Source:
        Huh et al. 2024, arXiv:2405.07987, appendix A; cknna of minyoungg/platonic-rep, which adds
        1e-6 to the root.
    """
    num_rows, k = neighborhoods.first.positions.shape
    if k < 2 or num_rows < LEAST_ROWS:
        raise UserError(
            f"CKNNA of {num_rows} rows with k ({k}) is not defined; give at least {LEAST_ROWS} "
            "rows and 2 neighbours"
        )
    sides = _edges(neighborhoods.first), _edges(neighborhoods.second)
    cross, first, second = (
        _masked_hsic(left, right, num_rows)
        for left, right in (sides, (sides[0], sides[0]), (sides[1], sides[1]))
    )
    product = first * second
    return cross / math.sqrt(product) if product > 0 else math.nan


def _edges(side: Neighbors) -> _Edges:
    num_rows = len(side.positions)
    rows = torch.arange(num_rows, device=side.positions.device)[:, None]
    # Within a row too: sorting the whole is sorting the columns of every row.
    columns, order = side.positions.sort(dim=1)
    weights = side.similarities.gather(1, order)
    return _Edges((rows * num_rows + columns).flatten(), weights.flatten())


def _reversed(codes: Tensor, num_rows: int) -> Tensor:
    """Reverse edges, in the order of ``codes``."""
    return codes % num_rows * num_rows + codes // num_rows


def _is_among(codes: Tensor, ascending: Tensor) -> Tensor:
    """Mark the codes that occur in a sorted list."""
    return _place_in(codes, ascending)[1]


def _place_in(codes: Tensor, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Position of each code in a sorted list, and whether it occurs in it."""
    place = torch.searchsorted(ascending, codes).clamp_max(max(len(ascending) - 1, 0))
    if not len(ascending):
        return place, torch.zeros_like(codes, dtype=torch.bool)
    return place, ascending[place] == codes


def _masked_hsic(left: _Edges, right: _Edges, num_rows: int) -> float:
    """HSIC_u of two kernels on the edges they share; zero everywhere else."""
    place, shared = _place_in(left.codes, right.codes)
    codes, kernel, other = left.codes[shared], left.weights[shared], right.weights[place[shared]]
    rows, columns = codes // num_rows, codes % num_rows
    back, both_ways = _place_in(_reversed(codes, num_rows), codes)
    products = float((kernel[both_ways] * other[back[both_ways]]).sum())
    column_sums = kernel.new_zeros(num_rows).index_add_(0, columns, kernel)
    row_sums = kernel.new_zeros(num_rows).index_add_(0, rows, other)
    total = (
        products
        + float(kernel.sum() * other.sum()) / ((num_rows - 1) * (num_rows - 2))
        - 2 * float(column_sums @ row_sums) / (num_rows - 2)
    )
    return total / (num_rows * (num_rows - 3))
