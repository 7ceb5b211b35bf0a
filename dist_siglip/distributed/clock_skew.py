"""How far apart are the clocks of the ranks?

The first rank asks every other one for its time, a few times; of the quickest answer the true
moment is known best, to half its way there and back.
"""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_QUESTIONS = 5


class ClockReading(NamedTuple):
    """The clock of one rank beside that of the first.

    Attributes:
        ahead_seconds: of the first rank's clock.
        uncertainty_seconds: half the time of the question and its answer.
    """

    ahead_seconds: float
    uncertainty_seconds: float


def read_clocks(group: ProcessGroup) -> list[ClockReading]:
    """Compare the clocks of all ranks with that of the first.

    Distributed contract: collective over ``group``, which must be on the CPU; a few bytes five
    times to every rank and back, one rank after the other.

    Returns:
        In rank order, on the first rank; nothing on the others.

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not answer.
    """
    stamp = torch.zeros(1, dtype=torch.float64)
    if group.rank():
        for _ in range(_QUESTIONS):
            dist.recv(stamp, group=group, group_src=0)
            stamp[0] = time.time()
            dist.send(stamp, group=group, group_dst=0)
        return []
    readings = [ClockReading(0.0, 0.0)]
    for rank in range(1, group.size()):
        answers = []
        for _ in range(_QUESTIONS):
            asked = time.time()
            dist.send(stamp, group=group, group_dst=rank)
            dist.recv(stamp, group=group, group_src=rank)
            half = (time.time() - asked) / 2
            answers.append(ClockReading(float(stamp) - asked - half, half))
        readings.append(min(answers, key=lambda answer: answer.uncertainty_seconds))
    return readings
