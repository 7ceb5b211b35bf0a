"""Configurations of unit vectors whose margin and relative bias are known exactly.

They show that a margin can be reached, and are known cases to test metrics and losses with. A
**code** is a set of unit vectors with inner products of at most alpha; used for images and texts
alike it is a constellation with m = (1 - alpha) / 2 and b = (1 + alpha) / 2.
"""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.metrics.capacity import subset_inner_products

# Squared lengths may be off by rounding of what went into them.
_TOLERANCE = 1e-9


def simplex_code(num_points: int) -> Tensor:
    """Unit vectors with equal, smallest inner products: -1 / (N - 1) for all N points.

    Args:
        num_points: N, at least 2.

    Returns:
        (N, N - 1) float64.

    Raises:
        UserError: if there are fewer than 2 points.

    Example:
        >>> simplex_code(2)
        tensor([[-1.],
                [ 1.]], dtype=torch.float64)
    """
    if num_points < 2:
        raise UserError(f"num_points ({num_points}) of a simplex must be at least 2")
    # Row j of the basis: equal weights on the first j points, balanced by point j.
    basis = torch.tril(torch.ones(num_points - 1, num_points, dtype=torch.float64))
    numbers = torch.arange(1, num_points)
    basis[numbers - 1, numbers] = -numbers.double()
    return F.normalize(-F.normalize(basis, dim=1).T, dim=1)


def random_code(num_points: int, dimension: int, *, seed: int) -> Tensor:
    """Independent uniform points on the sphere; in high dimension their products are small.

    Args:
        num_points: N.
        dimension: d.
        seed: of the points.

    Returns:
        (N, d) float64.

    Example:
        >>> random_code(3, 5, seed=0).shape
        torch.Size([3, 5])
    """
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_points, dimension, generator=generator, dtype=torch.float64)
    return F.normalize(points, dim=1)


def code_alpha(points: Tensor) -> float:
    """Largest inner product of two different points of a code.

    Args:
        points: (N, d), at least two rows.

    Example:
        >>> code_alpha(torch.eye(3))
        0.0
    """
    if len(points) < 2:
        raise UserError(f"a code of {len(points)} points has no inner product; pass at least 2")
    products = points.double() @ points.double().T
    products.fill_diagonal_(-torch.inf)
    return float(products.max())


def construction_one(
    image_points: Tensor, text_points: Tensor, *, delta: float, phi: float
) -> tuple[Tensor, Tensor]:
    """Move a constellation to another margin and relative bias, in two more dimensions.

        U' = (delta U, phi, +sqrt(1 - delta^2 - phi^2))
        V' = (delta V, phi, -sqrt(1 - delta^2 - phi^2))
        m' = delta^2 m      b' = delta^2 b + phi^2 - (1 - delta^2 - phi^2)

    Args:
        image_points: (N, d), L2-normalised.
        text_points: (N, d), L2-normalised.
        delta: what is left of the first coordinates, at least 0.
        phi: a coordinate both sides share, at least 0.

    Returns:
        (images (N, d + 2), texts (N, d + 2)).

    Raises:
        UserError: if delta or phi is negative, or delta^2 + phi^2 above 1.

    Example:
        >>> images, texts = construction_one(torch.eye(2), torch.eye(2), delta=0.6, phi=0.0)
        >>> images[0].tolist(), texts[0].tolist()  # doctest: +ELLIPSIS
        ([0.60..., 0.0, 0.0, 0.80...], [0.60..., 0.0, 0.0, -0.80...])

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Construction 1.
    """
    rest = 1 - delta**2 - phi**2
    if delta < 0 or phi < 0 or rest < -_TOLERANCE:
        raise UserError(
            f"delta ({delta:.4g}) and phi ({phi:.4g}) must be at least 0, and their squares add up "
            "to at most 1"
        )
    shared = image_points.new_full((len(image_points), 1), phi)
    apart = torch.full_like(shared, math.sqrt(max(0.0, rest)))
    return (
        torch.cat([delta * image_points, shared, apart], dim=1),
        torch.cat([delta * text_points, shared, -apart], dim=1),
    )


def constellation_from_code(
    points: Tensor, *, margin: float, relative_bias: float
) -> tuple[Tensor, Tensor]:
    """Images and texts with a given margin and relative bias from a code that is good enough.

    Construction 1 with delta^2 = 2 m / (1 - alpha), phi^2 = (2 b + 2 - delta^2 (3 + alpha)) / 4,
    where alpha is the code's. It must be at most ``capacity.capacity_alpha``.

    Args:
        points: (N, d), L2-normalised, at least two rows.
        margin: m, above 0.
        relative_bias: b.

    Returns:
        (images (N, d + 2), texts (N, d + 2)): a constellation with exactly this margin and bias.

    Raises:
        UserError: if the inner products of the code are too large for them.

    Example:
        >>> images, texts = constellation_from_code(torch.eye(3), margin=0.2, relative_bias=0.0)
        >>> products = images @ texts.T
        >>> round(float(products[0, 0]), 6), round(float(products[0, 1]), 6)
        (0.2, -0.2)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, proof of Theorem 3.3.
    """
    alpha = code_alpha(points)
    delta_squared = 2 * margin / (1 - alpha) if alpha < 1 else math.inf
    phi_squared = (2 * relative_bias + 2 - delta_squared * (3 + alpha)) / 4
    fits = phi_squared >= -_TOLERANCE and delta_squared + phi_squared <= 1 + _TOLERANCE
    if not margin > 0 or not fits:
        raise UserError(
            f"a code with inner products up to {alpha:.4g} has no room for margin {margin:.4g} at "
            f"relative bias {relative_bias:.4g}; use a code with smaller ones, or a smaller margin"
        )
    return construction_one(
        points, points, delta=math.sqrt(delta_squared), phi=math.sqrt(max(0.0, phi_squared))
    )


def construction_two(points: Tensor, num_modalities: int, *, delta: float) -> list[Tensor]:
    """Embeddings of k modalities any two of which are a constellation, from one code.

        U(a) = (delta X, sqrt(1 - delta^2) w_a)      w_1, ..., w_k a simplex in k - 1 dimensions
        m' = delta^2 (1 - alpha) / 2      b' = delta^2 (1 + alpha) / 2 - (1 - delta^2) / (k - 1)

    Args:
        points: (N, d) code X with inner products of at most alpha.
        num_modalities: k, at least 2.
        delta: what is left of the code, in [0, 1].

    Returns:
        k tensors of (N, d + k - 1).

    Raises:
        UserError: if there are fewer than 2 modalities or delta is outside of [0, 1].

    Example:
        >>> [tuple(rows.shape) for rows in construction_two(torch.eye(4), 3, delta=0.5)]
        [(4, 6), (4, 6), (4, 6)]

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Construction 2 (the dimensions add up with w_a
        in k - 1 dimensions).
    """
    if not 0 <= delta <= 1:
        raise UserError(f"delta ({delta:.4g}) must be in [0, 1]")
    directions = math.sqrt(1 - delta**2) * simplex_code(num_modalities).to(points)
    return [
        torch.cat([delta * points, direction.expand(len(points), -1)], dim=1)
        for direction in directions
    ]


def subset_code(num_documents: int, k: int) -> tuple[Tensor, Tensor]:
    """Embed every set of k documents with the largest margin there is, ``subset_margin``.

    A document is a corner of a simplex, a query the direction of the mean of its k corners; a
    further coordinate with opposite signs moves the threshold to 0.

    Args:
        num_documents: n.
        k: documents of a query, below n.

    Returns:
        (queries (binomial(n, k), n), documents (n, n)) float64, L2-normalised; queries in the
        order of ``itertools.combinations``.

    Raises:
        UserError: if k is not in [1, n - 1].

    Example:
        >>> queries, documents = subset_code(3, 1)
        >>> (queries @ documents.T).diagonal().min() > 0
        tensor(True)
    """
    inside, outside = subset_inner_products(num_documents, k)
    corners = simplex_code(num_documents)
    sets = torch.tensor(list(combinations(range(num_documents), k)))
    means = F.normalize(corners[sets].sum(dim=1), dim=1)
    # The products inside and -outside, shrunk and shifted until they are symmetric about 0.
    kept = 2 / (2 + abs(inside - outside))
    shift = math.sqrt(1 - kept)
    signed = math.copysign(shift, inside - outside)
    return (
        torch.cat([math.sqrt(kept) * means, means.new_full((len(means), 1), shift)], dim=1),
        torch.cat([math.sqrt(kept) * corners, corners.new_full((len(corners), 1), -signed)], dim=1),
    )
