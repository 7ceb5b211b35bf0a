"""Parts of a Trainer: ours beside what the user asks for, whose choice wins; its callbacks."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import cuda, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_siglip.distributed.slurm_nodes import complain_about_gpus, main_address
from dist_siglip.errors import UserError
from dist_siglip.system.lightning_compat import set_ddp_defaults
from dist_siglip.training.callbacks import (
    AtomicCheckpointIO,
    Benchmarks,
    CollapseAlarm,
    EvaluationRecord,
    Preemption,
    ProgressReport,
    RunCheckpoint,
    SkipBadSteps,
    StartEvaluation,
    TensorBoardLog,
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

TRAINER_DEFAULTS = {
    # The training loader has no end; the run's length is max_steps.
    "max_epochs": -1,
    "use_distributed_sampler": False,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    # Null: ProgressReport shows a bar with an end, unless a callback of the user does.
    "enable_progress_bar": None,
    # The model's size is one line in the log.
    "enable_model_summary": False,
}


def default_callbacks(settings: Mapping[str, Any]) -> list[Callback]:
    """Return the callbacks of every run, but those of which the user gives one."""
    given = {type(callback) for callback in listed(settings.get("callbacks"))}
    return [callback() for callback in UNCONFIGURED if callback not in given]


def draws_bar(settings: Mapping[str, Any]) -> bool:
    """Whether Lightning may draw a bar: if the user asks for it, or gives a callback that does."""
    asked: bool | None = settings.get("enable_progress_bar")
    given = listed(settings.get("callbacks"))
    return any(isinstance(each, ProgressBar) for each in given) if asked is None else asked


def more_loggers(settings: Mapping[str, Any], run_dir: Path) -> list[Any]:
    """Return the event files of a run, and what the user asks for beside them."""
    asked = settings.get("logger")
    event_files = TensorBoardLog(str(run_dir), name="", version="tensorboard")
    return [event_files, *listed(None if isinstance(asked, bool) else asked)]


def plugins(settings: Mapping[str, Any]) -> list[Any]:
    """Plugins the configuration asks for, our checkpoint reader, SLURM without its requeue."""
    found = [*listed(settings.get("plugins")), AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        found.append(SlurmTasks())
    return found


def check_gpus(settings: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Refuse tasks of srun that see a GPU of their own only, if GPUs are to be used.

    Lightning gives task i of a node its GPU number i, which the task then does not see.
    """
    accelerator = settings.get("accelerator")
    is_wanted = accelerator in ("gpu", "cuda")
    if "RANK" in environ or not (is_wanted or (accelerator == "auto" and cuda.is_available())):
        return
    complaint = complain_about_gpus(environ)
    if complaint:
        raise UserError(f"trainer.devices ({settings.get('devices')}): {complaint}")


def precision(settings: Mapping[str, Any], recorded: str | None) -> str | None:
    """Choose the precision on a GPU, where the settings leave it open.

    Args:
        settings: of the Trainer, with what they name built.
        recorded: precision of the run so far; None of a new one.

    Returns:
        That of the run so far; of a new one bf16-mixed, if the GPU computes in it. None leaves it
        to Lightning, which takes 32-true.
    """
    is_gpu = settings.get("accelerator") in ("auto", "gpu", "cuda") and cuda.is_available()
    plugins = listed(settings.get("plugins"))
    is_open = settings.get("precision") is None and not any(
        isinstance(each, Precision) for each in plugins
    )
    # A process that is to be forked must not touch CUDA.
    if not is_gpu or not is_open or "fork" in str(settings.get("strategy")):
        return None
    if recorded is not None:
        return recorded
    return "bf16-mixed" if cuda.is_bf16_supported(including_emulation=False) else None


class SlurmTasks(SLURMEnvironment):
    """Ranks that srun has started, with the right first node and without Lightning's requeue.

    That one saves inside the signal handler, which deadlocks with collectives in the loss.

    Raises:
        UserError: if Lightning refuses the job; later, if its nodes cannot be read or are not
            those of the Trainer.
    """

    def __init__(self) -> None:
        try:
            super().__init__(auto_requeue=False)
        except RuntimeError as error:
            raise UserError(_in_one_line(error)) from error

    @property
    def main_address(self) -> str:
        """Host of rank 0; torch looks for it in the environment."""
        os.environ["MASTER_ADDR"] = main_address(os.environ)
        return os.environ["MASTER_ADDR"]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare nodes and tasks with what the Trainer was told."""
        try:
            super().validate_settings(num_devices, num_nodes)
        except ValueError as error:
            raise UserError(_in_one_line(error)) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def scratch_folder() -> Path:
    """Make a folder that is removed when this process ends."""
    path = tempfile.mkdtemp(prefix="dist_siglip-fast_dev_run-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def code_for_launcher(trainer: Trainer, code: int) -> int:
    """Return the code, but 0 in children of Lightning's launcher, whom theirs would kill."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
    return 0 if is_child else code


def strategy(settings: Mapping[str, Any]) -> dict[str, Strategy]:
    """Return the strategy that a bare class path names, built with its defaults; else nothing.

    To the Trainer it would be one of its own names, none of which has a dot in it.

    Raises:
        UserError: if it is the path of no strategy.

    Example:
        >>> strategy({"strategy": "ddp"})
        {}
        >>> list(strategy({"strategy": "dist_siglip.training.strategies.FullyShardedStrategy"}))
        ['strategy']
    """
    asked = settings.get("strategy")
    if not isinstance(asked, str) or "." not in asked:
        return {}
    module, _, name = asked.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (AttributeError, ImportError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise UserError(
            f"trainer.strategy ({asked}) is no class of a strategy; give ddp, or "
            "dist_siglip.training.strategies.FullyShardedStrategy"
        )
    return {"strategy": found()}


def spare_copies(strategy: Strategy, model: nn.Module) -> None:
    """Let DDP, unless told otherwise, copy neither gradients nor buffers that do not change.

    Gradients are views of what is sent, which spares their memory once; buffers are sent before a
    step where BatchNorm moves them on its own on every rank. ``static_graph`` would gain nothing
    here: without a search for unused parameters DDP sends buckets as early.
    """
    if isinstance(strategy, DDPStrategy):
        has_statistics = any(isinstance(layer, _BatchNorm) for layer in model.modules())
        set_ddp_defaults(strategy, gradient_as_bucket_view=True, broadcast_buffers=has_statistics)


def listed(value: Any) -> list[Any]:
    """Return a setting that may be one thing, several or none as a list.

    Example:
        >>> listed(None), listed(1), listed([1, 2])
        ([], [1], [1, 2])
    """
    return value if isinstance(value, list) else [] if value is None else [value]
