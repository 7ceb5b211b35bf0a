"""metrics.jsonl: one JSON object a line, whole lines only, no step twice."""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dist_siglip.atomic import write_atomically
from dist_siglip.runs import RunFolder


class MetricsLog(Logger):
    """Appends what is logged to RUN/metrics.jsonl.

    A line is {"step": optimizer steps done, "time": Unix seconds, name: number, ...}; a value that
    is not finite is written as the string "nan", "inf" or "-inf", so that each line is JSON.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__()
        self._path = RunFolder(Path(run_dir)).metrics
        self._steps_done: Callable[[], int] | None = None

    def follow(self, steps_done: Callable[[], int]) -> None:
        """Number lines by what ``steps_done`` says: the optimizer steps behind the weights."""
        self._steps_done = steps_done

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """A run folder has one log, across all its starts."""
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the settings are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        # Lightning hands over a batch counter that starts at 0 in training and at 1 elsewhere.
        done = step if self._steps_done is None else self._steps_done()
        line: dict[str, Any] = {"step": done, "time": round(time.time(), 3)}
        for name, value in metrics.items():
            if name != "epoch":  # means nothing for a loader without an end
                line[name] = value if math.isfinite(value) else str(value)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @rank_zero_only
    def discard_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will do again, and a line cut by a crash."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                logged_step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            if logged_step is not None and logged_step <= step:
                kept.append(line + "\n")
        write_atomically(self._path, "".join(kept))
