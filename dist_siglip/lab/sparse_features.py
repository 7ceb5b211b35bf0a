"""Sparse features of embeddings, and how many of them two sets of embeddings share.

A TopK sparse autoencoder writes an embedding as a sum of at most k of F directions, F above D. The
codes of two autoencoders are compared feature by feature: with codes Z (N, F) and Y (N, G) of the
same N things, not centred, the affinity of features f and g is sum_i Z[i, f] Y[i, g], and the
Hungarian method finds the one-to-one matching with the largest sum.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dist_siglip.errors import UserError, check_least

_FINAL_LEARNING_RATE = 0.05  # share of the first
_REVIVAL_ENDS_AT = 0.8  # of the steps
_REVIVED_ENCODER_NORM = 0.1
_CHUNK_ROWS = 4096
_LEAST_ACTIVE, _MOST_ACTIVE = 1e-5, 0.1  # of the rows a feature may be active in


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """Settings of a sparse autoencoder; the defaults are those of the paper, meant for a GPU.

    Args:
        num_features: directions F of the dictionary.
        num_active: most directions k of one embedding.
        steps: of training.
        batch_rows: rows of a step, drawn with repetition.
        learning_rate: of AdamW, at the start; a cosine takes it to 5 %.
        revive_every: steps after which directions that no row used since the last time are made
            anew from what is not yet explained, until 80 % of the training.
        seed: of weights and rows.
    """

    num_features: int = 8192
    num_active: int = 32
    steps: int = 50_000
    batch_rows: int = 2048
    learning_rate: float = 4e-4
    revive_every: int = 2500
    seed: int = 0

    def check(self) -> None:
        """Raise for a number out of range."""
        names = ("num_features", "num_active", "steps", "batch_rows", "revive_every")
        check_least(1, of="sparse.", **{name: getattr(self, name) for name in names})
        if self.num_active > self.num_features:
            raise UserError(
                f"sparse.num_active ({self.num_active}) must be at most sparse.num_features "
                f"({self.num_features})"
            )
        if not self.learning_rate > 0:
            raise UserError(f"sparse.learning_rate ({self.learning_rate}) must be above 0")


class SparseAutoencoder(nn.Module):
    """Codes with at most k positive entries, and rows from codes.

        z = the k largest of relu(W_e (x - c) + b_e), others 0        x' = W_d z + c

    Args:
        width: D of the rows.
        num_features: F of the codes.
        num_active: k.

    Attributes:
        center: (D,) c.
        encoder: W_e (F, D) and b_e.
        directions: (F, D), the columns of W_d; of length 1 after every step of training.

    Source:
        Gao et al. 2024, arXiv:2406.04093; BangachevKiril/L2PRH, sae/topk_sae.py.
    """

    def __init__(self, width: int, num_features: int, num_active: int) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(width))
        self.encoder = nn.Linear(width, num_features)
        nn.init.zeros_(self.encoder.bias)
        self.directions = nn.Parameter(F.normalize(torch.randn(num_features, width), dim=1))
        self._num_active = num_active

    def encode(self, rows: Tensor) -> Tensor:
        """Return the codes (B, F) of rows (B, D)."""
        values = F.relu(self.encoder(rows - self.center))
        largest, places = values.topk(self._num_active, dim=1)
        return torch.zeros_like(values).scatter(1, places, largest)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the rows (B, D) that codes (B, F) stand for."""
        return codes @ self.directions + self.center


def train_sparse_autoencoder(
    features: Tensor,
    settings: SparseSettings,
    *,
    on_step: Callable[[int, float], None] | None = None,
) -> SparseAutoencoder:
    """Train a sparse autoencoder on rows; one process, no collectives.

    Args:
        features: (N, D) float rows on the device to train on, best from ``center_normalize``.
        settings: of dictionary and training.
        on_step: called after every step with its number, from 1, and its mean squared error.

    Returns:
        The trained autoencoder, on the device of the rows, in evaluation mode.

    Raises:
        UserError: if a setting is out of range or there are no rows.

    Example:
        >>> rows = F.normalize(torch.arange(60.0).view(20, 3).sin(), dim=1)
        >>> tiny = SparseSettings(num_features=6, num_active=2, steps=5, batch_rows=8)
        >>> train_sparse_autoencoder(rows, tiny).encode(rows).shape
        torch.Size([20, 6])
    """
    settings.check()
    if not len(features):
        raise UserError("there are no rows to train a sparse autoencoder on")
    rows = features.float()
    device = rows.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = SparseAutoencoder(rows.shape[1], settings.num_features, settings.num_active)
    model.to(device)
    with torch.no_grad():
        model.center.copy_(rows.mean(dim=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, settings.steps, eta_min=_FINAL_LEARNING_RATE * settings.learning_rate
    )
    generator = torch.Generator().manual_seed(settings.seed)
    used = torch.zeros(settings.num_features, dtype=torch.bool, device=device)
    for step in range(1, settings.steps + 1):
        batch = rows[_draw_rows(len(rows), settings.batch_rows, generator, device)]
        optimizer.zero_grad()
        codes = model.encode(batch)
        error = F.mse_loss(model.decode(codes), batch)
        error.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.directions.copy_(F.normalize(model.directions, dim=1))
            used |= (codes > 0).any(dim=0)
            if step % settings.revive_every == 0:
                if step < _REVIVAL_ENDS_AT * settings.steps:
                    dead = (~used).nonzero()[:, 0]
                    chosen = _draw_rows(len(rows), len(dead), generator, device)
                    _revive(model, dead, rows[chosen])
                used.zero_()
        if on_step is not None:
            on_step(step, error.item())
    return model.eval().requires_grad_(False)


@torch.no_grad()
def unexplained_share(model: SparseAutoencoder, features: Tensor) -> float:
    """Squared error of the reconstruction over the squared distance from the mean of the rows.

    Args:
        model: an autoencoder.
        features: (N, D), on the device of the model.

    Returns:
        0 for a perfect reconstruction, 1 for one no better than the mean.
    """
    rows = features.float()
    error = sum(
        float((model.decode(codes) - part).square().sum())
        for part, codes in encode_in_parts(model, rows)
    )
    return error / float((rows - rows.mean(dim=0)).square().sum())


def encode_in_parts(model: SparseAutoencoder, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, codes) of a few thousand rows at a time, in order."""
    for part in features.float().split(_CHUNK_ROWS):
        yield part, model.encode(part)


def _draw_rows(count: int, number: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random row numbers, drawn on the CPU so that every device has the same."""
    return torch.randint(count, (number,), generator=generator).to(device)


@torch.no_grad()
def _revive(model: SparseAutoencoder, dead: Tensor, rows: Tensor) -> None:
    """Point unused directions at what rows (one for each) have left unexplained."""
    left = F.normalize(rows - model.decode(model.encode(rows)), dim=1)
    model.directions[dead] = left
    model.encoder.weight[dead] = _REVIVED_ENCODER_NORM * left
    model.encoder.bias[dead] = 0


class MatchedFeatures(NamedTuple):
    """Correlation of the matched features of two dictionaries.

    Attributes:
        weighted: sum of the affinities of matched features / (|Z|_F |Y|_F).
        binary: the same of codes that only say whether a feature is active.
        first_features: features of the first side that were kept.
        second_features: likewise.
    """

    weighted: float
    binary: float
    first_features: int
    second_features: int


@torch.no_grad()
def match_features(
    code_parts: Iterable[tuple[Tensor, Tensor]], *, keep_common: bool = False
) -> MatchedFeatures:
    """Match the features of two dictionaries by their codes of the same things.

    Features that are active in 1e-5 of the rows or fewer, or in a tenth or more, are left out of
    affinities and norms.

    Args:
        code_parts: pairs of (B, F) and (B, G) non-negative codes, part after part of the rows.
        keep_common: keep all features that are ever active.

    Returns:
        Correlations in [0, 1]: 1 if the codes are equal up to the order of features and one
        factor; NaN if a side keeps no feature.

    Example:
        >>> codes = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
        >>> match_features([(codes, codes.flip(1))], keep_common=True).weighted
        1.0

    Source:
        BangachevKiril/L2PRH, metrics/sparse_feature_correlations.py and
        sae/sparse_feature_truncation.py.
    """
    sums: list[Tensor] = []
    num_rows = 0
    for first, second in code_parts:
        first, second = first.double(), second.double()
        active = (first > 0).double(), (second > 0).double()
        found = [
            first.T @ second,
            active[0].T @ active[1],
            first.square().sum(dim=0),
            second.square().sum(dim=0),
            active[0].sum(dim=0),
            active[1].sum(dim=0),
        ]
        num_rows += len(first)
        sums = found if not sums else [a + b for a, b in zip(sums, found, strict=True)]
    weighted, binary, *squares, first_counts, second_counts = (each.cpu().numpy() for each in sums)
    kept = [
        (counts > 0) & (keep_common | _is_kept(counts / num_rows))
        for counts in (first_counts, second_counts)
    ]
    return MatchedFeatures(
        _correlation(weighted, squares[0], squares[1], kept),
        _correlation(binary, first_counts, second_counts, kept),
        int(kept[0].sum()),
        int(kept[1].sum()),
    )


def _is_kept(shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (shares > _LEAST_ACTIVE) & (shares < _MOST_ACTIVE)


def _correlation(
    affinity: NDArray[np.float64],
    first_squares: NDArray[np.float64],
    second_squares: NDArray[np.float64],
    kept: list[NDArray[np.bool_]],
) -> float:
    """Affinity of the best matching over the product of the norms."""
    affinity = affinity[np.ix_(*kept)]
    if not affinity.size:
        return float("nan")
    rows, columns = linear_sum_assignment(affinity, maximize=True)
    norms = np.sqrt(first_squares[kept[0]].sum() * second_squares[kept[1]].sum())
    return float(affinity[rows, columns].sum() / norms)
