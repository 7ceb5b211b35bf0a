"""How are results written so that they stand beside published ones? As CLIP_benchmark writes them.

``clip_benchmark build RUN/benchmarks/*.json`` makes one table of them and of its own. What has no
place there, such as the confusion matrix, goes into a second file, in a folder ``build`` does not
look into.
"""

import json
import math
from pathlib import Path
from typing import Any

from dist_siglip.benchmarks.benchmark import Benchmark, BenchmarkResult
from dist_siglip.system.atomic import write_atomically


def write_result(
    folder: Path,
    benchmark: Benchmark,
    result: BenchmarkResult,
    *,
    model: str,
    pretrained: str,
    step: int,
) -> None:
    """Write FOLDER/NAME.json and FOLDER/details/NAME.json, each in one piece.

    The first holds dataset, model, pretrained, task, metrics and language, as CLIP_benchmark 1.6
    has them, and the step. A number that is not finite is the string "nan", "inf" or "-inf", so
    that the file is JSON.

    Args:
        folder: of the results of a run.
        benchmark: what was evaluated.
        result: what it found.
        model: name of the architecture.
        pretrained: name of the weights.
        step: optimizer steps behind them; 0 for a model that no run trained.
    """
    content: dict[str, Any] = {
        "dataset": benchmark.name,
        "model": model,
        "pretrained": pretrained,
        "task": benchmark.task,
        "metrics": {
            name: value if math.isfinite(value) else str(value)
            for name, value in result.metrics.items()
        },
        "language": "en",
        "step": step,
    }
    write_atomically(folder / f"{benchmark.name}.json", json.dumps(content, indent=1) + "\n")
    details = json.dumps(result.details, allow_nan=False) + "\n"
    write_atomically(folder / "details" / f"{benchmark.name}.json", details)
