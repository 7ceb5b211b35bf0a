"""The second moments of a modality's embeddings, from which all spectra follow.

One (D, D) sum over rows says how the embeddings spread in every direction, whatever their number;
it is made in parts, so that the features may lie in a file.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import sum_over_ranks
from dist_siglip.metrics.checks import check_features
from dist_siglip.metrics.tiles import row_slices


class Moments(NamedTuple):
    """Sums over the rows of all ranks, on the CPU.

    Attributes:
        num_rows: N.
        total: (D,) float64, sum of the rows.
        products: (D, D) float64, sum of x x^T.
    """

    num_rows: int
    total: Tensor
    products: Tensor


@torch.no_grad()
def collect_moments(features: Tensor, *, group: ProcessGroup | None = None) -> Moments:
    """Sum rows and their outer products over all ranks.

    Distributed contract: every rank passes its own rows, any number of them; one all-reduce of
    (D + 1)^2 numbers. Every rank gets the same result.

    Args:
        features: (B, D), finite.
        group: process group.

    Raises:
        UserError: if features are not finite; on every rank.

    Example:
        >>> collect_moments(torch.eye(2)).products
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    check_features([("features", features)], unit_norm=False, group=group)
    width = features.shape[1]
    # A further feature that is 1 everywhere brings the sum and the count along.
    sums = features.new_zeros((width + 1, width + 1), dtype=torch.float64)
    for part in row_slices(len(features)):
        rows = torch.nn.functional.pad(features[part].double(), (0, 1), value=1.0)
        sums.addmm_(rows.T, rows)
    sums = sum_over_ranks(sums, group).cpu()
    return Moments(int(sums[width, width]), sums[width, :width], sums[:width, :width])
