"""How do the rows of a part become an Arrow table, and that a Parquet file?"""

from pathlib import Path

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from dist_siglip.embedding.part import PartRows
from dist_siglip.errors import UserError
from dist_siglip.system.atomic import open_atomically
from dist_siglip.system.regular_file import check_regular


def metadata_table(done: PartRows) -> pyarrow.Table:
    """Return the metadata of a part.

    Columns: image_path (the key of the sample, as clip-retrieval has it), caption, shard (its base
    name) and place (of the sample among the complete ones of the shard, int64).
    """
    return pyarrow.table(
        {
            "image_path": pyarrow.array(done.row_keys(), pyarrow.string()),
            "caption": pyarrow.array(done.rows.captions, pyarrow.string()),
            "shard": pyarrow.array([done.part.shard] * len(done.rows.captions), pyarrow.string()),
            "place": pyarrow.array(done.places()),
        }
    )


def full_table(done: PartRows) -> pyarrow.Table:
    """Return metadata and embeddings of a part.

    Columns: those of ``metadata_table``, then image_embedding and text_embedding, lists of D
    numbers; a tower that is not wanted has no column.
    """
    table = metadata_table(done)
    for name, features in (
        ("image_embedding", done.rows.image_features),
        ("text_embedding", done.rows.text_features),
    ):
        if features is not None:
            table = table.append_column(name, _fixed_size_lists(features))
    return table


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    """Write a table in one piece."""
    with open_atomically(path) as file:
        parquet.write_table(table, file)


def read_footer(path: Path) -> parquet.FileMetaData | None:
    """Return counts and metadata of a Parquet file; None if there is none.

    Raises:
        UserError: if it is damaged.
    """
    try:
        check_regular(path)
        return parquet.read_metadata(path)
    except FileNotFoundError:
        return None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is no readable Parquet file; delete it, and it is made again"
        ) from error


def num_rows_of(path: Path) -> int | None:
    """Count the rows of a Parquet file; None if there is none.

    Raises:
        UserError: if it is damaged.
    """
    footer = read_footer(path)
    return None if footer is None else footer.num_rows


def _fixed_size_lists(features: NDArray[np.floating]) -> pyarrow.Array:
    """Return (R, D) as R lists of D numbers, without copying."""
    values = pyarrow.array(np.ascontiguousarray(features).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(values, features.shape[1])
