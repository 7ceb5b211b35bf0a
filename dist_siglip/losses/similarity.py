"""Products of features as a softmax and a distance need them: never rounded to half precision.

At a scale of 100 the bfloat16 rounding of a cosine of 0.6 moves its logit by up to 0.2 and its
softmax by a fifth; the rounding of the features themselves averages out over their width.
"""

import torch
from torch import Tensor

from dist_siglip.losses.tiles import logits_dtype


def similarity(row_features: Tensor, column_features: Tensor) -> Tensor:
    """Return row_features @ column_features.T in the logits' dtype, summed and kept in it.

    Args:
        row_features: (rows, D).
        column_features: (columns, D), same dtype.

    Example:
        >>> half = torch.full((1, 3), 1 / 3, dtype=torch.bfloat16)
        >>> similarity(half, half)
        tensor([[0.3346]])
    """
    dtype = logits_dtype(row_features)
    if row_features.dtype != dtype and row_features.device.type == "cuda":
        # Tensor cores sum in float32; leave it so.
        return torch.mm(row_features, column_features.T, out_dtype=dtype)
    return row_features.to(dtype) @ column_features.to(dtype).T
