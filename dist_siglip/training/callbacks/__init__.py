"""What plugs into a Lightning Trainer: logging, progress, checkpoints, evaluation records."""

from dist_siglip.health.callback import Watchdog
from dist_siglip.runs.checkpoints.callback import RunCheckpoint
from dist_siglip.runs.checkpoints.io import AtomicCheckpointIO
from dist_siglip.training.callbacks.benchmarks import Benchmarks
from dist_siglip.training.callbacks.collapse_alarm import CollapseAlarm
from dist_siglip.training.callbacks.evaluation_record import EvaluationRecord, StartEvaluation
from dist_siglip.training.callbacks.metrics_log import MetricsLog
from dist_siglip.training.callbacks.preemption import StopTogether
from dist_siglip.training.callbacks.progress import ProgressReport
from dist_siglip.training.callbacks.skip_bad_steps import StepGuard
from dist_siglip.training.callbacks.tensorboard_log import TensorBoardLog
from dist_siglip.training.callbacks.throughput import Throughput
from dist_siglip.training.callbacks.weight_average import WeightAverage

__all__ = [
    "AtomicCheckpointIO",
    "Benchmarks",
    "CollapseAlarm",
    "EvaluationRecord",
    "MetricsLog",
    "ProgressReport",
    "RunCheckpoint",
    "StartEvaluation",
    "StepGuard",
    "StopTogether",
    "TensorBoardLog",
    "Throughput",
    "Watchdog",
    "WeightAverage",
]
