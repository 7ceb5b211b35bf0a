"""Shard jobs: one shard of a data set, its keys, and the rows it becomes.

Shards are written on their own, so ranks need not talk and a killed run loses one shard.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.index.read import read_index
from dist_siglip.data.remote.locations import redact, shard_name
from dist_siglip.errors import UserError
from dist_siglip.evaluation.encoding import EncodedRows


class ShardJob(NamedTuple):
    """One shard of the data set.

    Attributes:
        number: of the shard, in the order of the data set.
        label: the number with leading zeros, as clip-retrieval names files.
        shard: base name of the shard.
        first: id of its first sample.
        stop: id after its last.
    """

    number: int
    label: str
    shard: str
    first: int
    stop: int

    @property
    def num_samples(self) -> int:
        """Samples of the shard, bad ones included."""
        return self.stop - self.first

    def num_batches(self, local_batch_size: int) -> int:
        """Count its batches."""
        return -(-self.num_samples // local_batch_size)

    def batches(self, local_batch_size: int) -> Iterator[list[int]]:
        """Cut its sample ids into batches.

        Example:
            >>> list(ShardJob(0, "0", "a.tar", 10, 15).batches(3))
            [[10, 11, 12], [13, 14]]
        """
        for start in range(self.first, self.stop, local_batch_size):
            yield list(range(start, min(start + local_batch_size, self.stop)))


class JobRows(NamedTuple):
    """What is written of a job.

    Attributes:
        job: which one.
        rows: embeddings of the samples that could be used.
        keys: of all samples of the shard, the bad ones too.
    """

    job: ShardJob
    rows: EncodedRows
    keys: list[str]

    def row_keys(self) -> list[str]:
        """Keys of the rows."""
        return [self.keys[i - self.job.first] for i in self.rows.sample_ids]

    def places(self) -> NDArray[np.int64]:
        """(R,) int64, place of each row's sample among the complete ones of its shard."""
        return np.array(self.rows.sample_ids, dtype=np.int64) - self.job.first


def shard_jobs(table: PairTable) -> list[ShardJob]:
    """List the jobs of a data set."""
    starts, count = table.starts.tolist(), len(table.shards)
    return [
        ShardJob(
            number,
            str(number).zfill(len(str(count))),
            shard_name(shard),
            starts[number],
            starts[number + 1],
        )
        for number, shard in enumerate(table.shards)
    ]


def sample_keys(table: PairTable, job: ShardJob) -> list[str]:
    """List the keys of the samples of a shard, as text that any file can hold.

    Raises:
        UserError: if the shard changed or vanished since the table was made.
    """
    shard = table.shards[job.number]
    try:
        keys = read_index(shard, cache=table.cache).keys()
    except OSError as error:
        raise UserError(f"shard {shard!r} cannot be read: {error.strerror or error}") from error
    dropped = set(table.dropped[table.dropped[:, 0] == job.number, 1].tolist())
    kept = [key for place, key in enumerate(keys) if place not in dropped]
    if len(kept) != job.num_samples:
        raise UserError(f"shard {redact(shard)!r} changed since the start; start again")
    # A name that is not UTF-8 is half characters here.
    return [key.encode("utf-8", "backslashreplace").decode() for key in kept]
