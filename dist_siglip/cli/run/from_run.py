"""``from_run``: the checkpoint of another run that a new run goes on from.

Step, schedule, state of the optimizer and position in the data go on; the folder is a new one. All
that can be refused is refused before anything is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder, check_sound, describe_differences, newest_sound_checkpoint
from dist_siglip.runs.checkpoints.io import read_shapes, read_values
from dist_siglip.runs.checkpoints.selection import note_sound
from dist_siglip.runs.provenance import flatten
from dist_siglip.system.regular_file import read_regular
from dist_siglip.system.yaml_text import MOST_BYTES, load_yaml
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module.from_run import compare
from dist_siglip.training.optim import OptimConfig, how_to_go_on

_OPTIMIZERS = ("model.optim.optimizer", "model.optim.fallback_optimizer")


def split(text: str) -> tuple[RunFolder, str]:
    """Return the folder that ``from_run`` names, and which checkpoint: "" is the newest.

    Example:
        >>> folder, which = split("runs/a:500")
        >>> folder.path.as_posix(), which
        ('runs/a', '500')
        >>> split("runs/a/checkpoints/step=00000500.ckpt")[1]
        'step=00000500.ckpt'
    """
    path = Path(text)
    if path.suffix == ".ckpt" and path.parent.name == RunFolder(Path()).checkpoints.name:
        return RunFolder(path.parent.parent), path.name
    before, colon, which = text.rpartition(":")
    if not colon or path.is_dir():
        return RunFolder(path), ""
    return RunFolder(Path(before)), which


def folder_of_settings(folder: RunFolder, from_run: str | None) -> RunFolder:
    """Return the folder whose settings a start goes on with where its own leave them open."""
    if from_run is None or folder.newest_checkpoint() is not None:
        return folder
    return split(from_run)[0]


def checkpoint_of(text: str, folder: RunFolder, model: nn.Module) -> Path:
    """Return the sound checkpoint that ``from_run`` names; it fits the model.

    Args:
        text: FOLDER, FOLDER:STEP, FOLDER:NAME or the path of a checkpoint in a run folder.
        folder: of the run that is to begin.
        model: of that run.

    Raises:
        UserError: if there is none, it is damaged, of this folder or of another architecture.
    """
    source, which = split(text)
    if not source.path.is_dir():
        raise UserError(f"from_run ({text}) is no folder of a run; name one that fit wrote")
    if source.path.resolve() == folder.path.resolve():
        raise UserError(
            f"from_run ({text}) is run_dir itself; leave it out to go on there, or choose another "
            "run_dir"
        )
    if which:
        chosen: Path | None = next(
            (
                source.checkpoint(step)
                for step in source.steps_with_checkpoint()
                if which in (str(step), source.checkpoint(step).name)
            ),
            None,
        )
        if chosen is not None:
            check_sound(chosen)
            note_sound(chosen)
    else:
        chosen = newest_sound_checkpoint(source, "from_run")
    if chosen is None:
        steps = ", ".join(map(str, source.steps_with_checkpoint())) or "none"
        raise UserError(f"from_run ({text}) has no such checkpoint; its steps are {steps}")
    compare(model, read_shapes(chosen), chosen)
    return chosen


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from.

    Attributes:
        folder: of the other run.
        path: of the checkpoint.
        step: optimizer steps behind it.
        settings: of the other run.
        lineage: runs behind this one, earliest first, the other one the last.
        differences: what of the model is not as in the checkpoint, in words.
    """

    folder: RunFolder
    path: Path
    step: int
    settings: Mapping[str, Any]
    lineage: list[dict[str, Any]]
    differences: str

    def describe(self, resolved: Mapping[str, Any]) -> str:
        """Say where the run begins, and which settings are others."""
        changed = describe_differences(self.settings, resolved)
        names = [line.partition(" (")[0] for line in changed if not line.startswith("from_run")]
        parts = [f"going on from step {self.step} of {self.folder.path}", self.differences]
        parts.append(f"other settings: {', '.join(names)}" if names else "")
        return "; ".join(filter(None, parts))


def read_origin(
    path: Path,
    model: nn.Module,
    data: ImageTextDataModule,
    optim: OptimConfig,
    resolved: Mapping[str, Any],
) -> Origin:
    """Read what a checkpoint of another run says beside its weights, and check that it goes on.

    Args:
        path: as ``checkpoint_of`` returned it.
        model: of the run that is to begin.
        data: likewise.
        optim: likewise.
        resolved: settings of that run.

    Raises:
        UserError: if no step is left, another optimizer has other states, or the data, their seed
            or the global batch are others.
    """
    folder = RunFolder(path.parent.parent)
    settings = _read_settings(folder)
    values = read_values(path)
    step, max_steps = int(values["global_step"]), int(resolved["trainer"]["max_steps"])
    if step >= max_steps:
        raise UserError(
            f"from_run ({path}) is at step {step} and trainer.max_steps ({max_steps}) counts from "
            f"the first step of the first run: none is left; {how_to_go_on(optim, step)}"
        )
    before, now = dict(flatten(settings)), dict(flatten(resolved))
    for name in _OPTIMIZERS:
        classes = [each.get(name, each.get(f"{name}.class_path")) for each in (before, now)]
        if classes[0] != classes[1]:
            raise UserError(
                f"{name} ({classes[1]}) was {classes[0]} in from_run ({folder.path}), whose state "
                "goes on; set it back, or take the weights alone as model.pretrained"
            )
    position = values.get(type(data).__qualname__)
    if position is not None:
        data.check_position(position, "set it back, or take the weights alone as model.pretrained")
    this = {"run": str(folder.path.resolve()), "checkpoint": path.name, "step": step}
    return Origin(
        folder=folder,
        path=path,
        step=step,
        settings=settings,
        lineage=[*values.get("lineage", []), this],
        differences=compare(model, read_shapes(path), path).describe(),
    )


def _read_settings(folder: RunFolder) -> Mapping[str, Any]:
    reason = "it holds no settings"
    try:
        content = load_yaml(read_regular(folder.config, MOST_BYTES).decode())
    except (OSError, ValueError) as error:
        content, reason = None, " ".join(str(error).split())[:120]
    if not isinstance(content, Mapping):
        raise UserError(
            f"from_run ({folder.path}) has no readable config.yaml ({reason}); name a folder that "
            "fit wrote"
        )
    return content
