"""The sparse option of ``align``: features of both sides, and how well they can be matched."""

import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from dist_siglip.lab.sparse_features import (
    SparseAutoencoder,
    SparseSettings,
    encode_in_parts,
    match_features,
    train_sparse_autoencoder,
    unexplained_share,
)
from dist_siglip.metrics.alignment import center_normalize, mean_direction


def compare_sparse(
    first_features: Tensor,
    second_features: Tensor,
    settings: SparseSettings,
    *,
    shuffle_seed: int,
) -> dict[str, float]:
    """Train a sparse autoencoder on either side, centred and normalised, and match their features.

    Args:
        first_features: (N, D).
        second_features: (N, E); row i belongs to row i of the first side.
        settings: of both autoencoders.
        shuffle_seed: of the rows that say what chance gives.

    Returns:
        Matched-feature correlations, those by chance, features kept, and the share of the variance
        that the codes of each side leave unexplained.

    Raises:
        UserError: if a setting is out of range.
    """
    sides = ("first", first_features), ("second", second_features)
    rows = [center_normalize(side, mean_direction(side)).float() for _, side in sides]
    models = []
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        for (name, _), side in zip(sides, rows, strict=True):
            task = progress.add_task(f"features of the {name} side", total=settings.steps)

            def tell(step: int, _error: float, task: TaskID = task) -> None:
                progress.update(task, completed=step)

            models.append(train_sparse_autoencoder(side, settings, on_step=tell))
    order = torch.randperm(len(rows[1]), generator=torch.Generator().manual_seed(shuffle_seed)).to(
        rows[1].device
    )
    found = match_features(_codes(models, rows))
    chance = match_features(_codes(models, [rows[0], rows[1][order]]))
    return {
        "matched_correlation": found.weighted,
        "matched_correlation_by_chance": chance.weighted,
        "matched_correlation_binary": found.binary,
        "matched_correlation_binary_by_chance": chance.binary,
        "first_features": found.first_features,
        "second_features": found.second_features,
        "first_unexplained_share": unexplained_share(models[0], rows[0]),
        "second_unexplained_share": unexplained_share(models[1], rows[1]),
    }


def _codes(models: list[SparseAutoencoder], rows: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes of both sides, part after part."""
    parts = (encode_in_parts(model, side) for model, side in zip(models, rows, strict=True))
    for (_, first), (_, second) in zip(*parts, strict=True):
        yield first, second
