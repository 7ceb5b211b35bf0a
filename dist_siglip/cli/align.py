"""``align``: how well two sets of embeddings agree, as they are or by their sparse features."""

import json as json_text
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor

from dist_siglip.cli.parser import CommandParser, call, introduction_of
from dist_siglip.cli.table import print_path
from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.reading import Embeddings, match_rows, read_embeddings, towers_in
from dist_siglip.lab.sparse_features import (
    SparseAutoencoder,
    SparseSettings,
    encode_in_parts,
    match_features,
    train_sparse_autoencoder,
    unexplained_share,
)
from dist_siglip.metrics.alignment import (
    AlignmentEstimate,
    center_normalize,
    estimate_alignment,
    mean_direction,
)
from dist_siglip.metrics.alignment.measure import SUBSET_ROWS, SUBSETS
from dist_siglip.metrics.alignment.moments import SVCCA_DIMENSIONS
from dist_siglip.metrics.alignment.neighborhoods import NEIGHBORS


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


_PREPARATIONS = (("raw", False), ("centered", True))


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``align`` and run it."""
    return call(align, parser(command), arguments)


def parser(command: str) -> CommandParser:
    """Return the parser of the options: the signature of ``align``."""
    made = CommandParser(prog=f"dist-siglip {command}", description=introduction_of(align))
    # Words, not a JSON list.
    made.add_argument(
        "embeddings",
        nargs="+",
        type=str,
        metavar="PATH",
        help="Folder of embed (clip-retrieval or parquet), .parquet or .npy file; one or two.",
    )
    made.add_function_arguments(align, as_group=False, skip={"embeddings"})
    return made


def align(
    embeddings: list[str],
    *,
    towers: list[Tower] | None = None,
    num_rows: int = SUBSET_ROWS,
    num_parts: int = SUBSETS,
    k: int = NEIGHBORS,
    svcca_dimensions: int = SVCCA_DIMENSIONS,
    seed: int = 0,
    sparse: SparseSettings | None = None,
    device: str = "cpu",
    json: bool = False,
) -> int:
    """Measure how well two sets of embeddings of the same things agree.

    One path compares the image rows of a folder with its text rows. Two compare two models,
    checkpoints or towers; rows are matched by shard and key, rows of .npy files by number. Each
    measure is given for rows as they are and for rows centred and normalised, and by chance, with
    the rows of one side shuffled; mean and standard deviation over random parts of the rows.

    Args:
        embeddings: one or two of them.
        towers: "image" or "text" for each path, as in [image,text]; null takes both towers of one
            path and the image rows of two.
        num_rows: rows of a random part; all if there are not more.
        num_parts: random parts.
        k: neighbours of a row for mutual_knn, cycle_knn and cknna.
        svcca_dimensions: directions of each side for svcca.
        seed: of parts and shuffles.
        sparse: also train a sparse autoencoder on either side and match their features. Null does
            not; {} does with the paper's settings, which are meant for a GPU.
        device: where all is computed: cpu, cuda, cuda:1, ...
        json: print JSON instead of a table.
    """
    if sparse is not None:
        sparse.check()
    first, second = _read_sides([Path(path) for path in embeddings], towers)
    matched = match_rows(first, second)
    where = _device(device)
    first_features = torch.from_numpy(_rows_of(first, matched.first)).to(where)
    second_features = torch.from_numpy(_rows_of(second, matched.second)).to(where)
    estimates = {
        name: estimate_alignment(
            first_features,
            second_features,
            center=center,
            num_rows=num_rows,
            num_parts=num_parts,
            k=k,
            svcca_dimensions=svcca_dimensions,
            seed=seed,
        )
        for name, center in _PREPARATIONS
    }
    facts: dict[str, Any] = {
        "first": first.source,
        "second": second.source,
        "first_rows": len(first.features),
        "second_rows": len(second.features),
        "matched_rows": len(matched.first),
        **{name: _facts_of(estimate) for name, estimate in estimates.items()},
    }
    if sparse is not None:
        facts["sparse"] = compare_sparse(first_features, second_features, sparse, shuffle_seed=seed)
    if json:
        sys.stdout.write(json_text.dumps(_without_nan(facts), indent=2) + "\n")
        return 0
    _print(facts, estimates)
    return 0


def _read_sides(paths: list[Path], towers: Sequence[Tower] | None) -> tuple[Embeddings, Embeddings]:
    """Read both sides; one path has both in it."""
    if len(paths) > 2:
        raise UserError(f"align compares two sets of embeddings, not {len(paths)}; give two paths")
    if towers is not None and len(towers) != 2:
        raise UserError(f"towers ({list(towers)}) must be two, e.g. [image,text]")
    if len(paths) == 1:
        if paths[0].suffix == ".npy":
            raise UserError(f"{paths[0]} holds one set of embeddings; give a second path")
        chosen: Sequence[Tower] = towers or ("image", "text")
        return _labelled(paths[0], chosen[0]), _labelled(paths[0], chosen[1])
    sides = []
    for number, path in enumerate(paths):
        has_towers = bool(towers_in(path)) or path.suffix != ".npy"
        tower = (towers[number] if towers else "image") if has_towers else None
        sides.append(_labelled(path, tower))
    return sides[0], sides[1]


def _labelled(path: Path, tower: Tower | None) -> Embeddings:
    read = read_embeddings(path, tower)
    return read if tower is None else read._replace(source=f"{path} ({tower})")


def _rows_of(side: Embeddings, rows: np.ndarray) -> np.ndarray:
    """Take rows; without a copy where they are all, in order."""
    everything = len(rows) == len(side.features) and bool((rows == np.arange(len(rows))).all())
    return side.features if everything else side.features[rows]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device ({name}) cannot be used; give cpu, cuda, cuda:1, ...") from error
    return device


def _facts_of(estimate: AlignmentEstimate) -> dict[str, Any]:
    facts: dict[str, Any] = {"num_rows": estimate.num_rows, "num_parts": estimate.num_parts}
    for kind in ("mean", "deviation", "chance_mean", "chance_deviation"):
        facts[kind] = getattr(estimate, kind)._asdict()
    return facts


def _without_nan(value: Any) -> Any:
    """JSON has no NaN; null says that there is no number."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and value != value else value


def _print(facts: dict[str, Any], estimates: dict[str, AlignmentEstimate]) -> None:
    raw = estimates["raw"]
    table = Table(
        caption=f"{facts['matched_rows']:,} rows in both; {raw.num_parts} parts of "
        f"{raw.num_rows:,} rows, mean ± standard deviation; by chance: rows of one side shuffled",
    )
    table.add_column("")
    for name in estimates:
        table.add_column(name, justify="right")
        table.add_column("by chance", justify="right")
    for measure in raw.mean._fields:
        cells = []
        for estimate in estimates.values():
            for mean, deviation in (
                (estimate.mean, estimate.deviation),
                (estimate.chance_mean, estimate.chance_deviation),
            ):
                cells.append(_with_deviation(getattr(mean, measure), getattr(deviation, measure)))
        table.add_row(measure, *cells)
    console = Console()
    for side in ("first", "second"):
        print_path(side, facts[side])
    console.print(table)
    if "sparse" in facts:
        numbers = Table(title="features of sparse autoencoders", show_header=False)
        for name, value in facts["sparse"].items():
            numbers.add_row(name.replace("_", " "), f"{value:,.3f}".rstrip("0").rstrip("."))
        console.print(numbers)


def _with_deviation(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" if deviation != deviation else f"{mean:.3f}±{deviation:.3f}"
