"""Parquet files with the samples of ``tests.support.shards``."""

import pyarrow
from pyarrow import parquet

from tests.support.shards import UNEVEN, caption, encode, picture


def rows_of(first, count):
    """Columns as the datasets library writes them, with some that no training needs."""
    ids = range(first, first + count)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.table(
        {
            "image": pyarrow.array(
                [{"bytes": encode(picture(i)), "path": f"{i}.png"} for i in ids], kind
            ),
            "caption": pyarrow.array([caption(i) for i in ids], pyarrow.string()),
            "alt": pyarrow.array(
                [[f"alt {i}", f"other {i}"] for i in ids], pyarrow.list_(pyarrow.string())
            ),
            "label": pyarrow.array([i % 3 for i in ids], pyarrow.int64()),
            "secret": pyarrow.array([b"\xff" * 50 for _ in ids], pyarrow.binary()),
        }
    )


def write_parquet(folder, counts=UNEVEN, *, row_group_size=4, **options):
    """Write one file for each count, whose sample ids run on; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for number, count in enumerate(counts):
        path = folder / f"{number:05d}.parquet"
        table = rows_of(first, count)
        parquet.write_table(table, path, row_group_size=row_group_size, **options)
        paths.append(str(path))
        first += count
    return paths
