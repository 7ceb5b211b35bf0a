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
        self._encode_seconds: list[float] = []
        self._encode_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._began: float | torch.cuda.Event = 0.0
        self._everyone: Tensor | None = None

    def begin_encoding(self, device: torch.device) -> None:
        """The towers begin."""
        self._began = _mark() if device.type == "cuda" else time.perf_counter()

    def end_encoding(self) -> None:
        """The towers are done, or will be once the device gets there."""
        if isinstance(self._began, float):
            self._encode_seconds.append(time.perf_counter() - self._began)
        else:
            self._encode_events.append((self._began, _mark()))

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
        done, self._encode_seconds = self._encode_seconds[:-1], self._encode_seconds[-1:]
        passed = [pair for pair in self._encode_events[:-1] if pair[1].query()]
        self._encode_events = self._encode_events[len(passed) :]
        encode_seconds = sum(done) + sum(begin.elapsed_time(end) for begin, end in passed) / 1000
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


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
