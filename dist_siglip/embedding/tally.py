"""What has one rank done, and may it go on?"""

import logging
import time
from pathlib import Path
from typing import NamedTuple

from dist_siglip.embedding.left_out import check_share
from dist_siglip.embedding.part import Part, PartRows

_LOGGER = logging.getLogger(__name__)


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


class Tally:
    """What one rank has done.

    Args:
        folder: of the embeddings.
        max_bad_fraction: share of the samples that may be left out.
    """

    def __init__(self, folder: Path, max_bad_fraction: float) -> None:
        self.kept = 0
        self.current = 0
        self._folder = folder
        self._max_bad_fraction = max_bad_fraction
        self._done = self._samples = self._left_out = self._embedded = 0
        self._started = time.monotonic()

    def keep(self, part: Part, num_rows: int) -> None:
        """Count a part that is there."""
        self.kept += 1
        self._samples += part.num_samples
        self._left_out += part.num_samples - num_rows

    def add(self, done: PartRows, num_pending: int) -> None:
        """Count a part that was written, and say so."""
        num_rows, num_bad = len(done.rows.sample_ids), len(done.rows.problems)
        self._done += 1
        self._samples += done.part.num_samples
        self._left_out += num_bad
        self._embedded += num_rows
        _LOGGER.info(
            "shard %d of %d: %s, %d rows, %d left out; %.0f pairs/s",
            self._done,
            num_pending,
            done.part.shard,
            num_rows,
            num_bad,
            self._rate(),
        )
        self.judge(is_end=False)

    def judge(self, *, is_end: bool) -> None:
        """Stop if too many samples are left out."""
        check_share(
            self._folder, self._left_out, self._samples, self._max_bad_fraction, is_end=is_end
        )

    def report(self) -> EmbedReport:
        """Sum up."""
        return EmbedReport(
            shards=self.kept + self._done,
            kept=self.kept,
            samples=self._samples,
            left_out=self._left_out,
            seconds=time.monotonic() - self._started,
            pairs_per_second=self._rate(),
        )

    def _rate(self) -> float:
        return self._embedded / (time.monotonic() - self._started)
