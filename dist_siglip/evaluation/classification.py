"""Zero-shot classification of labelled pictures.

Every class has a vector: the mean of its name's features in all templates, at length 1. The answer
is the class with the largest cosine. Two classes of one name have one vector; the lower number wins
then, as in ``argmax``.

Names and templates come from open_clip's lists, from a file of the user's, or from the two files
that CLIP_benchmark keeps beside its shards. A template is text with ``{c}`` or ``{}`` where the
name goes; nothing else in it means anything, so a file of templates cannot ask for more.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from open_clip import (
    IMAGENET_CLASSNAMES,
    OPENAI_IMAGENET_TEMPLATES,
    SIMPLE_IMAGENET_TEMPLATES,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.captions import CaptionRule, split_lines
from dist_siglip.data.urls import is_remote
from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.encoding import encode_texts
from dist_siglip.evaluation.shards import BenchmarkShards, EncodedShards, LoadSettings
from dist_siglip.metrics.rows import check_features, raise_together
from dist_siglip.models.dual_encoder import unit_rows
from dist_siglip.system.regular_file import read_regular
from dist_siglip.system.yaml_text import MOST_BYTES, load_yaml

_CLASSES_FILE = "classnames.txt"
_TEMPLATES_FILE = "zeroshot_classification_templates.txt"
PLACES = ("{c}", "{}")
_MOST_DIGITS = 6  # of a label
MOST_LABEL = 10**_MOST_DIGITS - 1
_CLASSES_AT_ONCE = 64  # whose prompts are in memory together


def read_classes(given: str | list[str] | None, shards: Sequence[str]) -> list[str]:
    """Return the names of the classes, in the order of their labels.

    Args:
        given: "imagenet" for the 1000 names of open_clip; a list of names; a text file with a name
            a line; a YAML file, a list or a mapping with the list ``classes``. None: classnames.txt
            beside the shards or one folder above.
        shards: locations of the shards.

    Raises:
        UserError: if there are no names, fewer than two, or a file cannot be read.

    Example:
        >>> read_classes(["cat", "dog"], [])
        ['cat', 'dog']
        >>> len(read_classes("imagenet", []))
        1000
    """
    if given == "imagenet":
        return list(IMAGENET_CLASSNAMES)
    classes = _read(given, "classes", _CLASSES_FILE, '"imagenet"', shards)
    if len(classes) < 2 or not all(classes):
        raise UserError(f"classes ({len(classes)}) must be at least two names, none of them empty")
    return classes


def read_templates(given: str | list[str] | None, shards: Sequence[str]) -> list[str]:
    """Return the templates, each with a place for the name.

    Args:
        given: "openai" for the 80 templates of CLIP, "simple" for 7 of them, as open_clip has them;
            a list of templates; a text file with one a line; a YAML file, a list or a mapping
            with the list ``templates``. None: zeroshot_classification_templates.txt beside the
            shards or one folder above.
        shards: locations of the shards.

    Raises:
        UserError: if there is no template, one has no place for the name, or a file cannot be read.

    Example:
        >>> read_templates("simple", [])[0]
        'itap of a {c}.'
    """
    known = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    if isinstance(given, str) and given in known:
        return [template("{c}") for template in known[given]]
    templates = _read(given, "templates", _TEMPLATES_FILE, '"openai", "simple"', shards)
    for template in templates:
        if not any(place in template for place in PLACES):
            raise UserError(
                f"template ({template!r}) must say where the name goes: {{c}} or {{}}, e.g. "
                "a photo of a {c}."
            )
    if not templates:
        raise UserError("templates ([]) must hold at least one, e.g. a photo of a {c}.")
    return templates


def fill(template: str, name: str) -> str:
    """Put the name of a class into a template.

    Example:
        >>> fill("a photo of a {c}.", "red fox"), fill("a {} in {0}.", "hen")
        ('a photo of a red fox.', 'a hen in {0}.')
    """
    for place in PLACES:
        template = template.replace(place, name)
    return template


def _read(
    given: str | list[str] | None, what: str, beside: str, words: str, shards: Sequence[str]
) -> list[str]:
    """Return a list given as such, in a file, or beside the shards."""
    if isinstance(given, list):
        return given
    path = _beside(shards, beside) if given is None else Path(given)
    if path is None:
        raise UserError(
            f"{what} (null) are needed: there is no {beside} beside the shards "
            f"{''.join(shards[:1])}; give {words}, a list, or a text or YAML file"
        )
    try:
        text = read_regular(path, MOST_BYTES).decode()
        if path.suffix not in (".yaml", ".yml"):
            return [line.strip() for line in split_lines(text.strip())]
        content: Any = load_yaml(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(
            f"{what} ({path}) cannot be read: {reason}; give {words}, a list, or a text or YAML "
            "file"
        ) from error
    found = content.get(what) if isinstance(content, dict) else content
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise UserError(
            f"{what} ({path}) must be a YAML list of strings, or a mapping with the list {what}"
        )
    return found


def _beside(shards: Sequence[str], name: str) -> Path | None:
    """Find a file in the folder of the first shard, or one above."""
    if not shards or is_remote(shards[0]):
        return None
    folder = Path(os.path.abspath(shards[0])).parent
    return next((p / name for p in (folder, folder.parent) if (p / name).is_file()), None)


class Classification(Benchmark):
    """Zero-shot classification of labelled pictures.

    Metrics, with CLIP_benchmark's names: ``acc1``, ``acc5`` (from five classes on),
    ``mean_per_class_recall`` (over the classes that occur). Details: the classes with their counts,
    the confusion matrix, what was left out.

    Args:
        shards: webdataset shards of pictures and labels, as ``data.val_shards``; CLIP_benchmark's
            data sets on the Hugging Face hub have this form.
        classes: "imagenet", a list of names, or a text or YAML file; see ``read_classes``. Null:
            classnames.txt beside the shards.
        templates: "openai", "simple", a list, or a text or YAML file; see ``read_templates``.
            Null: zeroshot_classification_templates.txt beside the shards.
        name: of this benchmark.
        label_member: extension of the member that holds the number of the class, from 0.
        loading: how the shards are read.
    """

    task = "zeroshot_classification"

    def __init__(
        self,
        shards: str | list[str],
        classes: str | list[str] | None = None,
        templates: str | list[str] | None = None,
        name: str = "classification",
        label_member: str = "cls",
        loading: LoadSettings = LoadSettings(),  # noqa: B008 - frozen dataclass
    ) -> None:
        super().__init__(name)
        self._classes = classes
        self._templates = templates
        labels = CaptionRule(members=(label_member,))
        self._shards = BenchmarkShards(shards, labels, loading, name=name)

    def check(self) -> None:
        """Find what is wrong with settings, class names and shards."""
        super().check()
        self._shards.check()
        self._read_names()

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Classify all pictures; see the base class for the contract.

        Raises:
            UserError: on every rank: features are not finite, a label is no class, too many samples
                cannot be used.
        """
        classes, templates = self._read_names()
        class_features = class_vectors(model, classes, templates, group=group)
        encoded = self._shards.encode(model, encoded_texts=0, group=group)
        check_features(
            [("image_features", encoded.image_features)],
            [("sample_ids", encoded.sample_ids)],
            unit_norm=True,
            group=group,
        )
        labels = parse_labels(encoded, len(classes), self._shards, group=group)
        predictions, ranks = classify(encoded.image_features, class_features, labels)
        answers = gather_rows(torch.stack([labels, predictions, ranks], dim=1), group)
        if not len(answers):
            raise UserError(f"benchmark {self.name!r} has no picture that can be used")
        summary = summarise(*answers.cpu().numpy().T, classes=classes)
        return BenchmarkResult(
            summary.metrics,
            {**summary.details, "templates": templates, "left_out": encoded.num_bad},
        )

    def _read_names(self) -> tuple[list[str], list[str]]:
        shards = self._shards.table.shards
        return read_classes(self._classes, shards), read_templates(self._templates, shards)


def parse_labels(
    encoded: EncodedShards,
    num_classes: int | None,
    shards: BenchmarkShards,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Parse the labels of this rank's samples, the first text of each; (B,) int64.

    Distributed contract: one ``raise_together``.

    Args:
        encoded: samples of this rank.
        num_classes: labels must be below; None for any.
        shards: where the samples are from.
        group: process group.

    Raises:
        UserError: on every rank, if a label of any rank is no class.
    """
    problem, labels = None, []
    for (text, *_), sample_id in zip(encoded.texts, encoded.sample_ids.tolist(), strict=True):
        is_number = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
        label = int(text) if is_number else -1
        labels.append(label)
        if problem is None and (label < 0 or (num_classes is not None and label >= num_classes)):
            allowed = (
                "a number from 0 on"
                if num_classes is None
                else f"a number from 0 to {num_classes - 1}: benchmark {shards.name!r} has "
                f"{num_classes} classes"
            )
            problem = (
                f"label ({text[:40]!r}) of {shards.table.describe(sample_id)} must be {allowed}; "
                "correct classes or shards"
            )
    device = encoded.sample_ids.device
    raise_together(problem, device=device, group=group)
    return torch.tensor(labels, dtype=torch.int64, device=device)


def class_vectors(
    model: EvaluatedModel,
    classes: list[str],
    templates: list[str],
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Encode classes: the mean over templates of unit text features, at length 1.

    Distributed contract: as ``encode_texts``.

    Returns:
        (C, D) float32, on the device of the model.

    Source:
        Radford et al. 2021, arXiv:2103.00020, section 3.1.4 (an ensemble in embedding space).
    """
    vectors = []
    for start in range(0, len(classes), _CLASSES_AT_ONCE):
        names = classes[start : start + _CLASSES_AT_ONCE]
        prompts = [fill(template, name) for name in names for template in templates]
        features = encode_texts(model, prompts, group=group)
        vectors.append(unit_rows(features.unflatten(0, (len(names), -1)).mean(dim=1)))
    return torch.cat(vectors)


def classify(
    image_features: Tensor, class_features: Tensor, labels: Tensor, *, chunk_rows: int = 4096
) -> tuple[Tensor, Tensor]:
    """Give every picture a class, and its true class a rank.

        rank = 1 + number of classes c with s_c > s_label, or s_c = s_label and c < label

    so that rank 1 means that the prediction is right.

    Args:
        image_features: (B, D).
        class_features: (C, D).
        labels: (B,) int64, from 0 to C - 1.
        chunk_rows: pictures whose similarities are in memory together.

    Returns:
        (predictions (B,), ranks (B,)), int64; ranks from 1.

    Example:
        >>> classes = torch.eye(3)
        >>> images = torch.tensor([[0.0, 0.6, 0.8], [0.6, 0.6, 0.5]])
        >>> classify(images, classes, torch.tensor([1, 1]))
        (tensor([2, 0]), tensor([2, 2]))
    """
    predictions, ranks = torch.empty_like(labels), torch.empty_like(labels)
    for start in range(0, len(labels), chunk_rows):
        rows = slice(start, start + chunk_rows)
        found = rank_labels(image_features[rows] @ class_features.T, labels[rows])
        predictions[rows], ranks[rows] = found
    return predictions, ranks


def rank_labels(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give every row the class with the highest score, and its true class a rank.

    Args:
        scores: (B, C) of each class.
        labels: (B,) int64, from 0 to C - 1.

    Returns:
        As ``classify``; of equal scores that of the lower class comes first.

    Example:
        >>> rank_labels(torch.tensor([[0.1, 0.5, 0.5]]), torch.tensor([2]))
        (tensor([1]), tensor([2]))
    """
    own = labels[:, None]
    own_scores = scores.gather(1, own)
    numbers = torch.arange(scores.shape[1], device=labels.device)
    ahead = (scores > own_scores) | ((scores == own_scores) & (numbers < own))
    best = scores == scores.amax(dim=1, keepdim=True)
    return best.int().argmax(dim=1), 1 + ahead.sum(dim=1)  # argmax takes the first of equals


class Summary(NamedTuple):
    """Metrics and details of a classification."""

    metrics: dict[str, float]
    details: dict[str, Any]


def summarise(
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    ranks: NDArray[np.int64],
    *,
    classes: list[str],
) -> Summary:
    """Count right answers, overall and by class.

        acc@k = mean over pictures of [rank <= k]
        mean_per_class_recall = mean over the classes that occur of their own acc@1

    Args:
        labels: (N,), at least one.
        predictions: (N,).
        ranks: (N,) of the true class, from 1.
        classes: C names.

    Returns:
        Metrics; and details: ``classes``, each with name, number of pictures, recall and (from five
        classes on) recall@5; ``confusion``, [label, prediction, pictures] of every pair that
        occurs; ``pictures``.

    Example:
        >>> found = summarise(
        ...     np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([1, 2, 1]), classes=["a", "b"]
        ... )
        >>> found.metrics
        {'acc1': 0.6666666666666666, 'mean_per_class_recall': 0.75}
        >>> found.details["confusion"]
        [[0, 0, 1], [0, 1, 1], [1, 1, 1]]
    """
    num_classes = len(classes)
    counts = np.bincount(labels, minlength=num_classes)
    tops = {1: ranks <= 1, **({5: ranks <= 5} if num_classes >= 5 else {})}
    hits = {k: np.bincount(labels, weights=hit, minlength=num_classes) for k, hit in tops.items()}
    occurs = counts > 0
    metrics = {f"acc{k}": float(hit.mean()) for k, hit in tops.items()}
    metrics["mean_per_class_recall"] = float((hits[1][occurs] / counts[occurs]).mean())
    by_class = []
    for number, name in enumerate(classes):
        count = int(counts[number])
        row: dict[str, Any] = {"name": name, "pictures": count}
        if count:
            row |= {"recall" if k == 1 else f"recall@{k}": hits[k][number] / count for k in tops}
        by_class.append(row)
    pairs, sizes = np.unique(np.stack([labels, predictions], axis=1), axis=0, return_counts=True)
    confusion = np.column_stack([pairs, sizes]).tolist()
    details = {"pictures": len(labels), "classes": by_class, "confusion": confusion}
    return Summary(metrics, details)
