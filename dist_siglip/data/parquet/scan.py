"""The index of a Parquet shard, made of its footer.

A member is a cell: its offset is the address of column and row, its size the stored bytes of its
row group, shared evenly. Every row is a sample, and its number is its key.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.index.shard_index import ShardIndex
from dist_siglip.data.parquet import ParquetError
from dist_siglip.data.parquet.footer import ParquetFooter
from dist_siglip.data.parquet.rows import ParquetRows, address

_KEY_DIGITS = 9
_REMEDY = "fetch or write the shard again, or take it off the list"


class Wanted(NamedTuple):
    """Members that a table needs; of others nothing is looked at.

    Attributes:
        pictures: extensions of the picture, in order of preference.
        others: captions, and what else is read.
    """

    pictures: Sequence[str]
    others: Sequence[str]


def damaged_parquet(name: str, error: ParquetError) -> ShardIndex:
    """Return the index of a file that cannot be read: no sample, and what is wrong."""
    return _index(name, {}, 0, "0" * 32, damage=f"shard {name!r} is damaged: {error}; {_REMEDY}")


def index_parquet(
    name: str, footer: ParquetFooter, open_rows: Callable[[], ParquetRows], wanted: Wanted | None
) -> ShardIndex:
    """Index a file.

    Args:
        name: of the shard.
        footer: of the file.
        open_rows: opens the file; called if values of columns that are wanted are missing.
        wanted: which columns count; None takes all, and looks for no missing values.
    """
    columns = footer.columns
    kinds: dict[str, tuple[int, NDArray[np.int64]]] = {}
    pictures: tuple[str, ...] = ()
    if wanted is None:
        found = {column.name.lower(): number for number, column in enumerate(columns)}
    else:
        able = footer.picture_columns(wanted.pictures)
        pictures = tuple(columns[number].name.lower() for number in able)
        found = dict(zip(pictures, able, strict=True))
        for member in wanted.others:
            number = footer.find(member)
            if number is not None:
                found.setdefault(member, number)
            elif member == "json":
                found["json"] = len(columns)
    every = np.arange(footer.num_rows, dtype=np.int64)
    rows: ParquetRows | None = None
    for member, number in found.items():
        present = every
        leaf = columns[number].value if number < len(columns) else -1
        if wanted is not None and leaf >= 0:
            groups = range(len(footer.starts) - 1)
            if any(footer.num_nulls(group, leaf) for group in groups):
                rows = rows or open_rows()
                is_there = np.concatenate([rows.present(group, number) for group in groups])
                present = np.flatnonzero(is_there)
        kinds[member] = number, present
    return _index(name, kinds, footer.num_rows, footer.digest, footer=footer, pictures=pictures)


def _index(
    name: str,
    kinds: dict[str, tuple[int, NDArray[np.int64]]],
    num_rows: int,
    digest: str,
    *,
    footer: ParquetFooter | None = None,
    pictures: tuple[str, ...] = (),
    damage: str = "",
) -> ShardIndex:
    columns = () if footer is None else footer.columns
    none = [np.zeros(0, dtype=np.int64)]
    sizes = []
    for number, rows in kinds.values():
        is_json = footer is None or number >= len(columns)
        mean = np.zeros(num_rows, dtype=np.int64) if is_json else None
        if mean is None and footer is not None:
            mean = footer.mean_sizes(columns[number])
        sizes.append(rows if mean is None else mean[rows])
    return ShardIndex(
        path=name,
        num_samples=num_rows,
        extensions=tuple(kinds),
        joined_keys=_keys(num_rows),
        samples=np.concatenate(none + [rows for _, rows in kinds.values()]),
        kinds=np.concatenate(
            none + [np.full(len(rows), k) for k, (_, rows) in enumerate(kinds.values())]
        ),
        offsets=np.concatenate(none + [address(number, rows) for number, rows in kinds.values()]),
        sizes=np.concatenate(none + sizes),
        digest=digest,
        damage=damage,
        columns=tuple(column.name for column in columns),
        pictures=pictures,
    )


def _keys(count: int) -> NDArray[np.uint8]:
    """Join row numbers of nine digits, with a NUL between two."""
    digits = np.zeros((count, _KEY_DIGITS + 1), dtype=np.uint8)
    left = np.arange(count)
    for place in range(_KEY_DIGITS - 1, -1, -1):
        left, digits[:, place] = np.divmod(left, 10)[0], left % 10 + ord("0")
    return digits.reshape(-1)[:-1] if count else digits.reshape(-1)
