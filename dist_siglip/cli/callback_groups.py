"""Which callbacks does every run have, and which of them have settings on the command line?"""

from lightning.pytorch import Callback

from dist_siglip.training.callbacks import (
    Benchmarks,
    CollapseAlarm,
    EvaluationRecord,
    Preemption,
    ProgressReport,
    RunCheckpoint,
    SkipBadSteps,
    StartEvaluation,
    Throughput,
    Watchdog,
)

# Group of settings -> class; what has to come first stands first.
CONFIGURED: dict[str, type[Callback]] = {
    "watchdog": Watchdog,
    "stop": Preemption,
    "step_guard": SkipBadSteps,
    "checkpoint": RunCheckpoint,
    "collapse_alarm": CollapseAlarm,
    "benchmarks": Benchmarks,
}
UNCONFIGURED: tuple[type[Callback], ...] = (
    Throughput,
    ProgressReport,
    EvaluationRecord,
    StartEvaluation,
)
