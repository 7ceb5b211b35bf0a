"""The model card of a run: data, schedule, losses, results with their commands, geometry, limits.

Everything is read from the run folder. Paths of this machine are cut to their last name, since a
card is published; names on the Hugging Face hub stay. Markdown and HTML in names are shown as text.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_siglip.models.interop.publish import UNSTATED, Card, Result, escaped
from dist_siglip.models.weight_source import HF_HUB, LOCAL_DIR
from dist_siglip.report.history import printable
from dist_siglip.report.measures import MARGIN_MEASURES, MODEL_MEASURES, SPACE_MEASURES, Measure
from dist_siglip.report.records import RunRecord, read_run
from dist_siglip.system.redaction import redact, redact_arguments

# A URL, which stays, or all but the last name of a path from the root, a home or a folder above.
_PATH = re.compile(
    r"(?!file:)\b[a-z][a-z0-9+.-]*://(?:\{[^{}\s]*\}|[^\s'\",\]])*"
    r"|(?P<folders>(?:file://|(?<![\w/.~]))(?:(?:~[\w.-]*|\.\.)/+|/(?!/))(?:[^'\",\]\n]*/)?"
    r"(?=[^\s'\",\]/]))",
    re.IGNORECASE,
)
_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
_TASKS = {
    "zeroshot_classification": "zero-shot-image-classification",
    "zeroshot_retrieval": "image-text-retrieval",
}
_MOST_METRICS = 12
_UNKNOWN = "of which step the weights are is not known"
_RETRIEVAL = tuple(
    f"{direction}_{name}"
    for direction in ("image_to_text", "text_to_image")
    for name in ("recall@1", "recall@5", "recall@10", "median_rank")
)
_GEOMETRY = (*SPACE_MEASURES[:7], *MARGIN_MEASURES, *MODEL_MEASURES[1:])
# Setting, and how the card calls it.
_DATA = {
    "data.global_batch_size": "pairs of a step",
    "data.captions.pick": "caption of several",
    "data.captions.weights": "captions of a picture in one step",
    "data.captions.probabilities": "chances of a caption",
    "data.picture_id": "what makes pictures the same",
    "data.train_crop_scale": "crop, share of the area",
    "data.max_image_pixels": "filter: most pixels of a picture",
    "data.on_damage": "filter: damaged shards",
    "data.max_bad_fraction": "filter: most bad samples, share",
    "data.truncated_pictures": "filter: truncated pictures",
    "model.curation.filter_ratio": "filter: share of each batch that does not train (curation)",
}
_SCHEDULE = {
    "trainer.max_steps": "steps",
    "model.optim.learning_rate": "learning rate",
    "model.optim.schedule": "schedule",
    "model.optim.warmup_steps": "warm-up steps",
    "model.optim.cooldown_steps": "cool-down steps",
    "model.optim.weight_decay": "weight decay",
    "model.optim.beta2": "beta 2",
    "trainer.gradient_clip_val": "gradients clipped to a norm of",
    "trainer.precision": "precision",
    "model.image_tower.locked": "image tower locked",
    "model.text_tower.locked": "text tower locked",
    "from_run": "goes on from run",
    "seed_everything": "seed",
}


def card_of_run(
    run_dir: Path,
    *,
    licence: str = UNSTATED,
    step: int | None = None,
    weights_average: bool | None = None,
) -> Card:
    """Describe a run for its model card, with what was measured of the weights that have the card.

    Args:
        run_dir: folder of the run.
        licence: identifier of the hub.
        step: of the weights; None is the last of the run, below 0 it is not known.
        weights_average: False are those that the run's average, which it evaluates, is made of.

    Raises:
        UserError: As ``read_run``; or the licence is no identifier.
    """
    run, left_out = _of_weights(read_run(run_dir), step, weights_average)
    step = run.last_step if step is None else step
    return Card(
        name=public(run.name),
        licence=licence,
        datasets=tuple(sorted(set(_DATASET.findall(" ".join(_shards(run.settings)))))),
        base_model=_base_model(run.settings),
        results=tuple(_results(run)),
        sections="\n".join(
            [
                *_data(run, step),
                *_training(run, step),
                *_measured(run, left_out),
                *_geometry(run),
                *_limits(run),
            ]
        ),
    )


def _of_weights(
    run: RunRecord, step: int | None, weights_average: bool | None
) -> tuple[RunRecord, str]:
    """Take out of a record what was measured of other weights, and say what that was."""
    callbacks = [str(each.get("class_path")) for each in _listed(run.settings, "trainer.callbacks")]
    if weights_average is False and any("WeightAverag" in name for name in callbacks):
        reason = "of the average that the run keeps; the weights are those it was made of"
        return replace(run, metrics={}, benchmarks=[]), reason
    series = run.series.get("val/image_to_text_recall@1")
    evaluated = run.metrics.get("step", None if series is None else series.steps[-1])
    steps = [*([evaluated] if run.metrics else []), *(each.step for each in run.benchmarks)]
    others = sorted({int(each) for each in steps if each is not None and each != step})
    if step is None or not others:
        return run, ""
    kept = [each for each in run.benchmarks if each.step is None or each.step == step]
    metrics = run.metrics if evaluated is None or evaluated == step else {}
    are = f"the weights are of step {step:,}" if step >= 0 else _UNKNOWN
    reason = f"of step {', '.join(f'{each:,}' for each in others)}; {are}"
    return replace(run, metrics=metrics, benchmarks=kept), reason


def public(value: object) -> str:
    """Write a setting for strangers: without secrets of URLs and folders of this machine.

    Example:
        >>> public("local-dir:/home/me/a"), public("hf://datasets/me/set/a.tar")
        ('local-dir:a', 'hf://datasets/me/set/a.tar')
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(map(public, value))
    text = redact(printable(str(value)))
    return _PATH.sub(lambda found: "" if found["folders"] else found[0], text).replace("`", "'")


def _cell(value: object) -> str:
    """Write the same outside of code."""
    return escaped(public(value))


def _base_model(settings: Mapping[str, Any]) -> str | None:
    name = str(settings.get("model.model", ""))
    return name.removeprefix(HF_HUB) if name.startswith(HF_HUB) else None


def _shards(settings: Mapping[str, Any]) -> Iterator[str]:
    """Where training pairs come from, with the weight of each source of a mixture."""
    for source in _listed(settings, "data.train_sources"):
        weight = source.get("weight")
        yield f"{source.get('shards')}" + ("" if weight is None else f" (weight {weight})")
    shards = settings.get("data.train_shards")
    if shards is not None:
        yield from map(str, shards if isinstance(shards, list) else [shards])


def _listed(settings: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The classes of a list; a function is named by its path alone."""
    found = settings.get(name)
    if not isinstance(found, list):
        return []
    named = [{"class_path": each} if isinstance(each, str) else each for each in found]
    return [each for each in named if isinstance(each, Mapping)]


def _data(run: RunRecord, step: int) -> list[str]:
    lines = ["## Data", ""]
    lines += [f"- `{public(each)}`" for each in _shards(run.settings)] or ["- not known"]
    lines += [
        f"- Before the crop: {_described(each)}." for each in _listed(run.settings, "data.stages")
    ]
    batch, epochs = run.settings.get("data.global_batch_size"), run.series.get("data/epochs")
    if isinstance(batch, int) and step >= 0:
        seen = batch * step
        text = f"- {seen:,} pairs were seen"
        if epochs is not None and epochs.values[-1] > 0:
            at = batch * int(epochs.steps[-1]) / epochs.values[-1]
            text += f": {seen / at:.3g} epochs of about {at:,.0f} pairs"
        lines.append(text + ".")
    lines.append(
        f"- {run.incidents.bad_samples.total:,} samples could not be used, each time they were met."
    )
    return [*lines, "", *_table(run.settings, _DATA)]


def _training(run: RunRecord, step: int) -> list[str]:
    settings, provenance = run.settings, run.provenance
    lines = [
        "## Training",
        "",
        f"Model `{public(settings.get('model.model', 'not known'))}`, from {_start(settings)}, "
        + (f"trained to step {step:,}." if step >= 0 else "trained."),
        "",
        f"- Loss: {_class(settings, 'model.loss') or '`SigLipLoss`'}.",
    ]
    lines += [f"- Objective: {_described(each)}." for each in _listed(settings, "model.objectives")]
    lines += [
        f"- Teacher: `{public(each.get('model') or each.get('features'))}`."
        for each in _listed(settings, "model.teachers")
    ]
    lines += ["", *_table(settings, _SCHEDULE)]
    made = provenance.get("versions")
    if isinstance(made, Mapping):
        versions = ", ".join(f"{public(k)} {public(v)}" for k, v in made.items() if v)
        lines += [f"Made with {versions}.", ""]
    return lines


def _start(settings: Mapping[str, Any]) -> str:
    """What training began with."""
    model, from_run = str(settings.get("model.model", "")), settings.get("from_run")
    if from_run:
        return f"run `{public(from_run)}`"
    if pretrained := settings.get("model.pretrained"):
        return f"`{public(pretrained)}`"
    if model.startswith((HF_HUB, LOCAL_DIR)):
        return "its own weights"
    is_file = model.endswith(".json")
    return "random weights" + (", but for those that its config names" if is_file else "")


def _class(settings: Mapping[str, Any], name: str) -> str:
    """A setting that names a class, and what is set of it."""
    path = settings.get(f"{name}.class_path")
    if path is None:
        return ""
    prefix = f"{name}.init_args."
    args = {key.removeprefix(prefix): v for key, v in settings.items() if key.startswith(prefix)}
    return _described({"class_path": path, "init_args": args})


def _described(each: Mapping[str, Any]) -> str:
    name = str(each.get("class_path", "not known")).rpartition(".")[2]
    args = each.get("init_args")
    said = args if isinstance(args, Mapping) else {}
    text = ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)
    return f"`{public(name)}`" + (f" ({_cell(text)})" if text else "")


def _results(run: RunRecord) -> Iterator[Result]:
    found = {name: run.metrics[name] for name in _RETRIEVAL if name in run.metrics}
    if found:
        named = public(run.settings.get("data.val_shards", "validation pairs"))
        yield Result("image-text-retrieval", named, found)
    for each in run.benchmarks:
        metrics = dict(list(each.metrics.items())[:_MOST_METRICS])
        if metrics:
            yield Result(_TASKS.get(each.task, each.task), public(each.dataset), metrics)


def _measured(run: RunRecord, left_out: str) -> list[str]:
    command = run.provenance.get("command")
    commands = {
        "validation": "dist-siglip validate --config RUN/config.yaml",
        "benchmarks": "dist-siglip test --config RUN/config.yaml --benchmarks.tasks TASKS.yaml",
    }
    lines = ["## Results", ""]
    if left_out:
        lines += [f"Left out: what was measured {left_out}.", ""]
    results = list(_results(run))
    if not results:
        return [*lines, "Nothing was measured.", ""]
    lines += ["| data | metric | value |", "|---|---|---|"]
    for each in results:
        lines += [
            f"| {escaped(each.dataset)} | {_cell(name)} | {value:.4f} |"
            for name, value in each.metrics.items()
        ]
    pairs = run.metrics.get("gallery_pairs")
    if pairs is not None and math.isfinite(pairs):
        lines += ["", f"Validation: one gallery of {pairs:,.0f} pairs; ties count against a query."]
    used = [commands["validation"]] if run.metrics else []
    used += [commands["benchmarks"]] if run.benchmarks else []
    lines += ["", "Measured again by:", "", "```bash", *used, "```", ""]
    if isinstance(command, str):
        with suppress(ValueError):  # cut in the middle of a quote
            command = shlex.join(map(public, redact_arguments(shlex.split(command))))
        said = ["```bash", public(command), "```", ""]
        lines += ["Trained, and evaluated meanwhile, by:", "", *said]
    return lines


def _geometry(run: RunRecord) -> list[str]:
    def row(each: Measure) -> str:
        return f"| {each.label} | {run.metrics[each.key]:.4f} | {each.meaning} |"

    rows = [row(each) for each in _GEOMETRY if math.isfinite(run.metrics.get(each.key, math.nan))]
    if not rows:
        return []
    return ["## Geometry", "", "| measure | value | meaning |", "|---|---|---|", *rows, ""]


def _limits(run: RunRecord) -> list[str]:
    """What the records say must not be expected of the model."""
    lines = [
        "## Limits",
        "",
        "- It knows what its training pairs show, their language and their prejudices included; it "
        "was not examined for fairness, safety or privacy.",
        "- Scores are similarities, not probabilities, unless scale and bias were calibrated for "
        "the number of candidates at hand.",
    ]
    if not any(_results(run)):
        lines.append("- These weights were not evaluated: nobody knows how good they are.")
    elif not run.benchmarks:
        lines.append("- They were measured on no data set but the run's own validation pairs.")
    skipped = run.incidents.skipped_steps.total
    if skipped:
        lines.append(f"- Steps that were skipped, since they were not sound: {skipped:,}.")
    return lines


def _table(settings: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    rows = [
        f"| {label} | {_cell(settings[name])} |"
        for name, label in names.items()
        if settings.get(name) is not None
    ]
    return ["| setting | value |", "|---|---|", *rows, ""] if rows else []


__all__ = ["card_of_run", "public"]
