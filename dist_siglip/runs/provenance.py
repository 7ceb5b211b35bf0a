"""Command, code and versions that made a run."""

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dist_siglip.system.redaction import redact

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


def collect_provenance(arguments: Sequence[str], *, world_size: int) -> dict[str, Any]:
    """Describe this start of a run in plain JSON values.

    Args:
        arguments: the command line, program first.
        world_size: ranks of this start.

    Returns:
        time, command (without the secrets of URLs), commit (None outside a checkout; "+" after it
        means changed files), python, platform, host, world_size, versions.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(redact(argument) for argument in arguments),
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
