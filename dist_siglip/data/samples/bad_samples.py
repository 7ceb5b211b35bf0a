"""Samples that cannot be used: written down, counted, and bounded over all ranks.

The list has one JSON object a line, and all loader processes of all ranks append to it; a full disk
or a lost folder does not stop the run. Pictures that are used although their file ends too early
are counted in the log alone.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from dist_siglip.distributed import sum_over_ranks
from dist_siglip.distributed.collectives import HostCopy
from dist_siglip.errors import UserError
from dist_siglip.system.best_effort import LineLog
from dist_siglip.system.regular_file import open_text

_LOGGER = logging.getLogger(__name__)
_LOGGED_FIRST = 20  # truncated pictures named by each process; then every hundredth
_REASON = 200  # characters of a reason in a list of names


class BadSampleLog:
    """Appends to a file of bad samples.

    Args:
        path: the file; its folder must exist. None writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._lines = None if path is None else LineLog(Path(path), "bad samples")

    def append(self, **record: Any) -> None:
        """Add one line; where there is no room for it, it waits in this process."""
        if self._lines is not None:
            self._lines.append(json.dumps(record, ensure_ascii=True))


class TruncatedCount:
    """Counts truncated pictures that this process used, and names them in the log.

    Args:
        describe: name of a sample, by its id.
    """

    def __init__(self, describe: Callable[[int], str]) -> None:
        self._describe = describe
        self._count = 0

    def note(self, sample_id: int) -> None:
        """Count the picture of a sample."""
        self._count += 1
        if self._count <= _LOGGED_FIRST or self._count % 100 == 0:
            _LOGGER.warning(
                "truncated picture %d in this process: %s; what there is of it is used",
                self._count,
                self._describe(sample_id),
            )


def first_lines(path: str | None, count: int, start_bytes: int = 0) -> list[str]:
    """Name the first bad samples of a file, as ``shard/key: reason``.

    Args:
        path: the file; None has no lines.
        count: most lines.
        start_bytes: where to begin: what a file held before this start of a run is passed over.

    Returns:
        At most ``count`` names; none if there is no file.
    """
    names: list[str] = []
    if path is None:
        return names
    try:
        with open_text(path, errors="replace") as file:
            file.seek(start_bytes)
            for line in file:
                if name := _name_of(line):
                    names.append(name)
                if len(names) == count:
                    break
    except OSError:
        return names
    return names


def _name_of(line: str) -> str | None:
    """Name the sample of a line; None for one that a crash has cut."""
    try:
        record = json.loads(line)
        return f"{record['shard']}/{record['key']}: {record['reason'][:_REASON]}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


_NAMED = 5  # bad samples in the error that ends a run


class BadSampleError(Exception):
    """The bytes of one sample cannot be used; the text says why, without naming the sample."""


class BadSampleLimit:
    """Count substituted samples, and stop all ranks together when there are too many.

    Args:
        max_fraction: share of the training samples, over all ranks and since the process started,
            that may be substitutes.
        check_steps: steps between two comparisons; each is one all-reduce of one number.
    """

    def __init__(self, max_fraction: float, check_steps: int = 20) -> None:
        self._log_path: str | None = None
        self._log_start_bytes = 0
        self._max_fraction = max_fraction
        self._check_steps = check_steps
        self._num_steps = 0
        self._num_samples = 0
        # Of all ranks, on its way to the host, and the samples it is of.
        self._late: tuple[HostCopy, int] | None = None
        self.num_substituted = 0

    def name_from(self, log_path: str | None) -> None:
        """Name bad samples from what is added to this file from now on."""
        self._log_path = log_path
        known = log_path is not None and os.path.exists(log_path)
        self._log_start_bytes = os.path.getsize(log_path) if log_path and known else 0

    def count(self, num_substituted: int) -> None:
        """Add the substitutes of a batch of this rank."""
        self.num_substituted += num_substituted

    def finish_step(
        self, global_batch_size: int, device: torch.device, group: ProcessGroup | None = None
    ) -> None:
        """Count a step; every ``check_steps`` steps compare. Every rank must call it.

        From a GPU the sum is read one step later, when it is there: the host does not wait.

        Args:
            global_batch_size: samples of the step over all ranks.
            device: where the process group communicates.
            group: ranks to add up.

        Raises:
            UserError: on every rank in the same step, if the share is above the limit.
        """
        self._num_steps += 1
        self._num_samples += global_batch_size
        ready, self._late = self._late, None
        if self._num_steps % self._check_steps == 0:
            mine = torch.full((), self.num_substituted, device=device)
            self._late = HostCopy(sum_over_ranks(mine, group)), self._num_samples
            if device.type == "cpu":
                ready, self._late = self._late, None
        if ready is None:
            return
        bad, num_samples = int(ready[0].read()), ready[1]
        if bad > self._max_fraction * num_samples:
            named = "; ".join(first_lines(self._log_path, _NAMED, self._log_start_bytes))
            listed = (
                f"first {named}; all in {self._log_path}" if named else "named in the log above"
            )
            raise UserError(
                f"max_bad_fraction ({self._max_fraction}) is exceeded: {bad} of "
                f"{num_samples} training samples were bad ({listed}); repair the shards or "
                "raise it"
            )
