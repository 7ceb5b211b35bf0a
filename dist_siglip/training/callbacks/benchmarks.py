"""Benchmarks beside the validations of ``fit``, and in ``test``.

Each leaves RUN/benchmarks/NAME.json as CLIP_benchmark writes it, so that ``clip_benchmark build
RUN/benchmarks/*.json`` makes one table of them and of its own. What has no place there, such as the
confusion matrix, goes into details/NAME.json.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.evaluation import EvaluatedModel
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, check_benchmarks
from dist_siglip.health.callback import Watchdog
from dist_siglip.models import DualEncoder
from dist_siglip.runs import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.best_effort import best_effort

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


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
    has them, and the step; FOLDER/parts/NAME.PART.json the same of each part. A number that is not
    finite is the string "nan", "inf" or "-inf", so that the file is JSON.

    Args:
        folder: of the results of a run.
        benchmark: what was evaluated.
        result: what it found.
        model: name of the architecture.
        pretrained: name of the weights.
        step: optimizer steps behind them; 0 for a model that no run trained.
    """

    def write(path: Path, dataset: str, metrics: dict[str, float], language: str) -> None:
        content: dict[str, Any] = {
            "dataset": dataset,
            "model": model,
            "pretrained": pretrained,
            "task": benchmark.task,
            "metrics": plain(metrics),
            "language": language,
            "step": step,
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    for part, metrics in result.parts.items():
        path = folder / "parts" / f"{benchmark.name}.{part}.json"
        if benchmark.parts_are_languages:
            write(path, benchmark.dataset, metrics, part)
        else:
            write(path, f"{benchmark.dataset}/{part}", metrics, "en")
    of_all = "mean" if benchmark.parts_are_languages else "en"
    write(folder / f"{benchmark.name}.json", benchmark.dataset, result.metrics, of_all)
    details = json.dumps(result.details, allow_nan=False) + "\n"
    write_atomically(folder / "details" / f"{benchmark.name}.json", details)


def plain(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Write numbers that JSON has no word for as "nan", "inf" or "-inf"."""
    return {name: n if math.isfinite(n) else str(n) for name, n in metrics.items()}


_SHOWN = 4  # metrics of a benchmark in its log line


class Benchmarks(Callback):
    """Runs benchmarks beside the validations of ``fit``, and in ``test``.

    A metric is logged as ``benchmarks/NAME/METRIC``. Without tasks nothing is done.

    Args:
        tasks: benchmarks, by class path. Null: none.
        every_steps: run them at validations whose step is a multiple of this; a multiple of
            trainer.val_check_interval, then. Null: at every one. The validation that ends a run
            always has them.

    Attributes:
        results: of the last time, by name.
        weights_name: what the weights are called before the first step; None if nobody says.

    Raises:
        UserError: if every_steps is out of range.
    """

    def __init__(
        self, tasks: list[Benchmark] | None = None, every_steps: int | None = None
    ) -> None:
        if every_steps is not None and every_steps < 1:
            raise UserError(f"benchmarks.every_steps ({every_steps}) must be at least 1")
        self.tasks = tasks or []
        self.every_steps = every_steps
        self.results: dict[str, BenchmarkResult] = {}
        self.weights_name: str | None = None

    def check(self, towers: DualEncoder | None = None) -> None:
        """Find what is wrong with the benchmarks before anything starts.

        Args:
            towers: of the model, if it is there to be looked at.

        Raises:
            UserError: as ``check_benchmarks``, or the model lacks what one of them needs.
        """
        check_benchmarks(self.tasks)
        if towers is not None:
            for task in self.tasks:
                task.check_towers(towers)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the results of the last time."""
        self.results = {}

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate with the weights of the validation.

        A weight average is in place only between the hooks at the start and the end of the epoch.
        """
        if batch_idx == 0 and self._is_due(trainer, pl_module):
            self._evaluate(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was found."""
        values = {
            f"benchmarks/{name}/{metric}": value
            for name, result in self.results.items()
            for metric, value in result.metrics.items()
        }
        if not trainer.sanity_checking:
            pl_module.log_dict(values, sync_dist=False, rank_zero_only=False)
        elif values and trainer.is_global_zero:  # Lightning logs nothing of a sanity check
            for each in trainer.loggers:
                each.log_metrics(values, step=0)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the model that is tested."""
        self._evaluate(trainer, pl_module)

    def _is_due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        if trainer.sanity_checking:  # a whole one is the evaluation before the first step
            return trainer.num_sanity_val_steps == math.inf
        is_last = trainer.state.fn != "fit"
        return is_last or self.every_steps is None or _steps(pl_module) % self.every_steps == 0

    def _evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        """Run all benchmarks on all ranks; the first rank writes and says what they found."""
        if not self.tasks:
            return
        model = _watched(_evaluated(trainer, pl_module), trainer)
        folder = RunFolder(Path(trainer.default_root_dir))
        for task in self.tasks:
            result = self.results[task.name] = task.evaluate(model)
            if not trainer.is_global_zero:
                continue
            shown = list(result.metrics.items())[:_SHOWN]
            text = ", ".join(f"{name} {value:.4g}" for name, value in shown)
            logger.info("benchmark %s: %s", task.name, text)
            with best_effort(f"the result of benchmark {task.name}"):
                write_result(
                    folder.benchmarks,
                    task,
                    result,
                    model=str(getattr(pl_module.built.tokenizer, "name", "")),
                    pretrained=self._name_weights(folder, pl_module),
                    step=_steps(pl_module),
                )

    def _name_weights(self, folder: RunFolder, pl_module: Any) -> str:
        if _steps(pl_module):
            return f"{folder.path.resolve().name} step={_steps(pl_module)}"
        return self.weights_name or ("pretrained" if pl_module.built.weights_loaded else "random")


def _steps(pl_module: Any) -> int:
    return int(pl_module.steps_done)


def _evaluated(trainer: Trainer, pl_module: Any) -> EvaluatedModel:
    """Wrap the towers as they are, in the precision of the trainer."""
    scale, bias = (value.item() for value in pl_module.logits())
    return EvaluatedModel.of(
        pl_module.towers,
        pl_module.inputs,
        logit_scale=scale,
        logit_bias=bias,
        device=pl_module.device,
        precision=trainer.precision_plugin.forward_context,
    )


def _watched(model: EvaluatedModel, trainer: Trainer) -> EvaluatedModel:
    """Let every batch tell the watchdog that the evaluation gets on: it may take hours."""
    watchdogs = [each for each in getattr(trainer, "callbacks", ()) if isinstance(each, Watchdog)]

    def tell() -> None:
        for each in watchdogs:
            each.note_evaluation(trainer)

    def watched(encode: Callable[[Tensor], _T]) -> Callable[[Tensor], _T]:
        def encode_and_tell(rows: Tensor) -> _T:
            tell()
            return encode(rows)

        return encode_and_tell

    assert model.encode_patches is not None
    return model._replace(
        encode_image=watched(model.encode_image),
        encode_text=watched(model.encode_text),
        encode_patches=watched(model.encode_patches),
        note_progress=tell,
    )
