"""How do TensorBoard's event files outlive a full disk?

The writer of event files keeps the first error of its thread and raises it at the next scalar,
which ends the run. Here such a writer is given up, and a new one begins a new event file once there
is room; what was logged between is missing in TensorBoard, and whole in metrics.jsonl.
"""

import argparse
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from dist_siglip.runs import RunFolder

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 60.0
_LEAST_FREE_BYTES = 2**20


class TensorBoardLog(TensorBoardLogger):
    """A TensorBoardLogger whose failures to write are told once, and do not stop the run."""

    _failed_at: float | None = None

    @property
    def experiment(self) -> Any:
        """Writer of the event file.

        Raises:
            AttributeError: while none can be opened; Lightning asks whether there is one.
        """
        try:
            return super().experiment
        except OSError as error:
            self._give_up(error)
            raise AttributeError("no event file can be written") from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write numbers, if they can be written."""
        self._try(lambda: super(TensorBoardLog, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | argparse.Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Write settings, if they can be written."""
        self._try(lambda: super(TensorBoardLog, self).log_hyperparams(params, metrics, step))

    @rank_zero_only
    def save(self) -> None:
        """Flush, if that works."""
        self._try(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush and close, if that works."""
        self._try(lambda: super(TensorBoardLog, self).finalize(status))

    def _try(self, write: Callable[[], None]) -> None:
        if self._failed_at is not None and not self._is_worth_a_try():
            return
        if RunFolder(Path(self.save_dir)).is_moved():
            return  # the run ends for it, and says so
        try:
            write()
        except (OSError, ValueError, AttributeError) as error:
            cause = _os_error_behind(error)
            if cause is None:
                raise
            self._give_up(cause)
            return
        if self._failed_at is not None:
            logger.warning("TensorBoard is written to again")
        self._failed_at = None

    def _is_worth_a_try(self) -> bool:
        if self._failed_at is None or time.monotonic() - self._failed_at < _RETRY_SECONDS:
            return False
        try:
            return shutil.disk_usage(self.save_dir).free >= _LEAST_FREE_BYTES
        except OSError:
            return False

    def _give_up(self, error: OSError) -> None:
        """Let go of the broken writer, so that the next try makes another."""
        if self._failed_at is None:
            logger.warning(
                "TensorBoard cannot be written to %s (%s): the run goes on without; metrics.jsonl "
                "has the same numbers",
                self.log_dir,
                error.strerror or error,
            )
        self._failed_at = time.monotonic()
        broken, self._experiment = self._experiment, None
        if broken is not None:
            with suppress(OSError):
                broken.close()


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """Find what failed; Lightning makes a ValueError of whatever add_scalar raises."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error
