"""Do two sides fit together, and which rows of them all are this rank's?"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import gather_rows, resolve_group
from dist_siglip.metrics.checks import check_features, raise_together


class OwnRows(NamedTuple):
    """Where this rank's rows stand among those of all ranks, in rank order.

    Attributes:
        start: position of the first.
        stop: position behind the last.
        num_rows: of all ranks.
    """

    start: int
    stop: int
    num_rows: int


def check_pairs(
    first_features: Tensor, second_features: Tensor, *, group: ProcessGroup | None = None
) -> OwnRows:
    """Refuse sides that cannot be compared, and place this rank's rows.

    Distributed contract: a few small gathers; every rank raises the same error or none does.

    Args:
        first_features: (B, D), to be finite.
        second_features: (B, E), to be finite; row i belongs to row i of the first side.
        group: process group.

    Raises:
        UserError: if features are not finite (names row and rank), the sides differ in length, or
            no rank has any row.

    Example:
        >>> check_pairs(torch.ones(3, 2), torch.ones(3, 5))
        OwnRows(start=0, stop=3, num_rows=3)
    """
    # Apart, since the sides may differ in width.
    for name, side in (("first_features", first_features), ("second_features", second_features)):
        check_features([(name, side)], unit_norm=False, group=group)
    device = first_features.device
    lengths = len(first_features), len(second_features)
    problem = None
    if lengths[0] != lengths[1]:
        problem = (
            f"first_features has {lengths[0]} rows and second_features {lengths[1]}; row i of both "
            "must belong to the same thing"
        )
    raise_together(problem, device=device, group=group)
    counts = gather_rows(torch.tensor([lengths[0]], device=device), group)
    if not counts.any():
        problem = "there are no rows to compare; give at least 4"
    raise_together(problem, device=device, group=group)
    resolved = resolve_group(group)
    rank = 0 if resolved is None else resolved.rank()
    start = int(counts[:rank].sum())
    return OwnRows(start, start + lengths[0], int(counts.sum()))
