"""ImageNet in other languages: Babel-ImageNet."""

from typing import Any

import numpy as np
import torch
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import (
    Benchmark,
    BenchmarkResult,
    EvaluatedModel,
    check_languages,
)
from dist_siglip.evaluation.classification import (
    MOST_LABEL,
    PLACES,
    class_vectors,
    classify,
    parse_labels,
    read_templates,
    summarise,
)
from dist_siglip.evaluation.shards import BenchmarkShards, LoadSettings
from dist_siglip.metrics.rows import check_features
from dist_siglip.system.regular_file import read_json

_MOST_BYTES = 64 << 20
_FEWEST_CLASSES = 5  # so that acc5 says something


class BabelImageNet(Benchmark):
    """ImageNet with class names and templates of other languages: Babel-ImageNet.

    Each language has names of some of the 1000 classes; the pictures of these are classified among
    them. Metrics: the means over languages of ``acc1``, ``acc5`` and ``mean_per_class_recall``,
    with each language as a part. Pictures are encoded once.

    Args:
        shards: webdataset shards of ImageNet's validation pictures and labels.
        classes: babel_imagenet.json of CLIP_benchmark or of the authors: numbers of ImageNet's
            classes and their names by language, {"DE": [[1, 2], ["Goldfisch", "Weisser Hai"]]}.
        templates: nllb_dist13b_prompts.json, a list by language, or a template for all, such as
            ``{}``, the bare name.
        languages: those that are asked. Null: all that have names and templates.
        name: of this benchmark.
        label_member: extension of the member that holds the number of the class, from 0.
        loading: how the shards are read.

    Source:
        Geigle et al. 2023, arXiv:2306.08658.
    """

    task = "zeroshot_classification"
    parts_are_languages = True

    def __init__(
        self,
        shards: str | list[str],
        classes: str,
        templates: str,
        languages: list[str] | None = None,
        name: str = "babel_imagenet",
        label_member: str = "cls",
        loading: LoadSettings = LoadSettings(),  # noqa: B008 - frozen dataclass
    ) -> None:
        super().__init__(name)
        self._classes = classes
        self._templates = templates
        self._languages = languages
        labels = CaptionRule(members=(label_member,))
        self._shards = BenchmarkShards(shards, labels, loading, name=name)

    def check(self) -> None:
        """Find what is wrong with settings, class names and shards."""
        super().check()
        self._shards.check()
        self._read_languages()

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Classify the pictures in each language; see the base class for the contract.

        Raises:
            UserError: on every rank: features are not finite, a label is no number, no picture has
                a class of a language, or too many samples cannot be used.
        """
        languages = self._read_languages()
        encoded = self._shards.encode(model, encoded_texts=0, group=group)
        check_features(
            [("image_features", encoded.image_features)],
            [("sample_ids", encoded.sample_ids)],
            unit_norm=True,
            group=group,
        )
        labels = parse_labels(encoded, None, self._shards, group=group)
        parts, details = {}, {}
        for language, (numbers, names, templates) in languages.items():
            vectors = class_vectors(model, names, templates, group=group)
            is_own = labels[:, None] == torch.tensor(numbers, device=labels.device)
            has = is_own.any(dim=1)
            own = is_own[has].int().argmax(dim=1)
            predictions, ranks = classify(encoded.image_features[has], vectors, own)
            answers = gather_rows(torch.stack([own, predictions, ranks], dim=1), group)
            if not len(answers):
                raise UserError(
                    f"shards of benchmark {self.name!r} have no picture of a class that has a name "
                    f"in language ({language})"
                )
            found = summarise(*answers.cpu().numpy().T, classes=names)
            parts[language] = found.metrics
            details[language] = {"pictures": len(answers), "classes": len(names)}
        means = {
            name: float(np.mean([metrics[name] for metrics in parts.values()]))
            for name in next(iter(parts.values()))
        }
        return BenchmarkResult(
            means, {"languages": details, "parts": parts, "left_out": encoded.num_bad}
        )

    def _read_languages(self) -> dict[str, tuple[list[int], list[str], list[str]]]:
        """Read numbers and names of classes, and templates, by language."""
        classes = self._read_json(self._classes, "classes")
        shared = None
        if any(place in self._templates for place in PLACES):
            shared = [self._templates]
        templates = {} if shared else self._read_json(self._templates, "templates")
        known = sorted(name for name in classes if shared or name in templates)
        wanted = known if self._languages is None else [each.upper() for each in self._languages]
        unknown = [each for each in wanted if each not in known]
        if unknown or not wanted:
            raise UserError(
                f"languages ({unknown}) of benchmark {self.name!r} must be among those with names "
                f"and templates: {', '.join(known)}"
            )
        check_languages(wanted, f"classes ({self._classes}) of benchmark {self.name!r}")
        return {
            each.lower(): self._names_of(each, classes[each], shared or templates[each])
            for each in wanted
        }

    def _names_of(
        self, language: str, classes: Any, templates: Any
    ) -> tuple[list[int], list[str], list[str]]:
        """Numbers and names of the classes of a language, and its templates."""
        match classes:
            case [[*numbers], [*names]] if (
                len(numbers) == len(names) == len(set(map(str, numbers))) >= _FEWEST_CLASSES
                and all(type(number) is int and 0 <= number <= MOST_LABEL for number in numbers)
                and all(isinstance(name, str) and name.strip() for name in names)
            ):
                return numbers, names, self._templates_of(language, templates)
        raise UserError(
            f"classes ({self._classes}) of benchmark {self.name!r} must hold for language "
            f"{language} a list of different numbers and a list of as many names, {_FEWEST_CLASSES}"
            " or more"
        )

    def _templates_of(self, language: str, templates: Any) -> list[str]:
        if not isinstance(templates, list) or not all(isinstance(each, str) for each in templates):
            raise UserError(
                f"templates ({self._templates}) of benchmark {self.name!r} must hold for language "
                f"{language} a list of texts"
            )
        return read_templates(templates, [])

    def _read_json(self, path: str, what: str) -> dict[str, Any]:
        try:
            content = read_json(path, _MOST_BYTES)
        except (OSError, ValueError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            raise UserError(f"{what} ({path}) cannot be read: {reason}") from error
        if not isinstance(content, dict):
            raise UserError(f"{what} ({path}) must be an object by language")
        return content
