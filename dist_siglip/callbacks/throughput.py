"""How fast the run is, and how much of a step waits for data."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dist_siglip.callbacks.metrics_log import MetricsLog


class Throughput(Callback):
    """Logs speed over the steps since the last logged one.

    train/pairs_per_second: pairs of the global batch per second of wall time.
    train/data_wait_percent: share of that time in which this rank waited for its next batch.

    Evaluation and checkpointing between two steps are not counted.
    """

    def __init__(self) -> None:
        self._busy_seconds = 0.0
        self._waiting_seconds = 0.0
        self._num_steps = 0
        self._last_end: float | None = None
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget log lines after the checkpoint the run goes on from."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLog):
                logger.discard_after(trainer.global_step)
        self._last_end = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time since the previous step's end as waiting."""
        self._start = time.perf_counter()
        if self._last_end is not None:
            self._waiting_seconds += self._start - self._last_end

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log every ``log_every_n_steps``."""
        now = time.perf_counter()
        self._busy_seconds += now - self._start
        self._num_steps += 1
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning
        if every and trainer.global_step % every == 0:
            seconds = self._busy_seconds + self._waiting_seconds
            num_pairs = self._num_steps * len(batch.images) * trainer.world_size
            pl_module.log_dict(
                {
                    "train/pairs_per_second": num_pairs / seconds,
                    "train/data_wait_percent": 100 * self._waiting_seconds / seconds,
                }
            )
            self._busy_seconds = self._waiting_seconds = 0.0
            self._num_steps = 0
        self._last_end = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._last_end = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self._last_end = time.perf_counter()
