"""Capacity of an embedding space: pairs at a margin, sets of documents, and dimensions they need.

With m the margin (half gap) and b the relative bias of ``constellation``, everything here is
arithmetic on (pairs, dimension, m, b). Two kinds of statements must not be mixed:

    exact       hold for every number of pairs and every dimension: ``largest_margin`` (Theorem
                3.4) and ``subset_dimension`` (Weller et al.)
    asymptotic  hold for the exponent, pairs ~ exp(dimension * exponent), as the dimension grows:
                ``capacity_exponents`` and all that follows from them. In small dimensions more
                pairs fit: 100 pairs at m = 0.31, b = 0.69 are found in 10 dimensions, where the
                asymptotic bound says 20.

Logarithms of pairs are to base 10 and exponents are natural; numbers of pairs themselves overflow.

The functions of subsets have one query for each set of k out of n documents, which must rank these
before all others.
"""

import math
from typing import NamedTuple

from dist_siglip.errors import UserError


class Exponents(NamedTuple):
    """Growth of the largest number of pairs, log(pairs) / dimension, natural logarithm.

    Attributes:
        lower: reached by a construction.
        upper: not exceeded by anything.
    """

    lower: float
    upper: float


class RequiredDimension(NamedTuple):
    """Dimensions a number of pairs asks for, to first order of the exponent.

    Attributes:
        necessary: fewer are too few.
        sufficient: as many are enough.
    """

    necessary: int
    sufficient: int


class LargestPairs(NamedTuple):
    """Logarithm to base 10 of the largest number of pairs, to first order of the exponent.

    Attributes:
        log10_reached: a construction has so many.
        log10_bound: nothing has more.
    """

    log10_reached: float
    log10_bound: float


def capacity_alpha(margin: float, relative_bias: float) -> float:
    """Inner product of the spherical code behind a margin and a relative bias.

        alpha = (1 + b - 3 m) / (1 + b + m)

    A code of unit vectors with inner products of at most alpha gives a constellation (see
    ``constructions``); the smaller alpha, the fewer such vectors there are.

    Example:
        >>> round(capacity_alpha(0.1, 0.0), 4), capacity_alpha(0.25, 0.75)
        (0.6364, 0.5)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Theorem 3.3.
    """
    return (1 + relative_bias - 3 * margin) / (1 + relative_bias + margin)


def largest_margin(relative_bias: float, num_pairs: float = math.inf) -> float:
    """Largest margin of any configuration with this relative bias, in any dimension; exact.

        m <= min(1 - b, (1 + b) / (3 - 4 / N))

    It also bounds the margin of the means of positive and negative cosines.

    Args:
        relative_bias: in [-1, 1].
        num_pairs: N, at least 2; infinite by default.

    Raises:
        UserError: if the relative bias is outside of [-1, 1], or there are fewer than 2 pairs.

    Example:
        >>> largest_margin(0.5), largest_margin(-1.0), round(largest_margin(0.0, 100), 4)
        (0.5, 0.0, 0.3378)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Theorem 3.4.
    """
    if not -1 <= relative_bias <= 1:
        raise UserError(
            f"relative_bias ({relative_bias:.4g}) must be in [-1, 1]; it is a threshold of "
            "cosines, -logit_bias / logit_scale"
        )
    if not num_pairs >= 2:
        raise UserError(f"num_pairs ({num_pairs}) must be at least 2")
    return min(1 - relative_bias, (1 + relative_bias) / (3 - 4 / num_pairs))


def find_capacity_problem(
    margin: float, relative_bias: float, num_pairs: float = math.inf
) -> str | None:
    """Reason, in one line, why no number of dimensions is known for a margin; None if one is.

    Args:
        margin: half gap.
        relative_bias: threshold.
        num_pairs: for which Theorem 3.4 is asked; infinite asks for growing numbers of pairs.

    Example:
        >>> find_capacity_problem(0.1, 0.0)
        >>> find_capacity_problem(0.5, 0.0)
        'margin (0.5) at relative bias 0 must be at most 0.3333 (Theorem 3.4)'
    """
    if not margin > 0:
        return (
            f"margin ({margin:.4g}) must be above 0: where positive and negative pairs overlap, no "
            "dimension follows"
        )
    if not -1 <= relative_bias <= 1:
        return f"relative bias ({relative_bias:.4g}) must be in [-1, 1]"
    limit = largest_margin(relative_bias, num_pairs)
    if margin > limit:
        return (
            f"margin ({margin:.4g}) at relative bias {relative_bias:.4g} must be at most "
            f"{limit:.4g} (Theorem 3.4)"
        )
    return None


def capacity_exponents(margin: float, relative_bias: float) -> Exponents:
    """Exponents between which the largest number of pairs grows with the dimension.

        -1/2 log(1 - alpha^2)  <=  lim log(pairs) / dimension  <=  -1/2 log(1 - alpha)

    Both are natural; the paper prints one of them to base 2.

    Args:
        margin: above 0.
        relative_bias: threshold; the margin must be feasible for any number of pairs.

    Raises:
        UserError: if the margin is not above 0, or above ``largest_margin``.

    Example:
        >>> [round(exponent, 4) for exponent in capacity_exponents(0.1, 0.0)]
        [0.2596, 0.5058]

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Theorems 3.3 and 3.5.
    """
    if problem := find_capacity_problem(margin, relative_bias):
        raise UserError(problem)
    alpha = max(0.0, capacity_alpha(margin, relative_bias))
    return Exponents(-math.log1p(-(alpha**2)) / 2, -math.log1p(-alpha) / 2)


def required_dimension(num_pairs: float, margin: float, relative_bias: float) -> RequiredDimension:
    """Dimensions that N pairs need, and that are enough, at a margin and relative bias.

        necessary = 2 log N / -log(1 - alpha)      sufficient = 2 log N / -log(1 - alpha^2)

    Asymptotic; see the module docstring.

    Args:
        num_pairs: N, at least 2.
        margin: above 0, below (1 + b) / 3.
        relative_bias: threshold.

    Raises:
        UserError: if the margin is out of range, or so large that pairs do not grow
            exponentially with the dimension.

    Example:
        >>> required_dimension(1e10, 0.1, 0.0)
        RequiredDimension(necessary=46, sufficient=89)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Theorems 3.3 and 3.5, solved for the dimension.
    """
    _require_pairs(num_pairs)
    exponents = capacity_exponents(margin, relative_bias)
    if exponents.lower == 0:
        raise UserError(
            f"margin ({margin:.4g}) at relative bias {relative_bias:.4g} must be below "
            f"{(1 + relative_bias) / 3:.4g}: there, pairs no longer grow exponentially with the "
            "dimension"
        )
    necessary, sufficient = (math.log(num_pairs) / e for e in reversed(exponents))
    return RequiredDimension(math.ceil(necessary), math.ceil(sufficient))


def largest_pairs(dimension: int, margin: float, relative_bias: float) -> LargestPairs:
    """Logarithm of how many pairs a dimension holds at a margin and relative bias.

        dimension * exponent / log(10)

    Asymptotic; see the module docstring.

    Args:
        dimension: at least 1.
        margin: above 0.
        relative_bias: threshold.

    Raises:
        UserError: if the dimension is below 1 or the margin out of range.

    Example:
        >>> [round(log10) for log10 in largest_pairs(768, 0.1, 0.0)]
        [87, 169]

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Theorems 3.3 and 3.5.
    """
    _require_dimension(dimension)
    exponents = capacity_exponents(margin, relative_bias)
    return LargestPairs(*(dimension * exponent / math.log(10) for exponent in exponents))


def margin_of_dimension(
    num_pairs: float, dimension: int, relative_bias: float
) -> tuple[float, float]:
    """Margins N pairs can have in a dimension: (a construction reaches, nothing exceeds).

        exponents solved for m at log N / dimension:  m = (1 + b) (1 - alpha) / (3 + alpha)
        with  alpha = sqrt(1 - N^(-2 / dimension))  and  alpha = 1 - N^(-2 / dimension)

    and never above ``largest_margin``, which needs no limit of large dimension.

    Args:
        num_pairs: N, at least 2.
        dimension: at least 1.
        relative_bias: in [-1, 1].

    Raises:
        UserError: if an argument is out of range.

    Example:
        >>> [round(margin, 3) for margin in margin_of_dimension(1e10, 768, 0.0)]
        [0.234, 0.308]

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Theorems 3.3 to 3.5, solved for the margin.
    """
    _require_dimension(dimension)
    _require_pairs(num_pairs)
    limit = largest_margin(relative_bias, num_pairs)
    bound_alpha = -math.expm1(-2 * math.log(num_pairs) / dimension)
    reached, bound = (
        min(limit, (1 + relative_bias) * (1 - alpha) / (3 + alpha))
        for alpha in (math.sqrt(bound_alpha), bound_alpha)
    )
    return reached, bound


def _require_pairs(num_pairs: float) -> None:
    if not 2 <= num_pairs < math.inf:
        raise UserError(f"num_pairs ({num_pairs}) must be at least 2 and finite, like 1e9")


def _require_dimension(dimension: int) -> None:
    if dimension < 1:
        raise UserError(
            f"dimension ({dimension}) must be at least 1; SigLIP models have 768 to 1152"
        )


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
    """Inner products p and q of ``subset_margin``.

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
