"""Which checkpoint of a run was the best so far, and by what?"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

from dist_siglip.runs.folder import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import read_json

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class BestCheckpoint:
    """Step, metric and value of the best checkpoint, as ``checkpoints/best.json`` has them."""

    step: int
    metric: str
    value: float

    def is_beaten_by(self, value: float, mode: Mode) -> bool:
        """Whether another value is better; one that is no number never is.

        Example:
            >>> best = BestCheckpoint(500, "val/loss", 0.4)
            >>> [best.is_beaten_by(value, "min") for value in (0.3, 0.4, float("nan"))]
            [True, False, False]
        """
        return value < self.value if mode == "min" else value > self.value

    def write(self, folder: RunFolder) -> None:
        """Write it down in one piece."""
        write_atomically(folder.best, json.dumps(asdict(self)) + "\n")


def read_best(folder: RunFolder, metric: str, mode: Mode) -> BestCheckpoint:
    """Return what is written down, or what anything beats if it is of no use.

    It is of use if it is about this metric and its checkpoint is there.
    """
    nothing = BestCheckpoint(-1, metric, math.inf if mode == "min" else -math.inf)
    try:
        found = BestCheckpoint(**read_json(folder.best))
        is_of_use = found.metric == metric and found.step in folder.steps_with_checkpoint()
        is_of_use = is_of_use and math.isfinite(found.value)
    except (OSError, ValueError, TypeError, OverflowError):
        return nothing
    return found if is_of_use else nothing
