"""``bench train --objectives``: what each objective costs a step, beside the sigmoid loss alone.

Every round has a run of the loss alone and one with each objective, so that a busy machine is busy
for all. A ratio is that of two runs of one round, and the median round counts. Beside it stands
what the operations predict (``objective_flops``).
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.table import Table

from dist_siglip.bench.objective_flops import Part, step_flops_of, step_parts
from dist_siglip.bench.plan import mebibytes
from dist_siglip.bench.train_runs import TrainCase, TrainSpeed, run_command, run_ours
from dist_siglip.errors import UserError
from dist_siglip.losses import SigLipLoss
from dist_siglip.models import BuiltModel, build_dual_encoder
from dist_siglip.models.averaging import Ingredient, write_weights
from dist_siglip.training.module.curation import CurationConfig

logger = logging.getLogger(__name__)

ALONE = "sigmoid alone"
_ALL = "all"
_CAPTIONING = "dist_siglip.objectives.Captioning"
_OF_TEACHERS = [
    {"class_path": f"dist_siglip.objectives.{name}"}
    for name in ("SelfDistillation", "MaskedPrediction")
]
_DISTILLATION = "dist_siglip.losses.DistillationLoss"
_LIVE, _STORED = "live teacher", "stored teacher"
_CURATED_LIVE, _CURATED_STORED = "curation, live reference", "curation, stored reference"
_TEACHER_LOGITS = (10.0, -10.0)  # scale and bias
_COMPUTED = ("towers", "loss")  # phases with arithmetic of the model; the optimizer's is not


class Variant(NamedTuple):
    """A run to measure.

    Attributes:
        name: of the objective.
        settings: what the run has beyond that of the loss alone, by group.
        parts: of its step; None if they are not known.
    """

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    parts: list[Part] | None


Settings = dict[str, dict[str, Any]]  # of a run, by group

# What every sample of shards that are written here has beside picture and caption.
RECORD = {
    "long": "a longer text about what can be seen in this photo",
    "regions": [{"text": "a subject", "box": [0.25, 0.25, 0.75, 0.75]}],
    "negatives": ["a text about something else"],
}


class TeacherFiles(NamedTuple):
    """A teacher of the student's architecture: its weights, and its rows for the shards."""

    weights: Path
    rows: Path

    @classmethod
    def of(cls, folder: Path) -> "TeacherFiles":
        """Names of the files in a folder; they need not be there."""
        return cls(folder / "teacher.safetensors", folder / "rows")

    def write(self, case: TrainCase, *, with_rows: bool) -> None:
        """Write random weights, and, if asked for, what they make of the shards, once.

        Raises:
            UserError: if that fails.
        """
        if not self.weights.exists():
            scale, bias = _TEACHER_LOGITS
            tensors = build_dual_encoder(case.model).encoder.clip.state_dict()
            write_weights(self.weights, Ingredient("teacher", tensors, scale, bias))
        if with_rows and not self.rows.exists():
            options = {
                "out": self.rows,
                "model": case.model,
                "pretrained": self.weights,
                "format": "features",
                "dtype": "float32",
                "device": case.device,
            }
            words = [f"--{name}={value}" for name, value in options.items()]
            command = [sys.executable, "-m", "dist_siglip", "embed", json.dumps(case.shards)]
            run_command([*command, *words], case, "dist-siglip embed")


def _built_in(
    built: BuiltModel, case: TrainCase, teacher: TeacherFiles, *, has_records: bool
) -> dict[str, Settings]:
    """Settings of every objective there is, by name."""
    model, size = case.model, case.global_batch_size
    width = built.embed_dim
    dims = [width // share for share in (1, 2, 4, 8) if width >= share]
    nested = {"class_path": "dist_siglip.losses.MatryoshkaLoss", "init_args": {"dims": dims}}
    scale, bias = _TEACHER_LOGITS
    live = {"model": model, "pretrained": str(teacher.weights), "scale": scale, "bias": bias}
    stored = {"features": str(teacher.rows), "dim": width, "scale": scale, "bias": bias}
    stored["other_crops"] = True  # so that nothing but the teacher differs
    distil = {"class_path": _DISTILLATION}
    found: dict[str, Settings] = {
        "captioning": {"model": {"objectives": [{"class_path": _CAPTIONING}]}},
        "matryoshka": {"model": {"loss": nested}},
        _STORED: {"model": {"loss": distil, "teachers": [stored]}},
        _LIVE: {"model": {"loss": distil, "teachers": [live]}},
        "self-distillation": {"model": {"objectives": _OF_TEACHERS[:1]}},
        "masked prediction": {"model": {"objectives": _OF_TEACHERS[1:]}},
        "self-distillation and masked prediction": {"model": {"objectives": _OF_TEACHERS}},
        "stage 2": {"model": {"objectives": [{"class_path": _CAPTIONING}, *_OF_TEACHERS]}},
        _CURATED_STORED: _curated({"chunks": min(16, size)}, [stored], size),
        _CURATED_LIVE: _curated({"chunks": min(16, size)}, [live], size),
    }
    if has_records:
        tasks = {"tasks": ["caption", "referring", "grounded"]}
        locca = {"class_path": _CAPTIONING, "init_args": tasks}
        regions = {"regions": {"json_field": "regions"}}
        both = {"members": ["txt", "json"], "weights": {"txt": 1.0, "long": 1.0}}
        negatives = {"members": ["txt", "json"], "negatives": "negatives"}
        found |= {
            "captioning, 3 tasks": {"model": {"objectives": [locca]}, "data": regions},
            "stage 2, 3 tasks": {
                "model": {"objectives": [locca, *_OF_TEACHERS]},
                "data": regions,
            },
            "two captions": {"data": {"captions": both}},
            "a negative text": {"data": {"captions": negatives}},
        }
    return found


def _curated(curation: Mapping[str, Any], teachers: list[Any], size: int) -> Settings:
    """Settings of a run in which ``size`` pairs train of those that the data bring."""
    brought = round(size / (1 - CurationConfig(**curation).filter_ratio))
    return {
        "model": {"curation": dict(curation), "teachers": teachers},
        "data": {"global_batch_size": brought},
    }


def choose_variants(
    asked: Sequence[str],
    case: TrainCase,
    folder: Path,
    *,
    has_records: bool = False,
    writes: bool = True,
) -> list[Variant]:
    """Return the loss alone, and after it what was asked for.

    Args:
        asked: names, "all", or paths of configurations, whose ``model.loss`` (with its teachers),
            each of ``model.objectives``, ``model.curation`` and ``data.captions`` with weights or
            negatives are measured one by one, and loss and objectives together. All begin with the
            first step.
        case: model, shards and batch.
        folder: for weights and rows of a teacher.
        has_records: whether every sample of the shards has ``RECORD``.
        writes: whether a teacher that is asked for is made, too.

    Raises:
        UserError: if a name is not known, a file has nothing to measure, or as ``step_parts``.
    """
    with torch.device("meta"):
        built = build_dual_encoder(case.model)
    teacher = TeacherFiles.of(folder)
    known = _built_in(built, case, teacher, has_records=has_records)
    chosen: dict[str, Settings] = {ALONE: {}}
    for name in asked:
        if name.endswith((".yaml", ".yml")):
            chosen |= _configured(Path(name), case.global_batch_size)
        elif name == _ALL:
            chosen |= known
        elif name in known:
            chosen[name] = known[name]
        else:
            raise UserError(
                f"objectives ({name}) must be of {', '.join([_ALL, *known])}, or a configuration "
                "(.yaml) with model.objectives or model.loss"
            )
    has_stored = not chosen.keys().isdisjoint((_STORED, _CURATED_STORED))
    if writes and (has_stored or not chosen.keys().isdisjoint((_LIVE, _CURATED_LIVE))):
        teacher.write(case, with_rows=has_stored)
    return [
        Variant(name, settings, step_parts(built, settings, case.global_batch_size))
        for name, settings in chosen.items()
    ]


def _configured(path: Path, size: int) -> dict[str, Settings]:
    """Each objective of a configuration, its loss, curation and captions if they are of its own."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"objectives ({path}) cannot be read: {reason}") from error
    model, data = (_group(content, name) for name in ("model", "data"))
    found: dict[str, Settings] = {}
    captions = _group(data, "captions")
    if captions.get("weights") or captions.get("negatives"):
        found["captions"] = {"data": {"captions": captions}}
    if isinstance(model.get("curation"), dict):
        try:
            CurationConfig(**model["curation"]).check(SigLipLoss())
        except TypeError as error:
            raise UserError(
                f"objectives ({path}) has a curation that cannot be: {error}"
            ) from error
        found["curation"] = _curated(model["curation"], model.get("teachers") or [], size)
    loss, objectives = model.get("loss"), model.get("objectives") or []
    listed = objectives if isinstance(objectives, list) else []
    entries = [_from_the_first_step(path, each) for each in listed]
    regions: Settings = {"data": {"regions": data["regions"]}} if "regions" in data else {}
    of_loss: dict[str, Any] = {}
    if loss:
        of_loss = {key: model[key] for key in ("loss", "teachers") if key in model}
    if loss:
        found[_name_of(path, loss)] = {"model": of_loss, **regions}
    for entry in entries:
        found[_name_of(path, entry)] = {"model": {"objectives": [entry]}, **regions}
    if bool(loss) + len(entries) > 1:
        found["together"] = {"model": {**of_loss, "objectives": entries}, **regions}
    if not found:
        raise UserError(
            f"objectives ({path}) has neither model.objectives nor model.loss, nor model.curation, "
            "nor weights or negatives of data.captions"
        )
    return found


def _name_of(path: Path, entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
        raise UserError(f"objectives ({path}) has an entry without class_path: {str(entry)[:60]}")
    return entry["class_path"].rpartition(".")[2]


def _from_the_first_step(path: Path, entry: Any) -> dict[str, Any]:
    """An entry that neither begins late nor slowly."""
    _name_of(path, entry)
    given = entry.get("init_args") or {}
    kept = {name: value for name, value in given.items() if name not in ("start", "ramp_steps")}
    return {"class_path": entry["class_path"], "init_args": kept}


def _group(content: Any, name: str) -> dict[str, Any]:
    group = content.get(name) if isinstance(content, dict) else None
    return group if isinstance(group, dict) else {}


def measure_objectives(
    case: TrainCase, rounds: int, variants: Sequence[Variant], folder: Path
) -> list[dict[str, Any]]:
    """Run every variant ``rounds`` times, in turns; return a row for each.

    Args:
        case: what to train.
        rounds: 0 leaves what would be measured None.
        variants: the loss alone is the first.
        folder: for the runs.
    """
    speeds: list[list[TrainSpeed]] = [[] for _ in variants]
    for number in range(rounds):
        for own, variant in zip(speeds, variants, strict=True):
            place = folder / f"{number}-{len(own)}-{variants.index(variant)}"
            place.mkdir(parents=True)
            own.append(run_ours(case, place, variant.settings))
            logger.info(
                "W=%d, round %d of %d, %s: %.0f samples/s",
                case.world_size,
                number + 1,
                rounds,
                variant.name,
                own[-1].samples_per_second,
            )
    alone = variants[0].parts
    return [
        {
            "world_size": case.world_size,
            "local_batch_size": case.local_batch_size,
            "objective": variant.name,
            "predicted_ratio": step_flops_of(variant.parts) / step_flops_of(alone)
            if variant.parts and alone
            else None,
            "parts": variant.parts and [part._asdict() for part in variant.parts],
            **_measured(case, own, speeds[0]),
        }
        for variant, own in zip(variants, speeds, strict=True)
    ]


def _measured(
    case: TrainCase, own: Sequence[TrainSpeed], alone: Sequence[TrainSpeed]
) -> dict[str, float | None]:
    """Medians of the rounds, and ratios to the loss alone within each round."""

    def seconds(speed: TrainSpeed, phases: Sequence[str] = ()) -> float:
        step = case.global_batch_size / speed.samples_per_second
        return step * sum(speed.shares[phase] for phase in phases) if phases else step

    pairs = list(zip(own, alone, strict=True))
    ratios = [seconds(each) / seconds(other) for each, other in pairs]
    computed = [seconds(each, _COMPUTED) / seconds(other, _COMPUTED) for each, other in pairs]
    worked = [
        (each.processor_seconds or 0) / (other.processor_seconds or 1) for each, other in pairs
    ]
    return {
        "step_seconds": median(map(seconds, own)) if own else None,
        "ratio": median(ratios) if own else None,
        "least_ratio": min(ratios, default=None),
        "most_ratio": max(ratios, default=None),
        "computed_ratio": median(computed) if own else None,
        "processor_ratio": median(worked) if own else None,
        "peak_bytes": median(speed.peak_bytes for speed in own) if own else None,
    }


def print_objectives(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print what was measured, if anything was, and the operations of each part."""
    console = Console()
    if rows[0]["ratio"] is not None:
        console.print(_costs(rows, title))
    console.print(_operations(rows[: len({row["objective"] for row in rows})]))


def _costs(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = Table(
        title=title,
        caption="time of a step over that of the loss alone in the same round, median, least and "
        "most; towers and loss: without data, optimizer and the rest; processors: time that they "
        "worked for the first rank, which a busy machine does not change; FLOPs: what the "
        "operations below predict for towers and loss; peak: of the first rank",
    )
    headings = ("W", "b", "objective", "ms a step", "ratio", "least", "most", "towers and loss")
    for heading in (*headings, "processors", "FLOPs", "peak"):
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for row in rows:
        names = ("ratio", "least", "most", "computed", "processor", "predicted")
        keys = [name if name == "ratio" else f"{name}_ratio" for name in names]
        cells = ["-" if row[key] is None else f"{row[key]:.2f}" for key in keys]
        sizes = [str(row[key]) for key in ("world_size", "local_batch_size", "objective")]
        step = f"{row['step_seconds'] * 1e3:,.0f}"
        table.add_row(*sizes, step, *cells, mebibytes(row["peak_bytes"]))
    return table


def _operations(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The parts of the loss alone, and of each objective those that it has not."""
    table = Table(
        title="operations of a pair",
        caption="forward; times in a step: forward once, backward twice, 4 where backward makes "
        "the result anew, 1 without gradient; share: of a step of the loss alone",
    )
    for heading in ("objective", "part", "GFLOP", "times", "share"):
        table.add_column(heading, justify="left" if heading in ("objective", "part") else "right")
    alone = rows[0]["parts"] or []
    whole = sum(part["forward"] * part["times"] for part in alone)
    for row in rows:
        parts = row["parts"]
        if parts is None:
            table.add_row(row["objective"], "not known", "", "", "")
            continue
        for part in parts if row is rows[0] else [part for part in parts if part not in alone]:
            share = part["forward"] * part["times"] / whole
            giga = f"{part['forward'] / 1e9:,.4g}"
            table.add_row(row["objective"], part["name"], giga, str(part["times"]), f"{share:.1%}")
        if row is not rows[0]:
            table.add_row("", "step over that of the loss alone", "", "", _ratio(row))
    return table


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['predicted_ratio']:.2f}"
