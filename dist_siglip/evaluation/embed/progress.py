"""Progress of one rank, and the samples it skipped.

``left_out/left_out_0.jsonl`` names those of the first shard: one JSON object a line with shard,
key, place and reason. A shard without bad samples has no such file.
"""

import json
import logging
import time
from pathlib import Path
from typing import NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.shard_job import JobRows, ShardJob
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import open_text

_LOGGER = logging.getLogger(__name__)
_EARLY_SAMPLES = 1000  # before the share is judged for the first time
_NAMED = 5  # of each shard, in the log


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
