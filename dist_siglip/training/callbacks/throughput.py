"""Throughput, the share of time spent waiting for data, and slow ranks."""

import logging
import math
import os
from collections.abc import Sequence
from statistics import median_low
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dist_siglip.health.step_timing import (
    Moment,
    RankTimes,
    StepTimer,
    has_passed,
    now,
    seconds_between,
)
from dist_siglip.training.callbacks.loggers import MetricsLog

logger = logging.getLogger(__name__)

_FACTOR = 1.5  # over the median of ranks, in what a rank does alone
_LEAST_SHARE = 0.05  # of the interval that the others lose
_IN_A_ROW = 3  # intervals before it is said
_TOLD = (1, 10, 100, 1000)  # at which such row it is said


class Stragglers:
    """Looks at the times of all ranks at every logged step."""

    def __init__(self) -> None:
        self._num_intervals = 0
        self._suspect: int | None = None
        self._num_in_a_row = 0
        self._num_rows = 0

    def look(self, times_by_rank: Sequence[RankTimes], *, tells: bool) -> dict[str, float]:
        """Return metrics of the slowest rank; warn if one stays slow.

        Args:
            times_by_rank: of every rank, in rank order.
            tells: whether this is the rank that warns.

        Returns:
            train/slowest_rank, train/slowest_rank_data_wait_percent and
            train/slowest_rank_encode_percent.
        """
        self._num_intervals += 1
        slowest = max(range(len(times_by_rank)), key=lambda rank: times_by_rank[rank].own_seconds)
        times = times_by_rank[slowest]
        # The first interval starts the loaders, and translates towers.
        if self._num_intervals > 1:
            self._judge(slowest, times_by_rank, tells=tells)
        seconds = times.seconds or 1.0  # no whole step yet
        return {
            "train/slowest_rank": float(slowest),
            "train/slowest_rank_data_wait_percent": 100 * times.data_seconds / seconds,
            "train/slowest_rank_encode_percent": 100 * times.encode_seconds / seconds,
        }

    def _judge(self, slowest: int, times_by_rank: Sequence[RankTimes], *, tells: bool) -> None:
        if not is_straggler(slowest, times_by_rank):
            self._suspect, self._num_in_a_row = None, 0
            return
        self._num_in_a_row = self._num_in_a_row + 1 if slowest == self._suspect else 1
        self._suspect = slowest
        if self._num_in_a_row % _IN_A_ROW:
            return
        self._num_rows += 1
        if self._num_rows in _TOLD and tells:
            times = times_by_rank[slowest]
            logger.warning(
                "rank %d keeps the others waiting: %.0f %% of its time for data and %.0f %% in the "
                "towers, the median of ranks %.0f %% and %.0f %%, over %d logged intervals; look "
                "at its node",
                slowest,
                100 * times.data_seconds / times.seconds,
                100 * times.encode_seconds / times.seconds,
                100 * median_low(p.data_seconds for p in times_by_rank) / times.seconds,
                100 * median_low(p.encode_seconds for p in times_by_rank) / times.seconds,
                self._num_in_a_row,
            )


def is_straggler(rank: int, times_by_rank: Sequence[RankTimes]) -> bool:
    """Whether a rank takes much longer alone than the median of ranks, and it matters.

    Example:
        >>> usual, slow = RankTimes(0.1, 3.0, 10.0), RankTimes(4.0, 3.0, 10.0)
        >>> is_straggler(1, [usual, slow, usual]), is_straggler(0, [usual, slow, usual])
        (True, False)
    """
    own = times_by_rank[rank].own_seconds
    usual = median_low(times.own_seconds for times in times_by_rank)
    return own > _FACTOR * usual and own - usual > _LEAST_SHARE * times_by_rank[rank].seconds


_BOUND = 1 / 3  # share of the time spent waiting above which a run is bound by its data


class Throughput(Callback):
    """Logs speed over the steps since the last logged one.

    train/pairs_per_second: pairs of the global batch per second of wall time.
    train/data_wait_percent: share of that time in which this rank waited for its next batch.

    On a GPU both are times of the device, which works behind the host: it waits for a batch if it
    is done with everything else. They are read without waiting for it, so that steps it has not
    done yet count in the next interval.

    train/slowest_rank, train/slowest_rank_data_wait_percent, train/slowest_rank_encode_percent: of
    several ranks, the one that takes longest for its batches and its towers, which the others
    wait for, and the shares of its time; a rank that stays slow is warned of (``Stragglers``).

    Evaluation and checkpointing between two steps are not counted. A run that waits for a third
    of the time or more is told how many loader processes would keep up (``workers_needed``).
    """

    def __init__(self) -> None:
        self._busy_seconds = 0.0
        self._waiting_seconds = 0.0
        self._num_steps = 0
        # End of the step before, begin, end; of steps whose end the device has yet to reach.
        self._pending: list[tuple[Moment, Moment, Moment]] = []
        self._last_end: Moment | None = None
        self._start: Moment = 0.0
        self._num_intervals = 0
        self._num_bound = 0
        self._stragglers = Stragglers()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget log lines after the checkpoint the run goes on from."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLog):
                logger.discard_after(trainer.global_step)
        self._last_end = now(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the step begins; the time since the end of the one before was waiting."""
        self._start = now(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log every ``log_every_n_steps``."""
        end = now(pl_module.device)
        timer = _step_timer_of(pl_module)
        # Directly behind an evaluation nothing is known of the wait.
        before = self._start if self._last_end is None else self._last_end
        self._pending.append((before, self._start, end))
        self._last_end = end
        self._settle(timer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning
        if every and trainer.global_step % every == 0 and self._num_steps:
            seconds = self._busy_seconds + self._waiting_seconds
            num_pairs = self._num_steps * len(batch.images) * trainer.world_size
            pl_module.log_dict(
                {
                    "train/pairs_per_second": num_pairs / seconds,
                    "train/data_wait_percent": 100 * self._waiting_seconds / seconds,
                }
            )
            times = timer.read()
            if len(times) > 1:
                pl_module.log_dict(self._stragglers.look(times, tells=trainer.is_global_zero))
            self._judge(trainer, self._num_steps * len(batch.images))
            self._busy_seconds = self._waiting_seconds = 0.0
            self._num_steps = 0

    def _settle(self, timer: StepTimer) -> None:
        """Add up the steps that are over on the device."""
        while self._pending and has_passed(self._pending[0][2]):
            before, begin, end = self._pending.pop(0)
            waiting_seconds = seconds_between(before, begin)
            busy_seconds = seconds_between(begin, end)
            self._waiting_seconds += waiting_seconds
            self._busy_seconds += busy_seconds
            self._num_steps += 1
            timer.end_step(waiting_seconds, waiting_seconds + busy_seconds)

    def _judge(self, trainer: Trainer, num_local_pairs: int) -> None:
        """Say so if the interval was bound by the data; the first one starts the workers."""
        self._num_intervals += 1
        seconds = self._busy_seconds + self._waiting_seconds
        workers: int | None = getattr(trainer.datamodule, "workers_per_rank", None)  # type: ignore[attr-defined]
        if (
            self._num_intervals == 1
            or workers is None
            or self._waiting_seconds < _BOUND * seconds
            or not self._busy_seconds
        ):
            return
        self._num_bound += 1
        if self._num_bound in _TOLD and trainer.is_global_zero:
            logger.warning(
                "data-bound: %.0f %% of the time waits for pictures; %d workers a rank deliver "
                "%.0f pairs/s, the model could take %.0f; about %d workers_per_rank would keep up "
                "(this rank may use %d cores)",
                100 * self._waiting_seconds / seconds,
                workers,
                num_local_pairs / seconds,
                num_local_pairs / self._busy_seconds,
                workers_needed(workers, self._busy_seconds, self._waiting_seconds),
                _cores_of_a_rank(trainer),
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._last_end = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self._last_end = now(pl_module.device)


def workers_needed(workers: int, busy_seconds: float, waiting_seconds: float) -> int:
    """Estimate how many loader processes would keep a model busy.

    Workers that are waited for work all the time, so ``workers`` of them need ``busy + waiting``
    for what the model takes ``busy`` for: K = ceil(workers * (busy + waiting) / busy). Without
    workers the process itself loads while it waits, and K = ceil(waiting / busy).

    Args:
        workers: loader processes of a rank now.
        busy_seconds: of the rank in its steps, > 0.
        waiting_seconds: of the rank for its batches.

    Example:
        >>> workers_needed(2, 1.0, 3.0), workers_needed(0, 1.0, 2.5)
        (8, 3)
    """
    if not workers:
        return max(1, math.ceil(waiting_seconds / busy_seconds))
    return math.ceil(workers * (busy_seconds + waiting_seconds) / busy_seconds)


def _step_timer_of(module: LightningModule) -> StepTimer:
    """StepTimer of our module; of another one there is nothing to read."""
    timer = getattr(module, "step_timer", None)
    return timer if isinstance(timer, StepTimer) else StepTimer()


def _cores_of_a_rank(trainer: Trainer) -> int:
    """Share the cores this process may use among the ranks of its node."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, trainer.num_devices))
