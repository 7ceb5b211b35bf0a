"""How do the parts of all ranks become one Parquet file?

Each part waits in ``parts/`` until all are there. The rank that finishes last joins them, shard
after shard, under a lock, and only a whole file gets the name ``embeddings.parquet``. Its metadata
say how many rows each shard has.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pyarrow import parquet

from dist_siglip.embedding.arrow import full_table, num_rows_of, read_footer, write_parquet
from dist_siglip.embedding.part import Part, PartRows
from dist_siglip.system.atomic import open_atomically
from dist_siglip.system.process_lock import hold

_ROWS_OF_SHARDS = b"rows_of_shards"


class SingleFileLayout:
    """Writes parts as files of their own, then one file of all.

    Args:
        folder: of the file.
        parts: all of the data set.
    """

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
        self._folder = folder
        self._parts = parts
        self._joined = folder / "embeddings.parquet"
        self._joined_rows: list[int] = []

    def files(self, part: Part) -> list[Path]:
        """Name the files of a part."""
        return [self._folder / "parts" / f"part_{part.label}.parquet"]

    def num_rows(self, part: Part) -> int | None:
        """Count the rows of a finished part; None if it is not finished."""
        found = num_rows_of(self.files(part)[0])
        if found is None and not self._joined_rows:
            footer = read_footer(self._joined)
            if footer is not None:
                self._joined_rows = json.loads(footer.metadata[_ROWS_OF_SHARDS])
        if found is None and self._joined_rows:
            return self._joined_rows[part.number]
        return found

    def write(self, done: PartRows) -> None:
        """Write a part."""
        write_parquet(self.files(done.part)[0], full_table(done))

    def finish(self) -> None:
        """Join the parts, if all are there and nobody has done it."""
        with hold(str(self._folder / ".lock"), "", math.inf):
            files = [file for part in self._parts for file in self.files(part)]
            if not self._joined.exists():
                if not all(file.exists() for file in files):
                    return
                self._join(files)
            for file in files:
                file.unlink(missing_ok=True)
            with suppress(OSError):  # another file is in there
                (self._folder / "parts").rmdir()

    def _join(self, files: Sequence[Path]) -> None:
        """Write one file, a row group for each part."""
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
