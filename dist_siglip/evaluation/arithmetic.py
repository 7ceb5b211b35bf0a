"""Embedding arithmetic: the picture nearest to a point, its start left out."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.evaluation.encoding import rank_and_size
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors


def check_strength(strength: float, name: str) -> None:
    """Refuse a factor of the added difference that leads nowhere.

    Args:
        strength: the factor.
        name: of the benchmark.

    Raises:
        UserError: if it is not above 0.
    """
    if not strength > 0:
        raise UserError(f"strength ({strength}) of benchmark {name!r} must be above 0; use 1")


def nearest_other_picture(
    points: Tensor,
    image_features: Tensor,
    starts: Tensor,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Find the picture with the largest inner product with each point.

    Distributed contract: every rank passes the same rows and gets all answers; each takes a part of
    the points and a part of the pictures. One trip without gradient and a few small gathers.

    Args:
        points: (Q, D), finite, of any length.
        image_features: (N, D), at least two pictures.
        starts: (Q,) int64 positions of the pictures the points come from, which are no answers.
        group: process group.

    Returns:
        (Q,) int64 positions; of equal pictures the lowest.

    Example:
        >>> pictures = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> nearest_other_picture(pictures[:2] + 1, pictures, torch.tensor([0, 1]))
        tensor([1, 2])
    """
    mine, keys = _own_part(len(points), group), _own_part(len(image_features), group)
    near = nearest_neighbors(
        points[mine],
        image_features[keys],
        1,
        query_ids=starts[mine],
        key_ids=torch.arange(len(image_features), device=image_features.device)[keys],
        group=group,
    )
    return gather_rows(near.positions[:, 0], group)


def _own_part(count: int, group: ProcessGroup | None) -> slice:
    rank, world_size = rank_and_size(group)
    return slice(count * rank // world_size, count * (rank + 1) // world_size)
