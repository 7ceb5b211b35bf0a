"""A run folder read for the report, with a note for everything missing or damaged.

Only metrics.jsonl must be there. Nothing that is read is executed: no pickled arrays, and
pictures are checked to be what they say they are before they reach the page.
"""

import base64
import binascii
import logging
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dist_siglip.errors import UserError
from dist_siglip.report.canvas import Series
from dist_siglip.report.history import (
    MOST_WIDTH,
    Incidents,
    KeptEvaluation,
    arrays_of,
    number_of,
    objects_of,
    printable,
    read_history,
    read_incidents,
    step_of,
)
from dist_siglip.runs import RunFolder
from dist_siglip.runs.provenance import flatten
from dist_siglip.system.regular_file import open_regular, read_json, read_regular
from dist_siglip.system.yaml_text import MOST_BYTES, load_yaml

_MOST_BYTES = 16_000_000
_MOST_FILES = 500
logger = logging.getLogger(__name__)
_MOST_LETTERS = 20
_MOST_JSON = 2**28
_MOST_TEXT = 2**20
_MOST_NAMES = 2000
_MOST_PICTURES = 1000
_MOST_OVERLAYS = 16
_DENSE = "patch_segmentation"
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_MAGIC = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/webp": b"RIFF",
}


@dataclass(frozen=True)
class BenchmarkFile:
    """One result, as CLIP_benchmark writes them.

    Attributes:
        dataset: what was measured on.
        task: what was asked, such as "zeroshot_retrieval".
        metrics: name to number, finite ones only.
        examples: pictures, of dense evaluations.
        step: of the weights; None if it is not said.
    """

    dataset: str
    task: str
    metrics: dict[str, float]
    examples: tuple["Overlay", ...] = ()
    step: int | None = None


@dataclass(frozen=True)
class Overlay:
    """A picture beside itself with masks over it.

    Attributes:
        data_uri: of its bytes.
        panels: what stands side by side.
        classes: names and colours, as "#rrggbb", of what is seen.
    """

    data_uri: str
    panels: tuple[str, ...]
    classes: tuple[tuple[str, str], ...]


def read_benchmarks(folder: Path, notes: list[str]) -> list[BenchmarkFile]:
    """Read every JSON file of a folder, by name; ``notes`` names those that are no result."""
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
    task = printable(str(content.get("task", "")))
    return BenchmarkFile(
        dataset=printable(str(content.get("dataset", path.stem))),
        task=task,
        metrics={name: n for name, n in found if n is not None and math.isfinite(n)},
        examples=_read_overlays(path) if task == _DENSE else (),
        step=step_of(content.get("step")),
    )


def _read_overlays(path: Path) -> tuple[Overlay, ...]:
    """Read the pictures of a dense evaluation; those that are none are left out."""
    try:
        content = read_json(path.parent / "details" / path.name, _MOST_BYTES)
    except (OSError, ValueError):
        return ()
    entries = _as_list(content.get("examples") if isinstance(content, dict) else None)
    found = []
    for entry in entries[:_MOST_OVERLAYS]:
        uri = _data_uri(entry) if isinstance(entry, dict) else None
        if uri is None:
            continue
        classes = [each for each in _as_list(entry.get("classes")) if isinstance(each, dict)]
        named = ((printable(str(e.get("name"))), str(e.get("colour"))) for e in classes)
        found.append(
            Overlay(
                uri,
                tuple(printable(str(each)) for each in _as_list(entry.get("panels"))),
                tuple(each for each in named if _COLOUR.fullmatch(each[1])),
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Picture:
    """An image of the evaluation, the row of its pair, and what a decoder wrote of it.

    Attributes:
        row: of its pair.
        data_uri: of its bytes; with the boxes of a region, if it was sought.
        written: caption.
        sought: text of the region.
    """

    row: int
    data_uri: str
    written: str | None = None
    sought: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything the report knows about a run.

    Attributes:
        name: name of the run folder.
        series: logged quantities by name, like "train/loss".
        metrics: numbers of the newest evaluation; of the last "val/..." lines if its file is not
            there.
        arrays: arrays of the newest evaluation by name; only those that can be used.
        captions: row-aligned with the feature arrays.
        pictures: images to show.
        settings: config.yaml, dotted name to value; empty if it cannot be read.
        provenance: of the newest start, as ``runs.provenance`` writes it; empty if there is none.
        history: kept parts of evaluations, earliest first.
        incidents: bad samples and skipped steps.
        benchmarks: results of RUN/benchmarks.
        texts: contents of config.yaml and provenance.json by file name.
        notes: what is missing or damaged, one sentence each.
    """

    name: str
    series: dict[str, Series]
    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]
    captions: list[str]
    pictures: list[Picture]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    history: list[KeptEvaluation]
    incidents: Incidents
    benchmarks: list[BenchmarkFile]
    texts: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def short_name(self) -> str:
        """Name for the legend of a drawing: its beginning and its end, if it is long."""
        if len(self.name) <= _MOST_LETTERS:
            return self.name
        half = _MOST_LETTERS // 2
        return f"{self.name[:half]}\N{HORIZONTAL ELLIPSIS}{self.name[-half:]}"

    def last(self, name: str) -> float | None:
        """Last value of a logged quantity; None where it was never logged."""
        series = self.series.get(name)
        return None if series is None else series.last

    @property
    def last_step(self) -> int:
        """Largest step that anything was logged of."""
        return max(int(series.steps[-1]) for series in self.series.values())

    @property
    def features(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Image and text features of the newest evaluation, (n, D) each; None without."""
        images, texts = (self.arrays.get(f"{kind}_features") for kind in ("image", "text"))
        return None if images is None or texts is None else (images, texts)


def read_run(run_dir: Path, name: str | None = None) -> RunRecord:
    """Read what the folder holds.

    Args:
        run_dir: the folder.
        name: what the report calls the run; by default the name of the folder.

    Raises:
        UserError: if the folder or its metrics.jsonl is missing or has no usable line.
    """
    folder = RunFolder(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"run_dir ({run_dir}) does not exist; name the folder of a run")
    if not folder.metrics.is_file():
        raise UserError(f"run_dir ({run_dir}) has no metrics.jsonl; name the folder of a run")
    notes: list[str] = []
    try:
        series = _read_series(folder.metrics, notes)
    except OSError as error:
        raise UserError(f"{folder.metrics} cannot be read: {error.strerror or error}") from error
    if not series:
        raise UserError(
            f"metrics.jsonl of run_dir ({run_dir}) has no numbers; let the run log some"
        )
    arrays = _read_arrays(folder.evaluation / "arrays.npz", notes)
    captions, pictures = _read_examples(folder.evaluation / "examples.json", notes)
    num_rows = len(arrays.get("image_features", ()))
    if captions and num_rows and len(captions) != num_rows:
        notes.append(
            f"examples.json has {len(captions)} captions but arrays.npz has {num_rows} pairs; "
            "the gallery is left out."
        )
        captions, pictures = [], []
    return RunRecord(
        name=printable(run_dir.resolve().name if name is None else name),
        series=series,
        metrics=_read_metrics(folder.evaluation / "metrics.json", series, notes),
        arrays=arrays,
        captions=captions,
        pictures=[picture for picture in pictures if picture.row < len(captions)],
        settings=_read_settings(folder.config, notes),
        provenance=_read_provenance(folder.provenance),
        history=read_history(folder, notes),
        incidents=read_incidents(folder, notes),
        benchmarks=read_benchmarks(folder.benchmarks, notes),
        texts=_read_texts(folder.config, folder.provenance),
        notes=notes,
    )


def _read_series(path: Path, notes: list[str]) -> dict[str, Series]:
    """Later lines win: a resumed run may log a step again."""
    found: dict[str, dict[int, float]] = {}
    damaged = 0
    for entry in objects_of(path):
        step = None if entry is None else step_of(entry.get("step"))
        if entry is None or step is None:
            damaged += 1
            continue
        for name, value in _numbers(entry).items():
            is_new = name not in found and len(found) < _MOST_NAMES
            if name not in ("step", "time") and math.isfinite(value) and (name in found or is_new):
                found.setdefault(name, {})[step] = value
    if len(found) == _MOST_NAMES:
        notes.append(f"metrics.jsonl has more than {_MOST_NAMES:,} names; the first are shown.")
    if damaged:
        notes.append(f"metrics.jsonl has {damaged} unreadable line(s), which are left out.")
    return {
        name: Series(
            np.array(sorted(by_step), dtype=np.int64),
            np.array([by_step[step] for step in sorted(by_step)]),
        )
        for name, by_step in found.items()
    }


def _read_settings(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8", "replace")
        return {printable(name): value for name, value in flatten(load_yaml(text))}
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError):
        notes.append("config.yaml cannot be read.")
        return {}


def _read_texts(*paths: Path) -> dict[str, str]:
    """Read the beginnings of files, by name; those that cannot be read are left out."""
    texts = {}
    for path in paths:
        with suppress(OSError), open_regular(path) as file:
            texts[path.name] = file.read(_MOST_TEXT).decode("utf-8", "replace")
    return texts


def _read_provenance(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, _MOST_JSON)
    except (OSError, ValueError):
        return {}
    newest = content[-1] if isinstance(content, list) and content else content
    return newest if isinstance(newest, dict) else {}


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a JSON object; "nan" and "inf" are numbers too, other values are not."""
    found = ((printable(name), number_of(value)) for name, value in entry.items())
    return {name: value for name, value in found if value is not None}


def _read_metrics(path: Path, series: Mapping[str, Series], notes: list[str]) -> dict[str, float]:
    content = _read_json(path, notes)
    if content is not None:
        return _numbers(content)
    # The last logged evaluation is the second best source.
    return {
        name.removeprefix("val/"): float(values.values[-1])
        for name, values in series.items()
        if name.startswith("val/")
    }


def _read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    name = f"evaluation/{path.name}"
    try:
        content = read_json(path, _MOST_JSON)
    except FileNotFoundError:
        notes.append(f"{name} is not there.")
        return None
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{name} cannot be read.")
        return None
    return content


def _read_arrays(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    try:
        arrays = arrays_of(path)
    except FileNotFoundError:
        notes.append("evaluation/arrays.npz is not there.")
        return {}
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error)
        notes.append("evaluation/arrays.npz cannot be read.")
        return {}
    usable = {
        name: array
        for name, array in arrays.items()
        if array.dtype.kind in "fiu" and np.isfinite(array).all()
    }
    images, texts = (usable.get(f"{kind}_features") for kind in ("image", "text"))
    if (
        images is None
        or texts is None
        or images.ndim != 2
        or images.shape != texts.shape
        or not 0 < images.shape[1] <= MOST_WIDTH
    ):
        notes.append("evaluation/arrays.npz has no usable features.")
        usable = {name: a for name, a in usable.items() if not name.endswith("_features")}
    return usable


def _read_examples(path: Path, notes: list[str]) -> tuple[list[str], list[Picture]]:
    content = _read_json(path, notes)
    if content is None:
        return [], []
    listed = _as_list(content.get("captions"))
    captions = [caption if isinstance(caption, str) else "(no text)" for caption in listed]
    entries = _as_list(content.get("images"))[:_MOST_PICTURES]
    pictures = [picture for entry in entries if (picture := _picture(entry)) is not None]
    if len(pictures) < len(entries):
        notes.append(f"{len(entries) - len(pictures)} picture(s) of examples.json are unusable.")
    return captions, pictures


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _picture(entry: object) -> Picture | None:
    """Check an image; the data URI is built from decoded bytes, never from the given text."""
    if not isinstance(entry, dict):
        return None
    row = entry.get("row")
    if not isinstance(row, int) or isinstance(row, bool) or row < 0:
        return None
    uri = _data_uri(entry)
    if uri is None:
        return None
    written, sought = (
        printable(text) if isinstance(text, str) else None
        for text in (entry.get("written"), entry.get("sought"))
    )
    return Picture(row, uri, written, sought)


def _data_uri(entry: Mapping[str, Any]) -> str | None:
    """Write the bytes of an image as a URI; None if they are not what they say they are."""
    media_type = entry.get("media_type")
    if not isinstance(media_type, str) or media_type not in _MAGIC:
        return None
    try:
        content = base64.b64decode(str(entry.get("base64")), validate=True)
    except (binascii.Error, ValueError):
        return None
    if not content.startswith(_MAGIC[media_type]):
        return None
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
