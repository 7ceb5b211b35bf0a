"""The checkpoint that a command starts from, its run, and whether it fits the model."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.distributed_c10d import PrefixStore

from dist_siglip.cli.run.from_run import Origin, checkpoint_of
from dist_siglip.data.samples.picture_policy import AUTO, BEFORE_THE_SETTINGS
from dist_siglip.distributed import is_first_process, resolve_group
from dist_siglip.distributed.store_channel import StoreChannel
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder, check_sound, describe_differences, newest_sound_checkpoint
from dist_siglip.runs.checkpoints.io import read_shapes
from dist_siglip.runs.checkpoints.selection import note_sound
from dist_siglip.runs.provenance import flatten
from dist_siglip.system.best_effort import best_effort
from dist_siglip.system.regular_file import read_json, read_regular
from dist_siglip.system.yaml_text import MOST_BYTES, load_yaml
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module.objectives import refuse_other_heads
from dist_siglip.training.optim import OptimConfig, describe_schedule_change

logger = logging.getLogger(__name__)

_FOUND = "DIST_SIGLIP_START"  # "pid text", for processes that Lightning starts
_LIMIT_SECONDS = 3600.0  # for a checkpoint to be read once
_occasions = count()


def folder_to_run_in(run_dir: str, configs: Sequence[Path], *, is_given: bool) -> str:
    """Return the run folder that a start means: that of its configuration, if this is a run's own.

    A copied or moved run folder holds a configuration that names the folder it was made in.

    Args:
        run_dir: as the options and configurations say together.
        configs: configurations that were named, in order.
        is_given: whether ``run_dir`` was named on the command line.

    Raises:
        UserError: if a folder was named on the command line, and a run's own configuration that
            stands after it names another one.
    """
    for config in reversed(configs):
        folder = config.parent
        if not _is_of_run(config, run_dir) or folder.resolve() == Path(run_dir).resolve():
            continue
        if is_given:
            raise UserError(
                f"run_dir ({run_dir}) stands in {config}, which is of the run in {folder}; name "
                "--run_dir after --config"
            )
        _warn_once(
            f"run_dir is {folder}, the folder of the configuration; it says {run_dir}, where the "
            "run was made"
        )
        return str(folder)
    return run_dir


def _is_of_run(config: Path, run_dir: str) -> bool:
    """Whether a configuration is what a run has written down, with this ``run_dir`` in it."""
    folder = RunFolder(config.parent)
    if config.name != folder.config.name or not (
        folder.provenance.is_file() or folder.metrics.is_file() or folder.checkpoints.is_dir()
    ):
        return False
    recorded: Any = None
    with suppress(OSError, ValueError, yaml.YAMLError):
        recorded = _read_settings(folder)
    return isinstance(recorded, Mapping) and recorded.get("run_dir") == run_dir


def checkpoint_to_start_from(
    folder: RunFolder, given: str | None, model: torch.nn.Module, from_run: str | None = None
) -> Path | None:
    """Return the newest sound checkpoint of the run, else the one given; it fits the model.

    Args:
        folder: of the run.
        given: a checkpoint of the same model; None: none.
        model: of the run.
        from_run: of another run, see ``checkpoint_of``, where the run has none of its own yet.

    Raises:
        UserError: as ``check_fits``; if one is given and is damaged, or the run has its own; if
            all of the run are damaged.
    """
    if given is not None and from_run is not None:
        raise UserError(
            f"ckpt_path ({given}) and from_run ({from_run}) both name a start; leave one out"
        )
    newest = newest_sound_checkpoint(folder)
    if from_run is not None and newest is None:
        return checkpoint_of(from_run, folder, model)
    if given is not None and newest is not None:
        raise UserError(
            f"ckpt_path ({given}) is given but run_dir ({folder.path}) has its own "
            f"{newest.name}; leave ckpt_path out to go on, or choose another run_dir"
        )
    if given is not None:
        check_sound(Path(given))
        note_sound(Path(given))
    chosen = newest if given is None else Path(given)
    if chosen is not None:
        check_fits(model, chosen)
    return chosen


def checkpoint_to_look_at(
    folder: RunFolder, given: str | None, model: torch.nn.Module
) -> Path | None:
    """Return the checkpoint given, else the newest sound one, if any; it fits the model.

    Raises:
        UserError: as ``check_fits``, or if the one given or all of the run are damaged.
    """
    if given:
        check_sound(Path(given))
        note_sound(Path(given))
    chosen = Path(given) if given else newest_sound_checkpoint(folder)
    if chosen is not None:
        check_fits(model, chosen)
    return chosen


def once_per_node(
    trainer: Trainer, model: LightningModule, choose: Callable[[], Path | None]
) -> Path | None:
    """Choose a checkpoint on the first rank of each node alone: it reads every byte of it.

    Distributed contract: every rank calls it, equally often.

    Args:
        trainer: of the run.
        model: that it trains.
        choose: returns a sound checkpoint, or None.

    Raises:
        UserError: what ``choose`` raised, on every rank of the node.
        RuntimeError: if the first rank of the node failed otherwise or never answered.
    """
    found, is_own = _once(trainer, model, "verify a checkpoint", lambda: str(choose() or ""))
    if is_own:
        return Path(found) if found else None
    return _noted(found)


def check_data_once_per_node(
    trainer: Trainer, model: LightningModule, datamodule: ImageTextDataModule
) -> None:
    """Check the data, looking at the shards on the first rank of each node alone.

    The others map the tables that it has made. Distributed contract: as ``once_per_node``.

    Raises:
        UserError: as ``ImageTextDataModule.check``, on every rank of the node.
        RuntimeError: if the first rank of the node failed otherwise or never answered.
    """
    world_size = trainer.num_nodes * trainer.num_devices

    def check() -> str:
        datamodule.check(world_size)
        return json.dumps(datamodule.tables.files())

    found, is_own = _once(trainer, model, "check the shards", check)
    if not is_own:
        datamodule.tables.take_over(json.loads(found))
        datamodule.check(world_size)


def _once(
    trainer: Trainer, model: LightningModule, what: str, work: Callable[[], str]
) -> tuple[str, bool]:
    """Do something on the first rank of each node; return what came of it, and whether it is own.

    Processes that Lightning starts hear by their environment, those of torchrun or srun by the
    store that brings the ranks together.
    """
    if trainer.num_devices == 1:
        return work(), True
    variable = f"{_FOUND}_{what.split()[-1].upper()}"
    parent, _, handed = os.environ.get(variable, "").partition(" ")
    if trainer.local_rank and parent == str(os.getppid()):
        return handed, False
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or not environment.creates_processes_externally:
        found = work()
        os.environ[variable] = f"{os.getpid()} {found}"
        return found, True
    trainer.strategy.connect(model)
    trainer.strategy.setup_environment()
    group = resolve_group(None)
    if group is None:
        return work(), True
    # A connection of its own, as for the comparison of starts.
    name = f"{variable}-{next(_occasions)}-node-{trainer.node_rank}"
    store = PrefixStore(name, group.get_group_store().clone())
    channel = StoreChannel(store, trainer.local_rank, trainer.num_devices)
    if trainer.local_rank:
        return _hear(channel, trainer.global_rank, what), False
    try:
        found = work()
    except Exception as error:
        kind = "refused" if isinstance(error, UserError) else "failed"
        channel.broadcast("choice", {kind: str(error)})
        channel.leave(trainer.num_devices)
        raise
    channel.broadcast("choice", {"found": found})
    return found, True


def _hear(channel: StoreChannel, global_rank: int, what: str) -> str:
    """What the first rank of the node has found."""
    answer: dict[str, str] | None = channel.receive("choice", _LIMIT_SECONDS)
    if answer is None:
        raise RuntimeError(
            f"rank {global_rank} waited for the first rank of its node to {what}, and it did not "
            "answer; look at its log"
        )
    channel.leave(channel.world_size)
    if "refused" in answer:
        raise UserError(answer["refused"])
    if "failed" in answer:
        raise RuntimeError(f"the first rank of the node did not {what}: {answer['failed']}")
    return answer["found"]


def _noted(found: str) -> Path | None:
    """Take over a checkpoint that another rank of the node has verified."""
    if not found:
        return None
    note_sound(Path(found))
    return Path(found)


def check_same_run(folder: RunFolder, resolved: Mapping[str, Any]) -> None:
    """Check that a configuration goes on with the run in a folder, if there is one."""
    recorded = _recorded_settings(folder)
    differences = describe_differences(recorded, resolved)
    if differences and folder.newest_checkpoint() is not None:
        raise UserError(
            f"run_dir ({folder.path}) holds another run: {'; '.join(differences[:3])}; "
            "choose another run_dir, or use its settings"
        )


def schedule_change(
    folder: RunFolder,
    resolved: Mapping[str, Any],
    optim: OptimConfig,
    start: Path | None,
    origin: Origin | None = None,
) -> str:
    """Say what another ``trainer.max_steps`` does to the learning rate of a run; empty if nothing.

    Args:
        folder: of the run.
        resolved: its settings.
        optim: likewise.
        start: checkpoint that it goes on from.
        origin: what that is, if it is of another run by ``from_run``.

    Raises:
        UserError: as ``describe_schedule_change``.
    """
    step, max_steps = steps_behind(folder, start), resolved["trainer"]["max_steps"]
    if origin is not None:
        step = origin.step
    if step >= max_steps or (start is not None and not step):
        return ""  # complete, or a checkpoint of another run
    steps_now = optim.total_steps(max_steps)
    before, steps_before = optim if step else replace(optim, schedule_start_step=0), steps_now
    settings: Mapping[str, Any] = {}
    if step:
        settings = _recorded_settings(folder) if origin is None else origin.settings
    if settings:
        recorded = dict(flatten(settings))
        steps_before = recorded.get("trainer.max_steps", steps_now)
        steps_before = recorded.get("model.optim.schedule_steps") or steps_before
        begun = recorded.get("model.optim.schedule_start_step", 0)
        before = replace(optim, schedule_start_step=begun)
    return describe_schedule_change(before, steps_before, optim, steps_now, step)


def keep_pictures(data: Any, folder: RunFolder) -> None:
    """Let settings that leave pictures open see them as the run in a folder does, if there is one.

    A run of before there was a choice goes on as it began.
    """
    if folder.newest_checkpoint() is None:
        return
    try:
        recorded = yaml.safe_load(folder.config.read_text(encoding="utf-8"))["data"]
        found = {name: recorded.get(name, old) for name, old in BEFORE_THE_SETTINGS.items()}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return  # whoever needs the file says what is wrong with it
    for name, value in found.items():
        if data[name] == AUTO:
            data[name] = value


def recorded_precision(folder: RunFolder) -> str | None:
    """Precision of the run in a folder, which null means 32-true in; None if there is no run."""
    if folder.newest_checkpoint() is None:
        return None
    trainer = _recorded_settings(folder).get("trainer") or {}
    return str(trainer.get("precision") or "32-true")


def set_aside_unreadable(folder: RunFolder) -> None:
    """Keep a configuration that cannot be read under another name: it is written anew."""
    if _problem_of_settings(folder) is not None:
        aside = folder.config.with_name(f"{folder.config.name}.unreadable")
        with best_effort(str(aside)):
            folder.config.rename(aside)


def _recorded_settings(folder: RunFolder) -> Mapping[str, Any]:
    """Return the configuration of the run in a folder; nothing if it cannot be read."""
    problem = _problem_of_settings(folder)
    if problem is not None:
        _warn_once(
            f"{folder.config} cannot be read ({problem}): it is set aside and written anew, and "
            "nothing is compared with what it said"
        )
        return {}
    return _read_settings(folder) if folder.config.exists() else {}


def _problem_of_settings(folder: RunFolder) -> str | None:
    """Say why the configuration of a run cannot be read; None if it can, or is not there."""
    try:
        recorded = _read_settings(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        return _reason(error)
    return None if isinstance(recorded, Mapping) else "it holds no settings"


def _read_settings(folder: RunFolder) -> Any:
    return load_yaml(read_regular(folder.config, MOST_BYTES).decode())


@cache
def _warn_once(text: str) -> None:
    """Warn on the first rank, however often it is found out."""
    if is_first_process():
        logger.warning("%s", text)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:160]


def check_fits(model: torch.nn.Module, path: Path) -> None:
    """Check names and shapes of a checkpoint against a model, reading no weights.

    Raises:
        UserError: if it cannot be read or belongs to another model; names the first differences.
    """
    loaded = read_shapes(path)
    refuse_other_heads(model, loaded, path)
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


def describe_interrupt(folder: RunFolder, step: int) -> str:
    """Say where a run was interrupted and what there is to go on from, as the end of a sentence."""
    newest = folder.newest_checkpoint()
    return (
        f" at step {step}, last checkpoint {newest or 'none'}; "
        f"start again to {'go on' if newest else 'begin anew'}"
    )


def owes_evaluation(folder: RunFolder, step: int, val_check_interval: float | None) -> bool:
    """Whether a run ended between the checkpoint of a step and the evaluation due there."""
    if not step or not isinstance(val_check_interval, int) or step % val_check_interval:
        return False
    return evaluated_step(folder) < step


def evaluated_step(folder: RunFolder) -> int:
    """Step of the newest evaluation of a run; -1 if there is none that can be read."""
    path = folder.evaluation / "metrics.json"
    try:
        return int(read_json(path)["step"])
    except FileNotFoundError:
        return -1
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        _warn_once(f"{path} cannot be read ({_reason(error)}): it counts as missing")
        return -1
