"""What plugs into a Lightning Trainer: logging, progress, checkpoints, evaluation records."""

from dist_siglip.callbacks.benchmarks import Benchmarks
from dist_siglip.callbacks.collapse_alarm import CollapseAlarm
from dist_siglip.callbacks.evaluation_record import EvaluationRecord
from dist_siglip.callbacks.metrics_log import MetricsLog
from dist_siglip.callbacks.progress import ProgressReport
from dist_siglip.callbacks.start_evaluation import StartEvaluation
from dist_siglip.callbacks.step_guard import StepGuard
from dist_siglip.callbacks.stop_together import StopTogether
from dist_siglip.callbacks.tensorboard_log import TensorBoardLog
from dist_siglip.callbacks.throughput import Throughput
from dist_siglip.callbacks.weight_average import WeightAverage
from dist_siglip.health.callback import Watchdog
from dist_siglip.runs.checkpoints.callback import RunCheckpoint
from dist_siglip.runs.checkpoints.io import AtomicCheckpointIO

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
