"""How many dimensions does it take to retrieve every set of k documents out of n?

There is one query for each set of k documents; it must rank these before all others. With k = 1
these are the pairs of ``capacity``.
"""

import math

from dist_siglip.errors import UserError


def subset_dimension(num_documents: int, k: int, margin: float) -> int:
    """Fewest dimensions in which every set of k documents can be retrieved at a margin; exact.

        d >= log binomial(n, k) / log(1 + 1 / m)

    Args:
        num_documents: n.
        k: documents relevant to a query, below n.
        margin: half gap between relevant and other documents, of unit vectors, in (0, 1].

    Raises:
        UserError: if k is not in [1, n - 1] or the margin not in (0, 1].

    Example:
        >>> subset_dimension(10**11, 2, 0.1), subset_dimension(10**11, 100, 0.1)
        (21, 905)

    Source:
        Weller et al. 2025, arXiv:2508.21038, Theorem 1 and Table 1.
    """
    _require_subset(num_documents, k)
    if not 0 < margin <= 1:
        raise UserError(f"margin ({margin:.4g}) must be in (0, 1], half a gap of cosines")
    return math.ceil(math.log(math.comb(num_documents, k)) / math.log1p(1 / margin))


def subset_margin(num_documents: int, k: int) -> float:
    """Largest margin around the threshold 0 at which all sets of k documents are retrieved.

        m = (p + q) / (2 + |p - q|)    p = sqrt((n - k) / (k (n - 1)))
                                       q = sqrt(k / ((n - k) (n - 1)))

    in any dimension; ``constructions.subset_code`` reaches it in n. It tends to
    1 / (2 sqrt(k) + 1) as n grows.

    Raises:
        UserError: if k is not in [1, n - 1].

    Example:
        >>> round(subset_margin(20, 2), 4), round(subset_margin(240, 2), 4)
        (0.2928, 0.2636)

    Source:
        Closed form of the limit in Bangachev et al. 2026, arXiv:2605.23556, Corollary 1.
    """
    _require_subset(num_documents, k)
    inside, outside = subset_inner_products(num_documents, k)
    return (inside + outside) / (2 + abs(inside - outside))


def subset_inner_products(num_documents: int, k: int) -> tuple[float, float]:
    """Return p and q of ``subset_margin``.

    In a simplex of n documents, the mean direction of k of them has the inner product p with these
    and -q with all others.

    Example:
        >>> [round(product, 6) for product in subset_inner_products(2, 1)]
        [1.0, 1.0]
    """
    _require_subset(num_documents, k)
    rest = num_documents - k
    return (
        math.sqrt(rest / (k * (num_documents - 1))),
        math.sqrt(k / (rest * (num_documents - 1))),
    )


def subset_dimension_scale(num_documents: int, k: int) -> float:
    """Dimensions, up to a constant, that keep the margin of order 1 / sqrt(k).

        k log(n / k)

    Necessary and sufficient; only its growth means something, the constant is not known.

    Raises:
        UserError: if k is not in [1, n - 1].

    Example:
        >>> round(subset_dimension_scale(100, 2), 2)
        7.82

    Source:
        Bangachev et al. 2026, arXiv:2605.23556, abstract.
    """
    _require_subset(num_documents, k)
    return k * math.log(num_documents / k)


def critical_documents(dimension: int) -> float:
    """Documents above which optimised embeddings of a dimension no longer retrieve every pair.

        n = -10.5322 + 4.0309 d + 0.0520 d^2 + 0.0037 d^3

    A fit to measurements with InfoNCE in 4 to 45 dimensions, no theorem; at d = 4 it says 7 where
    10 were measured.

    Raises:
        UserError: if the dimension is below 4.

    Example:
        >>> round(critical_documents(768))
        1709800

    Source:
        Weller et al. 2025, arXiv:2508.21038, the cubic through Table 6.
    """
    if dimension < 4:
        raise UserError(f"dimension ({dimension}) must be at least 4, where measurements begin")
    return -10.5322 + 4.0309 * dimension + 0.0520 * dimension**2 + 0.0037 * dimension**3


def _require_subset(num_documents: int, k: int) -> None:
    if not 1 <= k < num_documents:
        raise UserError(f"k ({k}) must be from 1 to num_documents - 1 ({num_documents - 1})")
