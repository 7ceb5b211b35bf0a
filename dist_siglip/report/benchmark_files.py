"""Read the results of benchmarks that a run folder holds."""

import math
from dataclasses import dataclass
from pathlib import Path

from dist_siglip.report.damage import number_of, printable
from dist_siglip.system.regular_file import read_json

_MOST_BYTES = 16_000_000
_MOST_FILES = 500


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
    for path in sorted(folder.glob("*.json"))[:_MOST_FILES] if folder.is_dir() else ():
        result = _read(path)
        if result is None:
            notes.append(f"benchmarks/{printable(path.name)} cannot be used.")
        else:
            found.append(result)
    return found


def _read(path: Path) -> BenchmarkFile | None:
    try:
        content = read_json(path, _MOST_BYTES)
    except (OSError, ValueError):
        return None
    metrics = content.get("metrics") if isinstance(content, dict) else None
    if not isinstance(metrics, dict):
        return None
    found = ((printable(name), number_of(value)) for name, value in metrics.items())
    return BenchmarkFile(
        dataset=printable(str(content.get("dataset", path.stem))),
        task=printable(str(content.get("task", ""))),
        metrics={name: n for name, n in found if n is not None and math.isfinite(n)},
    )
