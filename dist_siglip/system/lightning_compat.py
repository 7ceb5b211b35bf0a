"""Every private name of Lightning that this package touches.

Lightning may change these in any release, so ``pyproject.toml`` bounds its version, and ``check``
finds out in one line whether all of them are still there.
"""

import importlib
import inspect
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh

# Class, private name, what it is needed for.
PRIVATE = (
    ("trainer.trainer.Trainer", "_checkpoint_connector", "checkpoints"),
    (
        "trainer.connectors.checkpoint_connector._CheckpointConnector",
        "dump_checkpoint",
        "checkpoints",
    ),
    ("trainer.trainer.Trainer", "_signal_connector", "answers to signals"),
    (
        "trainer.connectors.signal_connector._SignalConnector",
        "register_signal_handlers",
        "answers to signals",
    ),
    (
        "loops.training_epoch_loop._TrainingEpochLoop",
        "_broadcast_sigterm_tensor",
        "answers to signals",
    ),
    ("loops.training_epoch_loop._TrainingEpochLoop", "_batches_that_stepped", "logged steps"),
    ("core.module.LightningModule", "_device_mesh", "FullyShardedStrategy"),
    ("strategies.ModelParallelStrategy", "_tensor_parallel_size", "FullyShardedStrategy"),
    ("strategies.ModelParallelStrategy", "_data_parallel_size", "FullyShardedStrategy"),
    ("strategies.ModelParallelStrategy", "_save_distributed_checkpoint", "FullyShardedStrategy"),
    ("strategies.DDPStrategy", "_timeout", "the time limit of collectives"),
    ("strategies.DDPStrategy", "_ddp_kwargs", "memory and speed of DDP"),
    ("strategies.ModelParallelStrategy", "_timeout", "the time limit of collectives"),
)


def check() -> None:
    """Look for every private name.

    Raises:
        RuntimeError: naming the first that is gone, in one line.
    """
    for path, name, purpose in PRIVATE:
        module, _, owner = path.rpartition(".")
        try:
            found: Any = getattr(importlib.import_module(f"lightning.pytorch.{module}"), owner)
            is_there = hasattr(found, name) or f"self.{name}" in inspect.getsource(found)
        except (ImportError, AttributeError):
            is_there = False
        if not is_there:
            raise RuntimeError(
                f"Lightning has no {path}.{name} any more, which {purpose} needs; install a "
                "version within the bounds of pyproject.toml"
            )


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return everything a checkpoint holds, without writing it."""
    content: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return content


def install_no_handlers(trainer: Trainer) -> None:
    """Keep Lightning from installing signal handlers of its own."""
    trainer._signal_connector.register_signal_handlers = _do_nothing  # type: ignore[method-assign]


def broadcast_no_sigterm(trainer: Trainer) -> None:
    """Take out the broadcast of each step that asks the first rank whether it was signalled."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = _do_nothing


def count_logged_steps(trainer: Trainer) -> None:
    """Have Lightning's loggers count the steps of the optimizer.

    Lightning counts for them apart, and counts one more where some ended runs go on: what was
    logged at one step would be written at another.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def _do_nothing() -> None:
    """Stand in for a broadcast in every step, and for handlers."""


def set_mesh_sizes(strategy: ModelParallelStrategy, *, data: int, tensor: int) -> None:
    """Set how many ranks share the data and how many each matrix."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = data, tensor


def set_ddp_defaults(strategy: DDPStrategy, **defaults: Any) -> None:
    """Give torch's DistributedDataParallel arguments that the user has not given."""
    strategy._ddp_kwargs = {**defaults, **strategy._ddp_kwargs}


def set_device_mesh(module: LightningModule, mesh: DeviceMesh) -> None:
    """Give a module the mesh that its ``device_mesh`` returns."""
    module._device_mesh = mesh


def writes_sharded_checkpoints(strategy: ModelParallelStrategy) -> bool:
    """Whether every rank writes its part of a checkpoint."""
    return strategy._save_distributed_checkpoint


def collective_timeout(strategy: Strategy) -> timedelta | None:
    """Time limit of collectives that a strategy was given; None for one without ranks."""
    return getattr(strategy, "_timeout", None)
