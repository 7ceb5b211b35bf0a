"""How often does the name of its class lie nearest to a picture? Zero-shot classification.

Every class has a vector: the mean of its name's features in all templates, at length 1. The answer
is the class with the largest cosine. Two classes of one name have one vector; the lower number wins
then, as in ``argmax``.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.benchmarks.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.benchmarks.class_names import fill, read_classes, read_templates
from dist_siglip.benchmarks.encoding import encode_texts
from dist_siglip.benchmarks.shards import BenchmarkShards, EncodedShards, LoadSettings
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.metrics.checks import check_features, raise_together
from dist_siglip.models.dual_encoder import unit_rows

_CLASSES_AT_ONCE = 64  # whose prompts are in memory together


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
        """Find what is wrong with settings, class names and shards.

        Raises:
            UserError: naming it.
        """
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
        labels = self._labels(encoded, len(classes), group)
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

    def _labels(
        self, encoded: EncodedShards, num_classes: int, group: ProcessGroup | None
    ) -> Tensor:
        """Parse the labels of this rank; all ranks complain about the first that is no class."""
        problem, labels = None, []
        for (text, *_), sample_id in zip(encoded.texts, encoded.sample_ids.tolist(), strict=True):
            label = int(text) if text.isascii() and text.isdigit() else -1
            labels.append(label)
            if problem is None and not 0 <= label < num_classes:
                problem = (
                    f"label ({text[:40]!r}) of {self._shards.table.describe(sample_id)} must be a "
                    f"number from 0 to {num_classes - 1}: benchmark {self.name!r} has "
                    f"{num_classes} classes; correct classes or shards"
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

    Args:
        model: what encodes.
        classes: C names.
        templates: P of them.
        group: process group.

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
    numbers = torch.arange(len(class_features), device=labels.device)
    for start in range(0, len(labels), chunk_rows):
        rows = slice(start, start + chunk_rows)
        scores = image_features[rows] @ class_features.T
        own = labels[rows, None]
        own_scores = scores.gather(1, own)
        ahead = (scores > own_scores) | ((scores == own_scores) & (numbers < own))
        ranks[rows] = 1 + ahead.sum(dim=1)
        best = scores == scores.amax(dim=1, keepdim=True)
        predictions[rows] = best.int().argmax(dim=1)  # the first of equals
    return predictions, ranks


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
