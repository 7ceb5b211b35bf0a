"""Simplex adapter: a constant part of each embedding that says of which modality it is.

An adapter appends to every embedding a constant part that says of which modality it is. A locked
encoder can so be judged at any relative bias. Scale and relative bias absorb it: the same loss
without adapter has other two numbers (``fold``), hence an adapter can be dropped after training,
and the relative bias alone does what it does.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_siglip.errors import UserError


class SimplexAdapter(nn.Module):
    """Puts k modalities apart by equal angles, with one learnable strength.

        adapted[a] = (delta * features[a], sqrt(1 - delta^2) * corner[a])
        delta      = sigmoid(strength_logit)

    where the corners are those of a regular simplex with k corners in k - 1 dimensions. With two
    modalities they are +1 and -1: the adapter of a locked and a trained encoder.

    Distributed contract: row by row, without communication; the gradient of the strength is
    averaged over ranks as that of any parameter.

    Args:
        num_modalities: k >= 2.
        start_logit: of the strength; the authors start at 0.5, delta = 0.622.

    Raises:
        UserError: if num_modalities is below 2 or start_logit is not finite.

    Example:
        >>> adapter = SimplexAdapter()
        >>> images, texts = adapter([torch.eye(2), torch.eye(2)])
        >>> images.norm(dim=1).tolist(), torch.equal(images[:, 2], -texts[:, 2])
        ([1.0, 1.0], True)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, Observation 1 (k = 2) and Observation 2. The
        authors find the explicit adapter less stable than a relative bias and advise against it.
    """

    corners: Tensor

    def __init__(self, num_modalities: int = 2, *, start_logit: float = 0.5) -> None:
        super().__init__()
        if num_modalities < 2:
            raise UserError(f"num_modalities ({num_modalities}) must be at least 2")
        if not math.isfinite(start_logit):
            raise UserError(f"start_logit ({start_logit}) must be finite; the authors use 0.5")
        self.num_modalities = num_modalities
        self.strength_logit = nn.Parameter(torch.tensor([start_logit]))
        self.register_buffer("corners", simplex_corners(num_modalities), persistent=False)

    @property
    def delta(self) -> Tensor:
        """What is left of the features, (), between 0 and 1, with its gradient."""
        return torch.sigmoid(self.strength_logit).sum()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Append the constant part to the rows of every modality.

        Args:
            features: k tensors (B, D), L2-normalised.

        Returns:
            k tensors (B, D + k - 1) of the features' dtypes, L2-normalised.

        Raises:
            UserError: if there are not k modalities.
        """
        if len(features) != self.num_modalities:
            raise UserError(
                f"features holds {len(features)} modalities; the adapter is for "
                f"{self.num_modalities}"
            )
        delta = self.delta
        rest = (1 - delta**2).sqrt()
        return [
            torch.cat(
                [
                    delta.to(rows.dtype) * rows,
                    (rest * corner).to(rows.dtype).expand(len(rows), -1),
                ],
                dim=1,
            )
            for rows, corner in zip(features, self.corners, strict=True)
        ]

    def fold(self, logit_scale: float, relative_bias: float) -> tuple[float, float]:
        """Return scale and relative bias that give the same loss without the adapter.

            scale         = delta^2 * logit_scale
            relative_bias = (relative_bias + (1 - delta^2) / (k - 1)) / delta^2

        Example:
            >>> adapter = SimplexAdapter(start_logit=0.0)  # delta^2 = 1/4
            >>> adapter.fold(40.0, -0.5)
            (10.0, 1.0)
        """
        kept = self._kept()
        apart = (1 - kept) / (self.num_modalities - 1)
        return kept * logit_scale, (relative_bias + apart) / kept

    def unfold(self, logit_scale: float, relative_bias: float) -> tuple[float, float]:
        """Return scale and relative bias with which the adapter starts at the loss without it.

        Example:
            >>> SimplexAdapter(start_logit=0.0).unfold(10.0, 1.0)
            (40.0, -0.5)
        """
        kept = self._kept()
        apart = (1 - kept) / (self.num_modalities - 1)
        return logit_scale / kept, kept * relative_bias - apart

    def _kept(self) -> float:
        """delta^2 in float64."""
        return float(torch.sigmoid(self.strength_logit.detach().double()) ** 2)


def simplex_corners(num_corners: int) -> Tensor:
    """Return unit rows with equal inner products -1 / (k - 1), (k, k - 1) float64.

    Example:
        >>> simplex_corners(2).tolist()
        [[1.0], [-1.0]]
        >>> corners = simplex_corners(3)
        >>> torch.allclose(corners @ corners.T, 1.5 * torch.eye(3).double() - 0.5)
        True
    """
    if num_corners == 2:
        return torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    k = num_corners
    centred = torch.eye(k, dtype=torch.float64) - 1 / k
    # Its eigenvectors with eigenvalue 1 span the plane of the corners.
    basis = torch.linalg.eigh(centred).eigenvectors[:, 1:]
    return (k / (k - 1)) ** 0.5 * centred @ basis
