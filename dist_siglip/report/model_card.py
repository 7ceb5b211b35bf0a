"""The model card of a run: data, schedule, losses, results with their commands, geometry, limits.

Everything is read from the run folder. Paths of this machine are cut to their last name, since a
card is published; names on the Hugging Face hub stay. Markdown and HTML in names are shown as text.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_siglip.models.interop.publish import UNSTATED, Card, Result, escaped
from dist_siglip.report.history import printable
from dist_siglip.report.measures import MARGIN_MEASURES, MODEL_MEASURES, SPACE_MEASURES, Measure
from dist_siglip.report.records import RunRecord, read_run
from dist_siglip.system.redaction import redact

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


def card_of_run(run_dir: Path, *, licence: str = UNSTATED) -> Card:
    """Describe a run for its model card.

    Raises:
        UserError: As ``read_run``; or the licence is no identifier.
    """
    run = read_run(run_dir)
    return Card(
        name=public(run.name),
        licence=licence,
        datasets=tuple(sorted(set(_DATASET.findall(" ".join(_shards(run.settings)))))),
        base_model=_base_model(run.settings),
        results=tuple(_results(run)),
        sections="\n".join(
            [*_data(run), *_training(run), *_measured(run), *_geometry(run), *_limits(run)]
        ),
    )


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
    return name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else None


def _shards(settings: Mapping[str, Any]) -> Iterator[str]:
    """Where training pairs come from, with the weight of each source of a mixture."""
    for source in _listed(settings, "data.train_sources"):
        weight = source.get("weight")
        yield f"{source.get('shards')}" + ("" if weight is None else f" (weight {weight})")
    shards = settings.get("data.train_shards")
    if shards is not None:
        yield from map(str, shards if isinstance(shards, list) else [shards])


def _listed(settings: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = settings.get(name)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _data(run: RunRecord) -> list[str]:
    lines = ["## Data", ""]
    lines += [f"- `{public(each)}`" for each in _shards(run.settings)] or ["- not known"]
    batch, epochs = run.settings.get("data.global_batch_size"), run.series.get("data/epochs")
    if isinstance(batch, int):
        seen = batch * run.last_step
        text = f"- {seen:,} pairs were seen"
        if epochs is not None and epochs.values[-1] > 0:
            at = batch * int(epochs.steps[-1]) / epochs.values[-1]
            text += f": {seen / at:.3g} epochs of about {at:,.0f} pairs"
        lines.append(text + ".")
    lines.append(
        f"- {run.incidents.bad_samples.total:,} samples could not be used, each time they were met."
    )
    return [*lines, "", *_table(run.settings, _DATA)]


def _training(run: RunRecord) -> list[str]:
    settings, provenance = run.settings, run.provenance
    pretrained = settings.get("model.pretrained")
    lines = [
        "## Training",
        "",
        f"Model `{public(settings.get('model.model', 'not known'))}`, "
        + (f"from `{public(pretrained)}`" if pretrained else "from random weights")
        + f", trained to step {run.last_step:,}.",
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


def _measured(run: RunRecord) -> list[str]:
    command = run.provenance.get("command")
    commands = {
        "validation": "dist-siglip validate --config RUN/config.yaml",
        "benchmarks": "dist-siglip test --config RUN/config.yaml --benchmarks.tasks TASKS.yaml",
    }
    lines = ["## Results", ""]
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
            command = shlex.join(map(public, shlex.split(command)))
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
    recall = run.metrics.get("image_to_text_recall@1")
    if recall is None:
        lines.append("- It was not evaluated: nobody knows how good it is.")
    if not run.benchmarks:
        lines.append("- It was measured on no data set but its own validation pairs, if at all.")
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
