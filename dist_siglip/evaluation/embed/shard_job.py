"""Shard jobs: one shard of a data set, its rows, the files they become, and the progress of a rank.

Shards are written on their own, so ranks need not talk and a killed run loses one shard.
``left_out/left_out_0.jsonl`` names the skipped samples of the first shard: one JSON object a line
with shard, key, place and reason. A shard without bad samples has no such file.

The layout ``features`` is what training reads in place of pictures or captions: one file for each
shard, see ``data.samples.cached_features``; a shard is finished when its file is there.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.index.read import read_index
from dist_siglip.data.remote.locations import redact, shard_name
from dist_siglip.data.samples.cached_features import (
    FeatureFile,
    Tower,
    feature_path,
    write_features,
)
from dist_siglip.errors import UserError
from dist_siglip.evaluation.encoding import EncodedRows
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import open_text

_LOGGER = logging.getLogger(__name__)
_EARLY_SAMPLES = 1000  # before the share is judged for the first time
_NAMED = 5  # of each shard, in the log


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


def skipped_file(folder: Path, job: ShardJob) -> Path:
    """Name the file of a shard's bad samples."""
    return folder / "left_out" / f"left_out_{job.label}.jsonl"


def write_skipped(folder: Path, done: JobRows) -> None:
    """Name the bad samples of a shard, in its file and the first of them in the log."""
    job, problems = done.job, done.rows.problems
    if not problems:
        return
    lines = []
    for number, (sample_id, reason) in enumerate(problems.items()):
        place = sample_id - job.first
        record = {"shard": job.shard, "key": done.keys[place], "place": place, "reason": reason}
        lines.append(json.dumps(record) + "\n")
        if number < _NAMED:
            _LOGGER.warning("skipped %s: %s", ascii(f"{job.shard}/{done.keys[place]}"), reason)
    write_atomically(skipped_file(folder, job), "".join(lines))


def is_all_skipped(folder: Path, job: ShardJob) -> bool:
    """Tell whether a shard is finished and has no row at all."""
    try:
        with open_text(skipped_file(folder, job)) as file:
            return sum(1 for _ in file) == job.num_samples
    except FileNotFoundError:
        return job.num_samples == 0


def check_share(
    folder: Path, skipped: int, samples: int, max_bad_fraction: float, *, is_end: bool
) -> None:
    """Stop if too many samples are skipped; of the first thousand so many that it is certain.

    Raises:
        UserError: naming the limit and where the samples are listed.
    """
    judged = samples if is_end else max(samples, _EARLY_SAMPLES)
    if skipped > max_bad_fraction * judged:
        raise UserError(
            f"max_bad_fraction ({max_bad_fraction}) is exceeded: {skipped} of {samples} samples "
            f"cannot be used, listed in {folder / 'left_out'}; repair the shards, or raise it"
        )


class EmbedReport(NamedTuple):
    """What one rank did.

    Attributes:
        shards: of its share.
        kept: of these, finished by an earlier call.
        samples: of its share.
        left_out: of these, without an embedding.
        seconds: of this call, from the first look at the folder.
        pairs_per_second: embedded in this call.
    """

    shards: int
    kept: int
    samples: int
    left_out: int
    seconds: float
    pairs_per_second: float


class Progress:
    """What one rank has done.

    Args:
        folder: of the embeddings.
        max_bad_fraction: share of the samples that may be skipped.
    """

    def __init__(self, folder: Path, max_bad_fraction: float) -> None:
        self.kept = 0
        self.current = 0
        self._folder = folder
        self._max_bad_fraction = max_bad_fraction
        self._done = self._samples = self._skipped = self._embedded = 0
        self._started = time.monotonic()

    def keep(self, job: ShardJob, num_rows: int) -> None:
        """Count a shard that is there."""
        self.kept += 1
        self._samples += job.num_samples
        self._skipped += job.num_samples - num_rows

    def add(self, done: JobRows, num_pending: int) -> None:
        """Count a shard that was written, and say so."""
        num_rows, num_bad = len(done.rows.sample_ids), len(done.rows.problems)
        self._done += 1
        self._samples += done.job.num_samples
        self._skipped += num_bad
        self._embedded += num_rows
        _LOGGER.info(
            "shard %d of %d: %s, %d rows, %d skipped; %.0f pairs/s",
            self._done,
            num_pending,
            done.job.shard,
            num_rows,
            num_bad,
            self._rate(),
        )
        self.judge(is_end=False)

    def judge(self, *, is_end: bool) -> None:
        """Stop if too many samples are skipped."""
        check_share(
            self._folder, self._skipped, self._samples, self._max_bad_fraction, is_end=is_end
        )

    def report(self) -> EmbedReport:
        """Sum up."""
        return EmbedReport(
            shards=self.kept + self._done,
            kept=self.kept,
            samples=self._samples,
            left_out=self._skipped,
            seconds=time.monotonic() - self._started,
            pairs_per_second=self._rate(),
        )

    def _rate(self) -> float:
        return self._embedded / (time.monotonic() - self._started)


Format = Literal["clip-retrieval", "parquet", "features"]


class Layout(Protocol):
    """Writes shards into a folder, each whole or not at all."""

    def files(self, job: ShardJob) -> list[Path]:
        """Name the files of a job."""
        ...

    def num_rows(self, job: ShardJob) -> int | None:
        """Count the rows of a finished shard; None if it is not finished."""
        ...

    def write(self, done: JobRows) -> None:
        """Write a job."""
        ...

    def finish(self) -> None:
        """Do what is left when this rank has written its shards; others may still write."""
        ...


class FeaturesLayout:
    """Writes shards as files of features.

    Args:
        folder: of all shards.
        shard_lines: of the table, one for each job.
    """

    def __init__(self, folder: Path, shard_lines: Sequence[str]) -> None:
        self._folder = folder
        self._lines = shard_lines

    def files(self, job: ShardJob) -> list[Path]:
        """Name the file of a job."""
        return [feature_path(self._folder, self._lines[job.number])]

    def num_rows(self, job: ShardJob) -> int | None:
        """Count the rows of a finished shard; None if it is not finished."""
        (path,) = self.files(job)
        if not path.exists():
            return None
        try:
            return FeatureFile(path).num_rows
        except OSError as error:
            raise UserError(f"{error}; delete it and start again") from error

    def write(self, done: JobRows) -> None:
        """Write a shard, one without any row too."""
        rows = np.full(done.job.num_samples, -1, dtype=np.int32)
        rows[done.places()] = np.arange(len(done.rows.sample_ids), dtype=np.int32)
        features: dict[Tower, NDArray[np.floating]] = {}
        if done.rows.image_features is not None:
            features["image"] = done.rows.image_features
        if done.rows.text_features is not None:
            features["text"] = done.rows.text_features
        ids = {tower: done.rows.ids[tower] for tower in features if tower in done.rows.ids}
        write_features(self.files(done.job)[0], features, rows, ids)

    def finish(self) -> None:
        """Do nothing: the files of the shards are what is wanted."""


def layout_of(
    name: Format, folder: Path, jobs: Sequence[ShardJob], shard_lines: Sequence[str]
) -> Layout:
    """Return the layout of a format.

    Raises:
        UserError: if a package that it needs is missing.
    """
    if name == "features":
        return FeaturesLayout(folder, shard_lines)
    try:
        from dist_siglip.evaluation.embed.parquet_layouts import (
            ClipRetrievalLayout,
            SingleFileLayout,
        )
    except ImportError as error:
        raise UserError(
            f'format ({name}) needs pyarrow ({error}); pip install "dist-siglip[pack]"'
        ) from error
    if name == "parquet":
        return SingleFileLayout(folder, jobs)
    return ClipRetrievalLayout(folder)


def remove_partial(files: Iterable[Path]) -> None:
    """Delete what a killed process left beside files it was writing, hidden and half-written."""
    names: dict[Path, set[str]] = {}
    for file in files:
        names.setdefault(file.parent, set()).add(file.name)
    for folder, wanted in names.items():
        for left in folder.glob(".*.tmp"):  # .NAME.RANDOM.tmp
            if left.name[1:].rsplit(".", 2)[0] in wanted:
                left.unlink(missing_ok=True)
