"""Times of each rank for what it does alone.

In a step every rank waits for the slowest one, so wall time is the same on all. What differs is the
time for the next batch and for the towers up to the first exchange. Each rank notes its own; one
row per rank joins the sums that a logged step makes anyway.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

_NUM_NUMBERS = 3
# A moment of the host, or of a device that works behind it.
Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """Mark this moment; on CUDA the one at which the device has done all it was told so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def has_passed(moment: Moment) -> bool:
    """Whether a moment is over, without waiting for it."""
    return isinstance(moment, float) or moment.query()


def seconds_between(begin: Moment, end: Moment) -> float:
    """Seconds between two moments of one device that are over."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1000


class RankTimes(NamedTuple):
    """What a rank did alone in the steps between two logged ones.

    Attributes:
        data_seconds: waited for batches.
        encode_seconds: of the towers, forward, before anything was exchanged.
        seconds: of the steps, all in all; without evaluations and checkpoints.
    """

    data_seconds: float
    encode_seconds: float
    seconds: float

    @property
    def own_seconds(self) -> float:
        """What the others may have to wait for."""
        return self.data_seconds + self.encode_seconds


class StepTimer:
    """Notes seconds of this rank, without waiting for its device.

    On CUDA the towers are timed by events of the device, read once they have passed.
    """

    def __init__(self) -> None:
        self._data_seconds = 0.0
        self._seconds = 0.0
        self._encoded: list[tuple[Moment, Moment]] = []
        self._device = torch.device("cpu")
        self._began: Moment = 0.0
        self._everyone: Tensor | None = None

    def begin_encoding(self, device: torch.device) -> None:
        """The towers begin."""
        self._device, self._began = device, now(device)

    def end_encoding(self) -> None:
        """The towers are done, or will be once the device gets there."""
        self._encoded.append((self._began, now(self._device)))

    def end_step(self, data_seconds: float, seconds: float) -> None:
        """Note a whole step: the wait for its batch, and all of it."""
        self._data_seconds += data_seconds
        self._seconds += seconds

    def take_row(self, rank: int, world_size: int) -> Tensor:
        """Return what was noted of whole steps since the last time, to be added over ranks.

        Returns:
            (3 world_size,), float32 on the CPU: zeros but for the numbers of this rank.
        """
        # The last one noted belongs to the step under way.
        passed = [pair for pair in self._encoded[:-1] if has_passed(pair[1])]
        self._encoded = self._encoded[len(passed) :]
        encode_seconds = sum(seconds_between(*pair) for pair in passed)
        row = torch.zeros(world_size, _NUM_NUMBERS)
        row[rank] = torch.tensor([self._data_seconds, encode_seconds, self._seconds])
        self._data_seconds = self._seconds = 0.0
        return row.flatten()

    def keep_sum(self, rows: Tensor) -> None:
        """Keep the sum of all ranks' rows, where it lies, until it is read."""
        self._everyone = rows

    def read(self) -> list[RankTimes]:
        """Return what every rank noted, in rank order; empty if there is nothing new.

        Waits for the device.
        """
        rows, self._everyone = self._everyone, None
        if rows is None:
            return []
        return [RankTimes(*row) for row in rows.view(-1, _NUM_NUMBERS).tolist()]
