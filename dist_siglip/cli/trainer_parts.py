"""Parts of a Trainer: ours beside what the user asks for, whose choice wins."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar

from dist_siglip.callbacks import AtomicCheckpointIO
from dist_siglip.cli.callback_groups import UNCONFIGURED


def default_callbacks(settings: Mapping[str, Any]) -> list[Callback]:
    """Return the callbacks of every run, but those of which the user gives one.

    Args:
        settings: of the Trainer, with what they name built.
    """
    given = {type(callback) for callback in listed(settings.get("callbacks"))}
    return [callback() for callback in UNCONFIGURED if callback not in given]


def draws_bar(settings: Mapping[str, Any]) -> bool:
    """Whether Lightning may draw a bar: if the user asks for it, or gives a callback that does."""
    asked: bool | None = settings.get("enable_progress_bar")
    given = listed(settings.get("callbacks"))
    return any(isinstance(each, ProgressBar) for each in given) if asked is None else asked


def plugins(settings: Mapping[str, Any]) -> list[Any]:
    """Plugins the configuration asks for, our checkpoint reader, SLURM without its requeue."""
    found = [*listed(settings.get("plugins")), AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning's own requeue saves inside the signal handler, which deadlocks with
        # collectives in the loss.
        found.append(SLURMEnvironment(auto_requeue=False))
    return found


def listed(value: Any) -> list[Any]:
    """Return a setting that may be one thing, several or none as a list.

    Example:
        >>> listed(None), listed(1), listed([1, 2])
        ([], [1], [1, 2])
    """
    return value if isinstance(value, list) else [] if value is None else [value]
