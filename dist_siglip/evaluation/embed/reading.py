"""Embeddings read from files and folders, and rows of two of them matched.

Accepted: .npy files, folders in clip-retrieval's layout (those of ``embed`` and of clip-retrieval
itself) and embeddings.parquet. Rows with keys are matched by key, in whatever order they lie; rows
without are matched by number.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.samples.cached_features import TOWERS, Tower
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import check_regular

_FOLDERS: dict[Tower, str] = {"image": "img_emb", "text": "text_emb"}
_COLUMNS: dict[Tower, str] = {"image": "image_embedding", "text": "text_embedding"}


class Embeddings(NamedTuple):
    """Rows of one tower.

    Attributes:
        source: what was read, for messages.
        features: (N, D), in the dtype of the files.
        keys: of the rows; None if the file has none.
        shards: name of the shard of each row; None if the files do not say.
    """

    source: str
    features: NDArray[np.floating]
    keys: Sequence[str] | None = None
    shards: Sequence[str] | None = None


class MatchedRows(NamedTuple):
    """Row numbers of two sides that belong to the same things, in the order of the first.

    Attributes:
        first: (M,) int64.
        second: (M,) int64.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]


def towers_in(path: Path) -> tuple[Tower, ...]:
    """Tell which towers' embeddings are in a folder; none for a .npy file.

    Raises:
        UserError: if there is nothing at the path.
    """
    if not path.exists():
        raise UserError(f"embeddings ({path}) do not exist; give a folder of embed, or a .npy file")
    if path.suffix == ".npy":
        return ()
    if path.is_dir() and not (path / "embeddings.parquet").exists():
        return tuple(tower for tower in TOWERS if (path / _FOLDERS[tower]).is_dir())
    names = _schema_names(_parquet_of(path))
    return tuple(tower for tower in TOWERS if _COLUMNS[tower] in names)


def read_embeddings(path: Path, tower: Tower | None) -> Embeddings:
    """Read all rows of one tower into memory; nothing that is read is executed.

    Args:
        path: a .npy file of (N, D) floats, a folder of ``embed``, or a .parquet file.
        tower: whose embeddings; None for a .npy file, which does not say.

    Raises:
        UserError: if nothing can be read there, or files do not fit together.
    """
    present = towers_in(path)
    if path.suffix == ".npy":
        if tower is not None:
            raise UserError(f"{path} does not say whose embeddings it holds; leave {tower} out")
        return Embeddings(str(path), _load_rows(path))
    if tower is None or tower not in present:
        raise UserError(
            f"embeddings ({path}) hold {' and '.join(present) or 'nothing that can be read'}, not "
            f"{tower or 'one tower alone'}; give a folder of embed --format clip-retrieval or "
            "parquet"
        )
    if path.is_dir() and not (path / "embeddings.parquet").exists():
        return _read_clip_retrieval(path, tower)
    return _read_parquet(_parquet_of(path), tower)


def match_rows(first: Embeddings, second: Embeddings) -> MatchedRows:
    """Find the rows of two sides that belong to the same things.

    By shard and key if both sides have both, else by key, and by number if a side has no keys; then
    both must have equally many rows.

    Raises:
        UserError: if the numbers differ, no key is in both, or a key stands for several rows.

    Example:
        >>> rows = np.ones((2, 3))
        >>> match_rows(Embeddings("a", rows, ["x", "y"]), Embeddings("b", rows, ["y", "z"]))
        MatchedRows(first=array([1]), second=array([0]))
    """
    if first.keys is None or second.keys is None:
        counts = len(first.features), len(second.features)
        if counts[0] != counts[1]:
            raise UserError(
                f"{first.source} has {counts[0]} rows and {second.source} {counts[1]}; without "
                "keys on both sides, row i of both must belong to the same thing"
            )
        return MatchedRows(np.arange(counts[0]), np.arange(counts[0]))
    with_shards = first.shards is not None and second.shards is not None
    places = _places(second, with_shards)
    pairs = [
        (row, places[name]) for name, row in _places(first, with_shards).items() if name in places
    ]
    if not pairs:
        raise UserError(
            f"{first.source} and {second.source} have no key in common; give embeddings of the "
            "same samples"
        )
    matched = np.array(pairs, dtype=np.int64)
    return MatchedRows(matched[:, 0], matched[:, 1])


def _places(side: Embeddings, with_shards: bool) -> dict[tuple[str, str], int]:
    """Row of every name; refuse a name that occurs twice."""
    keys = side.keys or ()
    shards = side.shards if with_shards and side.shards is not None else [""] * len(keys)
    places: dict[tuple[str, str], int] = {}
    for row, name in enumerate(zip(shards, keys, strict=True)):
        if name in places:
            raise UserError(
                f"{side.source} has key {name[1]!r} in rows {places[name]} and {row}, so that rows "
                "cannot be matched by it; give embeddings whose keys are all different"
            )
        places[name] = row
    return places


def _read_clip_retrieval(folder: Path, tower: Tower) -> Embeddings:
    """Join the files of all shards in the order of their numbers."""
    name = _FOLDERS[tower]
    found = {
        int(match[1]): path
        for path in (folder / name).iterdir()
        if (match := re.fullmatch(rf"{name}_(\d+)\.npy", path.name))
    }
    if not found:
        raise UserError(f"{folder / name} holds no {name}_<number>.npy; is embed still running?")
    parts, keys, shards = [], [], []
    for _, path in sorted(found.items()):
        label = path.stem.removeprefix(f"{name}_")
        metadata = folder / "metadata" / f"metadata_{label}.parquet"
        if not metadata.exists():
            raise UserError(f"{path} has no {metadata.name}; start embed again to finish it")
        rows = _load_rows(path)
        columns = _read_columns(metadata, ("image_path", "shard"))
        if len(columns["image_path"]) != len(rows):
            raise UserError(
                f"{path} has {len(rows)} rows and {metadata.name} {len(columns['image_path'])}; "
                "they are not of one run of embed"
            )
        parts.append(rows)
        keys += columns["image_path"]
        shards += columns.get("shard", [])
    if len({part.shape[1] for part in parts}) > 1:
        raise UserError(f"{folder / name} holds rows of different widths; embed it anew")
    features = np.concatenate(parts)
    return Embeddings(str(folder), features, keys, shards if len(shards) == len(keys) else None)


def _read_parquet(path: Path, tower: Tower) -> Embeddings:
    import pyarrow
    from pyarrow import parquet

    column = _COLUMNS[tower]
    try:
        lists = parquet.read_table(path, columns=[column]).column(column).combine_chunks()
        # AttributeError: no lists; ValueError: not all of one length, or some missing.
        values = lists.flatten().to_numpy(zero_copy_only=False)
        features = np.array(values.reshape(len(lists), -1))  # pyarrow's own cannot be written to
    except (pyarrow.ArrowException, OSError, AttributeError, ValueError) as error:
        raise UserError(f"{path} holds no rows of numbers in {column} ({error})") from error
    if features.dtype.kind != "f":
        raise UserError(f"{path} holds {features.dtype} in {column}; must be floats")
    columns = _read_columns(path, ("image_path", "shard"))
    return Embeddings(str(path), features, columns["image_path"], columns.get("shard"))


def _read_columns(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Columns of text that a file has; the first must be there."""
    import pyarrow
    from pyarrow import parquet

    present = [name for name in names if name in _schema_names(path)]
    if names[0] not in present:
        raise UserError(f"{path} has no column {names[0]!r}, the key of every row")
    try:
        table = parquet.read_table(path, columns=present)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file ({error})") from error
    return {name: [str(value) for value in table.column(name).to_pylist()] for name in present}


def _schema_names(path: Path) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f'{path} needs pyarrow ({error}); pip install "dist-siglip[pack]"'
        ) from error
    try:
        check_regular(path)
        return list(parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file ({error})") from error


def _parquet_of(path: Path) -> Path:
    return path / "embeddings.parquet" if path.is_dir() else path


def _load_rows(path: Path) -> NDArray[np.floating]:
    try:
        check_regular(path)
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no readable .npy file of numbers ({error})") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f":
        shape = getattr(rows, "shape", None)
        raise UserError(f"{path} must hold one (rows, D) array of floats; got {shape}")
    return rows
