"""``average``: one set of weights from several."""

import json as json_text
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from dist_siglip.cli.parser import CommandParser, call, introduction_of
from dist_siglip.cli.table import print_path
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS
from dist_siglip.data.samples.transforms import Preprocessing
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import EvaluatedModel
from dist_siglip.evaluation.encoding import choose_device
from dist_siglip.evaluation.shards import BenchmarkShards, LoadSettings
from dist_siglip.losses.calibration import calibrate_on_features
from dist_siglip.metrics import evaluate_pairs
from dist_siglip.models import BuiltModel, build_dual_encoder
from dist_siglip.models.averaging import Ingredient, average_weights, greedy_soup, write_weights
from dist_siglip.models.weights import load_towers, read_weights
from dist_siglip.training.module.trained import load_start, load_trained

Method = Literal["uniform", "greedy"]
MEAN_RECALL = "mean_recall@1"
_LOWER_IS_BETTER = ("loss", "median_rank", "modality_gap")


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``average`` and run it."""
    return call(average, parser(command), arguments)


def parser(command: str) -> CommandParser:
    """Return the parser of the options: words, then the signature of ``average``."""
    made = CommandParser(prog=f"dist-siglip {command}", description=introduction_of(average))
    # Words, not a JSON list: shells expand runs/*.
    made.add_argument(
        "sources",
        nargs="+",
        type=str,
        metavar="RUN_OR_WEIGHTS",
        help="Run folders, whose newest checkpoint counts, or weights files.",
    )
    made.add_function_arguments(average, as_group=False, skip={"sources"})
    return made


def average(
    sources: list[str],
    *,
    out: str,
    alpha: float | None = None,
    method: Method = "uniform",
    model: str | None = None,
    shards: str | list[str] | None = None,
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    metric: str = MEAN_RECALL,
    refit_for: int | None = None,
    device: str = "auto",
    local_batch_size: int = 256,
    workers: int = 2,
    image_extensions: tuple[str, ...] = PICTURE_EXTENSIONS,
    json: bool = False,
) -> int:
    """Average weights of one architecture into a safetensors file that model.pretrained takes.

    With alpha: between the weights a run started from and the run (WiSE-FT), or between two
    sources. Without: of all sources alike, or of those that raise a metric (soups). The scale is
    averaged in its logarithm.

    Args:
        sources: run folders, whose newest checkpoint counts, or weights files.
        out: file to write, like soup.safetensors; it must not exist.
        alpha: share of the run, or of the second source: 0 is the start, 1 the run.
        method: "uniform" takes all; "greedy" adds one after the other, best first, and keeps those
            that do not lower the metric.
        model: architecture of weights files, as model.model names it. Null: that of the first run.
        shards: pairs to measure on: for greedy, and for refit_for.
        captions: where captions are.
        metric: of an evaluation, like image_to_text_recall@1; the higher, the better, but for
            loss, median ranks and modality_gap. "mean_recall@1" is the mean of both directions.
        refit_for: global batch that scale and bias are fitted anew for, to the pairs of shards.
        device: "auto" takes a GPU, or the CPU; or cpu, cuda, cuda:1, ...
        local_batch_size: samples that are encoded together.
        workers: loader processes; 0 loads in the process itself.
        image_extensions: members that are the picture of a sample, in order of preference.
        json: print JSON instead of a table.
    """
    if Path(out).exists():
        raise UserError(f"out ({out}) exists; name another file")
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(f"alpha ({alpha}) must be from 0, the start, to 1, the run")
    if alpha is not None and (len(sources) > 2 or method != "uniform"):
        raise UserError(
            f"alpha ({alpha}) is between the start of a run and the run, or between two sources; "
            "leave it out for a soup"
        )
    if shards is None and (method == "greedy" or refit_for is not None):
        what = "method (greedy)" if method == "greedy" else f"refit_for ({refit_for})"
        raise UserError(f"{what} needs pairs to measure on: give --shards")
    if refit_for is not None and refit_for < 2:
        raise UserError(f"refit_for ({refit_for}) must be a global batch of at least 2 pairs")
    built, ingredients = _read(sources, alpha, model)
    measure = None
    if shards is not None:
        if built is None:
            raise UserError("model (null) must name the architecture of these weights to measure")
        loading = LoadSettings(
            local_batch_size=local_batch_size,
            workers_per_rank=workers,
            image_extensions=image_extensions,
        )
        pairs = BenchmarkShards(shards, captions, loading, name="average")
        measure = _Measure(built, pairs, metric, choose_device(device, 0))
    tried: list[tuple[str, float]] = []
    kept = [each.name for each in ingredients]
    if method == "greedy" and measure is not None:
        mixed, kept, tried = greedy_soup(ingredients, measure)
    elif alpha is not None:
        mixed = average_weights(ingredients, [1 - alpha, alpha])
    else:
        mixed = average_weights(ingredients, [1 / len(ingredients)] * len(ingredients))
    if measure is not None and method != "greedy":
        tried = [("average", measure(mixed))]
    if _is_lower_better(metric):
        tried = [(name, -value) for name, value in tried]
    if refit_for is not None and measure is not None:
        mixed = measure.refit(mixed, refit_for)
    write_weights(Path(out), mixed)
    facts: dict[str, Any] = {
        "out": out,
        "kept": kept,
        "logit_scale": mixed.logit_scale,
        "logit_bias": mixed.logit_bias,
        "tried": [{"name": name, metric: value} for name, value in tried],
    }
    if json:
        sys.stdout.write(json_text.dumps(facts, indent=2) + "\n")
        return 0
    if tried:
        table = Table("weights", metric)
        for name, value in tried:
            table.add_row(name, f"{value:.4f}")
        Console().print(table)
    sys.stdout.write(f"averaged {', '.join(kept)}\n")
    print_path("wrote", out)
    return 0


def _read(
    sources: list[str], alpha: float | None, model: str | None
) -> tuple[BuiltModel | None, list[Ingredient]]:
    """Read all sources; also the model of the first run, or the one that is named."""
    named = [(source, Path(source)) for source in sources]
    runs = [source for source, path in named if path.is_dir() and (path / "config.yaml").is_file()]
    built = None
    if model is not None:
        built = build_dual_encoder(model, with_weights=False)
    elif runs:
        built = load_trained(run_dir=runs[0])
    if alpha is not None and len(sources) == 1:
        if not runs:
            raise UserError(
                f"alpha ({alpha}) with one source needs the folder of a run, which says where it "
                "started; or name two weights files"
            )
        start = _of_model(load_start(runs[0]), f"start of {runs[0]}")
        return built, [start, _of_model(load_trained(run_dir=runs[0]), runs[0])]
    found = [
        _of_model(load_trained(run_dir=source), source) if source in runs else _of_file(path, built)
        for source, path in named
    ]
    if alpha is not None and len(found) != 2:
        raise UserError(f"alpha ({alpha}) needs two sources, or one run")
    return built, found


def _of_model(built: BuiltModel, name: str) -> Ingredient:
    state = built.encoder.clip.state_dict()
    tensors = {key: tensor.detach().clone() for key, tensor in state.items()}
    return Ingredient(name, tensors, built.start_scale, built.start_bias)


def _of_file(path: Path, built: BuiltModel | None) -> Ingredient:
    """Read a weights file; by the names of the network where there is one."""
    weights = read_weights(path)
    tensors = weights.towers
    if built is not None:
        load_towers(built.encoder.clip, weights, path)
        state = built.encoder.clip.state_dict()
        tensors = {key: tensor.detach().clone() for key, tensor in state.items()}
    return Ingredient(str(path), tensors, weights.logit_scale, weights.logit_bias)


def _is_lower_better(metric: str) -> bool:
    return metric.endswith(_LOWER_IS_BETTER)


class _Measure:
    """Metric of weights on pairs; the higher, the better."""

    def __init__(
        self, built: BuiltModel, pairs: BenchmarkShards, metric: str, device: torch.device
    ) -> None:
        pairs.check()
        self._built, self._pairs, self._metric, self._device = built, pairs, metric, device

    def _encode(self, weights: Ingredient) -> Any:
        self._built.encoder.clip.load_state_dict(weights.tensors)
        model = EvaluatedModel.of(
            self._built.encoder.to(self._device).eval(),
            Preprocessing.of(self._built),
            logit_scale=weights.logit_scale or 1.0,
            logit_bias=weights.logit_bias or 0.0,
            device=self._device,
        )
        return self._pairs.encode(model, encoded_texts=1)

    def __call__(self, weights: Ingredient) -> float:
        encoded = self._encode(weights)
        ids = encoded.caption_ids
        metrics = evaluate_pairs(
            encoded.image_features,
            encoded.text_features,
            ids,
            ids,
            encoded.sample_ids,
            logit_scale=weights.logit_scale or 1.0,
            logit_bias=weights.logit_bias or 0.0,
            picture_ids=encoded.picture_ids,
        ).metrics
        ways = ("image_to_text_recall@1", "text_to_image_recall@1")
        metrics[MEAN_RECALL] = sum(metrics[way] for way in ways) / len(ways)
        if self._metric not in metrics:
            raise UserError(
                f"metric ({self._metric}) must be one of an evaluation, like {MEAN_RECALL}, loss "
                "or margin_5_95; docs/geometry.md and docs/evaluation.md list them"
            )
        value = metrics[self._metric]
        return -value if _is_lower_better(self._metric) else value

    def refit(self, weights: Ingredient, global_batch_size: int) -> Ingredient:
        """Fit scale and bias to the pairs, for a global batch."""
        encoded = self._encode(weights)
        fitted = calibrate_on_features(
            encoded.image_features,
            encoded.text_features,
            global_batch_size,
            caption_ids=encoded.caption_ids,
            picture_ids=encoded.picture_ids,
        )
        return weights._replace(logit_scale=fitted.scale, logit_bias=fitted.bias)
