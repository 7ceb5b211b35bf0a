"""Identity of a run, and the command, code and versions that made it.

Model, loss, data, order and optimizer make a run: they must stay for a configuration to go on with
it. How fast or how long it runs, on how many ranks, and what it writes, may change from one start
to the next.
"""

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dist_siglip.system.moved import new_path
from dist_siglip.system.redaction import redact_arguments

_PACKAGES = (
    "dist-siglip",
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "webdataset",
    "torchmetrics",
    "numpy",
    "pillow",
)
# Groups of the configuration that make a run what it is.
IDENTITY_KEYS = ("seed_everything", "from_run", "model", "data")
# ... except what only changes speed or place.
FREE_KEYS = frozenset(
    {
        "model.compile_towers",
        "model.gradient_checkpointing",
        "model.micro_batch_size",
        "model.micro_batch_patches",
        "model.calibration_pairs",  # only of a new run
        "model.optim.schedule_start_step",  # with max_steps; a jump of the rate is refused
        "model.optim.schedule_steps",  # likewise
        "model.optim.accept_rate_jump",
        "data.train_shards",  # the fingerprint in the checkpoint watches their content
        "data.train_sources",  # so it does theirs; their weights are in the checkpoint too
        "data.val_shards",
        "data.val_local_batch_size",
        "data.workers_per_rank",
        "data.prefetch_factor",
        "data.max_bad_fraction",
        "data.accept_changed_data",
        "data.on_damage",  # the fingerprint watches what is left
        "data.bad_sample_log",
        "data.train_features",  # those of the locked tower, or refused
        "data.cache.folder",
        "data.cache.max_gib",
        "data.cache.attempts",
        "data.cache.patience_seconds",
        "data.cache.recheck_hours",
    }
)


def collect_provenance(arguments: Sequence[str], *, world_size: int) -> dict[str, Any]:
    """Describe this start of a run in plain JSON values.

    Args:
        arguments: the command line, program first.
        world_size: ranks of this start.

    Returns:
        time, command (without secrets), commit (None outside a checkout; "+" after it
        means changed files), python, platform, host, world_size, versions.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(redact_arguments(arguments)),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "world_size": world_size,
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str | None]:
    """Version of this package and of those it stands on, by name; None for one that is not there.

    Example:
        >>> "torch" in installed_versions()
        True
    """
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package lies in, if it lies in one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}+" if _git(folder, "status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    answer = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=5,
    )
    return answer.stdout.strip()


def describe_differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List what makes ``current`` another run than the one ``recorded``.

    Keys that only one side has are ignored: a newer version may have more settings.

    Returns:
        Lines such as ``data.seed (0 in the folder, 1 now)``; empty for the same run.

    Example:
        >>> describe_differences({"data": {"seed": 0}}, {"data": {"seed": 1}})
        ['data.seed (0 in the folder, 1 now)']
        >>> describe_differences({"trainer": {"max_steps": 1}}, {"trainer": {"max_steps": 2}})
        []
    """
    from dist_siglip.data.samples.picture_policy import BEFORE_THE_SETTINGS  # heavy

    before = dict(flatten({key: recorded.get(key) for key in IDENTITY_KEYS if key in recorded}))
    if "data" in recorded:  # what runs of before did is known
        before = {f"data.{key}": old for key, old in BEFORE_THE_SETTINGS.items()} | before
    after = dict(flatten({key: current.get(key) for key in IDENTITY_KEYS if key in current}))
    return [
        f"{key} ({before[key]!r} in the folder, {after[key]!r} now)"
        for key in before
        if key in after and key not in FREE_KEYS and not _is_same(key, before[key], after[key])
    ]


def _is_same(key: str, before: Any, after: Any) -> bool:
    """Whether a setting is unchanged; a class of ours may be named by any of its paths."""
    if before == after:
        return True
    paths = [new_path(str(path)) for path in (before, after)]
    is_ours = key.endswith(".class_path") and all(p.startswith("dist_siglip.") for p in paths)
    return is_ours and len({path.rpartition(".")[2] for path in paths}) == 1


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Go through the leaves of nested settings, with the path of each.

    Example:
        >>> list(flatten({"data": {"seed": 0}, "run_dir": "a"}))
        [('data.seed', 0), ('run_dir', 'a')]
    """
    if not isinstance(tree, Mapping):
        yield prefix, list(tree) if isinstance(tree, tuple) else tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
