"""Embeddings as Parquet files, and in clip-retrieval's layout; needs pyarrow.

clip-retrieval:

    img_emb/img_emb_0.npy            (R, D), one file a shard
    text_emb/text_emb_0.npy          (R, D), same rows
    token_emb/token_emb_0.npy        (R, T, C), patch tokens of the same rows, if they are wanted
    metadata/metadata_0.parquet      image_path (the key), caption, shard, place

The number has leading zeros where there are ten shards or more. The metadata are written last: a
shard that has them is finished. A shard without any row has no files: embedding-reader, by which
clip-retrieval and autofaiss read, passes over empty arrays but not over their metadata, and would
pair all later files wrongly.

A single Parquet file: each shard waits in ``parts/`` until all are there. The rank that finishes
last joins them, shard after shard, under a lock, and only a whole file gets the name
``embeddings.parquet``. Its metadata say how many rows each shard has.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.shard_job import JobRows, ShardJob, is_all_skipped
from dist_siglip.system.atomic import open_atomically
from dist_siglip.system.process_lock import hold
from dist_siglip.system.regular_file import check_regular

_ROWS_OF_SHARDS = b"rows_of_shards"


class ClipRetrievalLayout:
    """Writes shards in clip-retrieval's layout.

    Args:
        folder: of all shards.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self, job: ShardJob) -> list[Path]:
        """Name the files of a shard; the last one is written last."""
        return [
            self._folder / name / f"{name}_{job.label}{suffix}"
            for name, suffix in (
                ("img_emb", ".npy"),
                ("text_emb", ".npy"),
                ("token_emb", ".npy"),
                ("metadata", ".parquet"),
            )
        ]

    def num_rows(self, job: ShardJob) -> int | None:
        """Count the rows of a finished shard; None if it is not finished."""
        found = num_rows_of(self.files(job)[-1])
        return 0 if found is None and is_all_skipped(self._folder, job) else found

    def write(self, done: JobRows) -> None:
        """Write a job."""
        if not done.rows.sample_ids:
            return
        image_file, text_file, token_file, metadata_file = self.files(done.job)
        if done.rows.image_features is not None:
            _write_array(image_file, done.rows.image_features)
        if done.rows.text_features is not None:
            _write_array(text_file, done.rows.text_features)
        if done.rows.image_tokens is not None:
            _write_array(token_file, done.rows.image_tokens)
        write_parquet(metadata_file, metadata_table(done))

    def finish(self) -> None:
        """Do nothing: the files of the shards are what is wanted."""


class SingleFileLayout:
    """Writes shards as files of their own, then one file of all.

    Args:
        folder: of the file.
        jobs: all of the data set.
    """

    def __init__(self, folder: Path, jobs: Sequence[ShardJob]) -> None:
        self._folder = folder
        self._jobs = jobs
        self._joined = folder / "embeddings.parquet"
        self._joined_rows: list[int] = []

    def files(self, job: ShardJob) -> list[Path]:
        """Name the files of a job."""
        return [self._folder / "parts" / f"part_{job.label}.parquet"]

    def num_rows(self, job: ShardJob) -> int | None:
        """Count the rows of a finished shard; None if it is not finished."""
        found = num_rows_of(self.files(job)[0])
        if found is None and not self._joined_rows:
            footer = read_footer(self._joined)
            if footer is not None:
                self._joined_rows = json.loads(footer.metadata[_ROWS_OF_SHARDS])
        if found is None and self._joined_rows:
            return self._joined_rows[job.number]
        return found

    def write(self, done: JobRows) -> None:
        """Write a job."""
        write_parquet(self.files(done.job)[0], full_table(done))

    def finish(self) -> None:
        """Join the files, if all are there and nobody has done it."""
        with hold(str(self._folder / ".lock"), "", math.inf):
            files = [file for job in self._jobs for file in self.files(job)]
            if not self._joined.exists():
                if not all(file.exists() for file in files):
                    return
                self._join(files)
            for file in files:
                file.unlink(missing_ok=True)
            with suppress(OSError):  # another file is in there
                (self._folder / "parts").rmdir()

    def _join(self, files: Sequence[Path]) -> None:
        """Write one file, a row group for each job."""
        for left in self._folder.glob(f".{self._joined.name}.*.tmp"):  # of a killed process
            left.unlink()
        rows = json.dumps([num_rows_of(file) for file in files])
        schema = parquet.read_schema(files[0]).with_metadata({_ROWS_OF_SHARDS: rows.encode()})
        with (
            open_atomically(self._joined) as file,
            parquet.ParquetWriter(file, schema) as writer,
        ):
            for path in files:
                writer.write_table(parquet.ParquetFile(path).read().cast(schema))


def metadata_table(done: JobRows) -> pyarrow.Table:
    """Return the metadata of a job.

    Columns: image_path (the key of the sample, as clip-retrieval has it), caption, shard (its base
    name) and place (of the sample among the complete ones of the shard, int64).
    """
    return pyarrow.table(
        {
            "image_path": pyarrow.array(done.row_keys(), pyarrow.string()),
            "caption": pyarrow.array(done.rows.captions, pyarrow.string()),
            "shard": pyarrow.array([done.job.shard] * len(done.rows.captions), pyarrow.string()),
            "place": pyarrow.array(done.places()),
        }
    )


def full_table(done: JobRows) -> pyarrow.Table:
    """Return metadata and embeddings of a job.

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


_METADATA = pyarrow.schema(
    {
        "image_path": pyarrow.string(),
        "caption": pyarrow.string(),
        "shard": pyarrow.string(),
        "place": pyarrow.int64(),
    }
)


def read_metadata(path: Path, num_rows: int) -> Mapping[str, Sequence[Any]]:
    """Read the metadata of a shard, by column.

    Raises:
        UserError: if the file is damaged, or of other rows.
    """
    try:
        check_regular(path)
        table = parquet.read_table(path, columns=_METADATA.names, partitioning=None)
        table = table.cast(_METADATA)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no metadata of rows ({error}); delete it, and embed again"
        ) from error
    if table.num_rows != num_rows:
        raise UserError(f"{path} describes {table.num_rows} rows of {num_rows}; embed anew")
    return table.to_pydict()


def read_joined(path: Path, column: str) -> tuple[list[tuple[int, NDArray[Any]]], pyarrow.Table]:
    """Read ``embeddings.parquet``: numbers and rows of its shards, and all metadata.

    Raises:
        UserError: if the file is damaged, or none of ``embed``.
    """
    try:
        check_regular(path)
        table = parquet.read_table(path, columns=[column, *_METADATA.names], partitioning=None)
        counts = json.loads((table.schema.metadata or {})[_ROWS_OF_SHARDS])
        lists = table.column(column).combine_chunks()
        values = lists.flatten().to_numpy(zero_copy_only=False)
        rows = values.reshape(table.num_rows, -1)
        ends = np.cumsum(counts).tolist()
        metadata = table.select(_METADATA.names).cast(_METADATA)
        is_whole = bool(ends) and ends[-1] == table.num_rows and min(counts) >= 0
    except (
        pyarrow.ArrowException,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is no finished file of embed ({reason}); embed into a new folder"
        ) from error
    if not is_whole:
        raise UserError(f"{path} is damaged: its shards and rows do not fit; embed it anew")
    starts = [0, *ends[:-1]]
    parts = [(n, rows[start:end]) for n, (start, end) in enumerate(zip(starts, ends, strict=True))]
    return parts, metadata


def _fixed_size_lists(features: NDArray[Any]) -> pyarrow.Array:
    """Return (R, D) as R lists of D numbers, without copying."""
    values = pyarrow.array(np.ascontiguousarray(features).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(values, features.shape[1])


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with open_atomically(path) as file:
        np.save(file, array, allow_pickle=False)
