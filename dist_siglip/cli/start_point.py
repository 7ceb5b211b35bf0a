"""Where does a command begin: at which checkpoint, of which run, and does it fit the model?"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dist_siglip.callbacks.checkpoint_io import read_shapes
from dist_siglip.errors import UserError
from dist_siglip.optim import OptimConfig, describe_schedule_change
from dist_siglip.picture_policy import BEFORE_THE_SETTINGS
from dist_siglip.runs import (
    RunFolder,
    check_sound,
    describe_differences,
    newest_sound_checkpoint,
)
from dist_siglip.runs.identity import flatten


def checkpoint_to_start_from(folder: RunFolder, given: str | None) -> Path | None:
    """Return the newest sound checkpoint of the run, or the one given to a run that has none.

    Raises:
        UserError: if one is given and is damaged, or the run has its own; if all of the run are
            damaged.
    """
    newest = newest_sound_checkpoint(folder)
    if given is None:
        return newest
    if newest is not None:
        raise UserError(
            f"ckpt_path ({given}) is given but run_dir ({folder.path}) has its own "
            f"{newest.name}; leave ckpt_path out to go on, or choose another run_dir"
        )
    check_sound(Path(given))
    return Path(given)


def checkpoint_to_look_at(
    folder: RunFolder, given: str | None, model: torch.nn.Module
) -> Path | None:
    """Return the checkpoint given, else the newest sound one, if any; it fits the model.

    Raises:
        UserError: as ``check_fits``, or if the one given or all of the run are damaged.
    """
    if given:
        check_sound(Path(given))
    chosen = Path(given) if given else newest_sound_checkpoint(folder)
    if chosen is not None:
        check_fits(model, chosen)
    return chosen


def check_same_run(folder: RunFolder, resolved: Mapping[str, Any]) -> None:
    """Check that a configuration goes on with the run in a folder, if there is one.

    Raises:
        UserError: naming what differs.
    """
    if not folder.config.exists():
        return
    recorded = yaml.safe_load(folder.config.read_text(encoding="utf-8")) or {}
    differences = describe_differences(recorded, resolved)
    if differences and folder.newest_checkpoint() is not None:
        raise UserError(
            f"run_dir ({folder.path}) holds another run: {'; '.join(differences[:3])}; "
            "choose another run_dir, or use its settings"
        )


def schedule_change(
    folder: RunFolder, resolved: Mapping[str, Any], optim: OptimConfig, start: Path | None
) -> str:
    """Say what another ``trainer.max_steps`` does to the learning rate of a run; empty if nothing.

    Args:
        folder: of the run, with its configuration so far.
        resolved: settings now.
        optim: those of the optimizer.
        start: checkpoint the run goes on from.

    Raises:
        UserError: as ``describe_schedule_change``.
    """
    step, steps_now = steps_behind(folder, start), resolved["trainer"]["max_steps"]
    if step >= steps_now or (start is not None and not step):
        return ""  # complete, or a checkpoint of another run
    before, steps_before = optim if step else replace(optim, schedule_start_step=0), steps_now
    if step and folder.config.is_file():
        recorded = dict(flatten(yaml.safe_load(folder.config.read_text(encoding="utf-8"))))
        steps_before = recorded.get("trainer.max_steps", steps_now)
        begun = recorded.get("model.optim.schedule_start_step", 0)
        before = replace(optim, schedule_start_step=begun)
    return describe_schedule_change(before, steps_before, optim, steps_now, step)


def recorded_pictures(folder: RunFolder) -> dict[str, Any]:
    """Return what the run in a folder does with pictures, by setting; nothing without a run.

    A run of before there was a choice goes on as it began.
    """
    if folder.newest_checkpoint() is None:
        return {}
    try:
        data = yaml.safe_load(folder.config.read_text(encoding="utf-8"))["data"]
        return {name: data.get(name, old) for name, old in BEFORE_THE_SETTINGS.items()}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}  # whoever needs the file says what is wrong with it


def check_fits(model: torch.nn.Module, path: Path) -> None:
    """Check names and shapes of a checkpoint against a model, reading no weights.

    Raises:
        UserError: if it cannot be read or belongs to another model; names the first differences.
    """
    loaded = read_shapes(path)
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    problems = [f"missing {key}" for key in wanted if key not in loaded]
    problems += [f"unexpected {key}" for key in loaded if key not in wanted]
    problems += [
        f"{key} is {tuple(loaded[key])} instead of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in loaded and loaded[key] != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"checkpoint ({path}) belongs to another model: {'; '.join(problems[:3])}{more}; use "
            "the model it was made with, or another run_dir"
        )


def steps_behind(folder: RunFolder, start: Path | None) -> int:
    """Optimizer steps this run has behind it at a checkpoint; 0 at none, or at one of another."""
    steps = folder.steps_with_checkpoint()
    return next((step for step in steps if folder.checkpoint(step) == start), 0)


def owes_evaluation(folder: RunFolder, step: int, val_check_interval: float | None) -> bool:
    """Whether a run ended between the checkpoint of a step and the evaluation due there."""
    if not step or not isinstance(val_check_interval, int) or step % val_check_interval:
        return False
    return evaluated_step(folder) < step


def evaluated_step(folder: RunFolder) -> int:
    """Step of the newest evaluation of a run; -1 if there is none."""
    try:
        record = json.loads((folder.evaluation / "metrics.json").read_text(encoding="utf-8"))
        return int(record["step"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return -1
