"""What may be wrong with one sample, and how much of it may a run put up with?"""

import os

import torch
from torch.distributed import ProcessGroup

from dist_siglip.data.bad_sample_log import first_lines
from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError

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

        Args:
            global_batch_size: samples of the step over all ranks.
            device: where the process group communicates.
            group: ranks to add up.

        Raises:
            UserError: on every rank in the same step, if the share is above the limit.
        """
        self._num_steps += 1
        self._num_samples += global_batch_size
        if self._num_steps % self._check_steps:
            return
        mine = torch.tensor(self.num_substituted, device=device)
        bad = int(sum_over_ranks(mine, group))
        if bad > self._max_fraction * self._num_samples:
            named = "; ".join(first_lines(self._log_path, _NAMED, self._log_start_bytes))
            listed = (
                f"first {named}; all in {self._log_path}" if named else "named in the log above"
            )
            raise UserError(
                f"max_bad_fraction ({self._max_fraction}) is exceeded: {bad} of "
                f"{self._num_samples} training samples were bad ({listed}); repair the shards or "
                "raise it"
            )
