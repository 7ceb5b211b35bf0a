"""Callbacks and loggers of a Lightning Trainer: progress, checkpoints, evaluations, safety."""

from dist_siglip.health.callback import Watchdog
from dist_siglip.runs.checkpoints.callback import RunCheckpoint
from dist_siglip.runs.checkpoints.io import AtomicCheckpointIO
from dist_siglip.training.callbacks.benchmarks import Benchmarks
from dist_siglip.training.callbacks.collapse_alarm import CollapseAlarm
from dist_siglip.training.callbacks.evaluation_record import EvaluationRecord, StartEvaluation
from dist_siglip.training.callbacks.loggers import MetricsLog, TensorBoardLog
from dist_siglip.training.callbacks.preemption import Preemption
from dist_siglip.training.callbacks.progress import ProgressReport
from dist_siglip.training.callbacks.skip_bad_steps import SkipBadSteps
from dist_siglip.training.callbacks.throughput import Throughput
from dist_siglip.training.callbacks.weight_average import WeightAverage

__all__ = [
    "AtomicCheckpointIO",
    "Benchmarks",
    "CollapseAlarm",
    "EvaluationRecord",
    "MetricsLog",
    "Preemption",
    "ProgressReport",
    "RunCheckpoint",
    "SkipBadSteps",
    "StartEvaluation",
    "TensorBoardLog",
    "Throughput",
    "Watchdog",
    "WeightAverage",
]
