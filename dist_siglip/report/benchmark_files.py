"""Read the results of benchmarks that a run folder holds."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

_MOST_BYTES = 16_000_000


@dataclass(frozen=True)
class BenchmarkFile:
    """One result, as CLIP_benchmark writes them.

    Attributes:
        dataset: what was measured on.
        task: what was asked, such as "zeroshot_retrieval".
        metrics: name to number, finite ones only.
    """

    dataset: str
    task: str
    metrics: dict[str, float]


def read_benchmarks(folder: Path, notes: list[str]) -> list[BenchmarkFile]:
    """Read every JSON file of a folder, by name; those that are no result are named in ``notes``.

    Args:
        folder: RUN/benchmarks; nothing is found where it does not exist.
        notes: gets a sentence for each file that cannot be used.
    """
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        result = _read(path)
        if result is None:
            notes.append(f"benchmarks/{path.name} cannot be used.")
        else:
            found.append(result)
    return found


def _read(path: Path) -> BenchmarkFile | None:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    metrics = content.get("metrics") if isinstance(content, dict) else None
    if not isinstance(metrics, dict):
        return None
    return BenchmarkFile(
        dataset=str(content.get("dataset", path.stem)),
        task=str(content.get("task", "")),
        metrics={
            str(name): float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
        },
    )
