"""Loggers of a run: metrics.jsonl and TensorBoard. A failure to write does not stop the run.

metrics.jsonl has one JSON object a line, whole lines only, no step twice. Trackers that the user
adds get the name of the run, its settings and, where they take files, its report.
"""

import argparse
import importlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dist_siglip.runs import RunFolder
from dist_siglip.runs.provenance import flatten
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.best_effort import LineLog, best_effort
from dist_siglip.system.process_lock import check_place
from dist_siglip.system.redaction import redact_setting
from dist_siglip.system.regular_file import read_regular

logger = logging.getLogger(__name__)


class TensorBoardLog(TensorBoardLogger):
    """A TensorBoardLogger that the first failure to write switches off; the run goes on."""

    _is_off = False

    @property
    def experiment(self) -> Any:
        """Writer of the event file.

        Raises:
            AttributeError: if none can be opened; Lightning asks whether there is one.
        """
        try:
            return super().experiment
        except OSError as error:
            self._switch_off(error)
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
        # A run whose folder was moved away ends for it, and says so.
        if self._is_off or RunFolder(Path(self.save_dir)).is_moved():
            return
        try:
            write()
        except (OSError, ValueError, AttributeError) as error:
            # Lightning makes a ValueError of what a write raises.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__
            if cause is None:
                raise
            self._switch_off(cause)

    def _switch_off(self, error: OSError) -> None:
        if not self._is_off:
            self._is_off = True
            logger.warning(
                "TensorBoard cannot be written to %s (%s): the run goes on without; metrics.jsonl "
                "has the same numbers",
                self.log_dir,
                error.strerror or error,
            )


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
        self._lines = LineLog(self._path, "metrics")
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
        with suppress(OSError):  # told when the line cannot be written
            check_place(self._path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lines.append(json.dumps(line))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits for room, or say how much does."""
        self._lines.flush()
        if self._lines.num_waiting and not RunFolder(self._path.parent).is_moved():
            logger.warning(
                "%d lines of metrics still wait for room; they are lost with this process",
                self._lines.num_waiting,
            )

    @rank_zero_only
    def discard_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will do again, and a line cut by a crash."""
        try:
            lines = read_regular(self._path).splitlines(keepends=True)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("%s cannot be read (%s)", self._path, error.strerror or error)
            return
        kept = [line for line in lines if _is_whole(line) and _step_of(line) <= step]
        with best_effort(f"{self._path.name} without the steps after {step}"):
            if kept == lines[: len(kept)]:
                os.truncate(self._path, sum(map(len, kept)))  # needs no room
            else:
                write_atomically(self._path, b"".join(kept))


# Class of Lightning -> its argument for the name of a run, without which the tracker invents one.
_RUN_NAMES = {"WandbLogger": "name", "MLFlowLogger": "run_name"}


def name_trackers(settings: Any, name: str) -> None:
    """Give a run's name to the trackers of ``trainer.logger``, unless they have one.

    Args:
        settings: the parsed value: what names a class, a list of such, or anything else.
        name: of the run.
    """
    for each in settings if isinstance(settings, list) else [settings]:
        path, given = getattr(each, "class_path", None), getattr(each, "init_args", None)
        key = _RUN_NAMES.get(str(path).rpartition(".")[2])
        if key is not None and given is not None and given.get(key) is None:
            given[key] = name


def tell_settings(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Hand the settings of a run, by dotted name and without secrets, to trackers of the user."""
    told = {
        key: value if isinstance(value, (int, float)) else redact_setting(key, value)
        for key, value in flatten(settings)
        if value is not None
    }
    for each in loggers:
        if not isinstance(each, (MetricsLog, TensorBoardLog)):  # beside config.yaml
            with best_effort(f"the settings in {type(each).__name__}", Exception):
                each.log_hyperparams(told)


def attach_report(loggers: Iterable[Logger], report: Path) -> None:
    """Hand the report of a run to trackers that take files: W&B and MLflow."""
    for each in loggers:
        with best_effort(f"the report in {type(each).__name__}", Exception):
            if isinstance(each, WandbLogger):
                wandb: Any = importlib.import_module("wandb")
                experiment: Any = each.experiment
                experiment.log({"report": wandb.Html(report.read_text("utf-8"), inject=False)})
            elif isinstance(each, MLFlowLogger) and each.run_id is not None:
                each.experiment.log_artifact(each.run_id, str(report))


def _is_whole(line: bytes) -> bool:
    return line.endswith(b"\n")


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinity for a line without one, or cut."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
