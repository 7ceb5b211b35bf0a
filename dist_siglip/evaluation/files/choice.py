"""Compositional choice: which of a few captions belongs to a picture, which picture to a caption.

The wrong ones have the same words, or all but one; a model that sees a bag of words chooses by
chance.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.errors import UserError, check_least
from dist_siglip.evaluation.benchmark import Benchmark, BenchmarkResult, EvaluatedModel
from dist_siglip.evaluation.encoding import DEFAULT_BATCH_ROWS, encode_texts
from dist_siglip.evaluation.files.pictures import (
    Box,
    encode_picture_files,
    find_pictures,
    read_annotations,
    text_of,
)
from dist_siglip.metrics.rows import check_features

_LEAST_OF_KIND = 25  # questions; as the authors of ARO have it
_WINOGROUND = "examples.jsonl"
_OWN = "choices.jsonl"
_SUGARCREPE = tuple(
    f"{way}_{what}"
    for way, whats in (("add", "att obj"), ("replace", "att obj rel"), ("swap", "att obj"))
    for what in whats.split()
)
_ARO = ("visual_genome_relation", "visual_genome_attribution")


class Choice(NamedTuple):
    """One question: the i-th picture belongs to the i-th caption, for all i that both have.

    Attributes:
        pictures: names, with or without ending, and what is seen of each.
        captions: at least two, or there are two pictures.
        kind: of the question, such as the relation that is asked; empty for none.
    """

    pictures: tuple[tuple[str, Box | None], ...]
    captions: tuple[str, ...]
    kind: str = ""


class CaptionChoice(Benchmark):
    """Choice among a few captions, and among a few pictures: Winoground, SugarCrepe, ARO.

    Metrics, with CLIP_benchmark's names: ``text_acc``, every picture of a question chooses its
    caption (Winoground's text score, the accuracy of SugarCrepe and ARO); ``image_acc``, every
    caption its picture (image score; only where there are several pictures); ``acc``, both (group
    score). Ties are wrong. A folder with several files gives the mean of its parts, each of
    which counts once. Where kinds are known, ``macro_acc`` is the mean over the kinds with 25
    questions or more of their ``acc``.

    Layouts of the folder, or of ``data`` in it:

    - Winoground: examples.jsonl;
    - SugarCrepe: add_att.json, add_obj.json, replace_att.json, ..., those that are there;
    - ARO: visual_genome_relation.json, visual_genome_attribution.json; pictures are cut to boxes;
    - any other: choices.jsonl, {"images": [...], "captions": [...], "kind": "..."} a line.

    Args:
        folder: of the annotations.
        name: of this benchmark.
        images: folder of the pictures. Null: images, data/images or val2017 in the folder, or the
            folder.
        local_batch_size: pictures that a rank encodes together.

    Source:
        Thrush et al. 2022, arXiv:2204.03162, equations 1 to 3; Hsieh et al. 2023,
        arXiv:2306.14610; Yuksekgonul et al. 2023, arXiv:2210.01936.
    """

    task = "image_caption_selection"

    def __init__(
        self,
        folder: str,
        name: str = "caption_choice",
        images: str | None = None,
        local_batch_size: int = DEFAULT_BATCH_ROWS,
    ) -> None:
        super().__init__(name)
        self._folder = Path(folder)
        self._images = images
        self._local_batch_size = local_batch_size

    def check(self) -> None:
        """Find what is wrong with settings and files."""
        super().check()
        check_least(1, local_batch_size=self._local_batch_size)
        for choices in self._read().values():
            self._find(choices)

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Ask every question; see the base class for the contract.

        Raises:
            UserError: on every rank: a picture cannot be used, or features are not finite.
        """
        parts, details = {}, {}
        for part, choices in self._read().items():
            parts[part], details[part] = self._ask(model, choices, group)
        names = list(dict.fromkeys(name for metrics in parts.values() for name in metrics))
        means = {
            name: math.fsum(values) / len(values)
            for name in names
            if (values := [metrics[name] for metrics in parts.values() if name in metrics])
        }
        parts = parts if len(parts) > 1 else {}
        return BenchmarkResult(means, {"questions": details, "parts": parts})

    def _ask(
        self, model: EvaluatedModel, choices: list[Choice], group: ProcessGroup | None
    ) -> tuple[dict[str, float], dict[str, Any]]:
        found = self._find(choices)
        shown = list(dict.fromkeys(picture for each in choices for picture in each.pictures))
        said = list(dict.fromkeys(caption for each in choices for caption in each.captions))
        images = encode_picture_files(
            model,
            [found[name] for name, _ in shown],
            boxes=[box for _, box in shown],
            batch_rows=self._local_batch_size,
            group=group,
        )
        texts = encode_texts(model, said, batch_rows=self._local_batch_size, group=group)
        check_features(
            [("image_features", images), ("text_features", texts)], unit_norm=True, group=group
        )
        place = {picture: row for row, picture in enumerate(shown)}
        said_at = {caption: row for row, caption in enumerate(said)}
        right = torch.empty(len(choices), 2, dtype=torch.bool)
        shapes: dict[tuple[int, int], list[int]] = {}
        for number, each in enumerate(choices):
            shapes.setdefault((len(each.pictures), len(each.captions)), []).append(number)
        for numbers in shapes.values():
            of_images = torch.tensor([[place[p] for p in choices[n].pictures] for n in numbers])
            of_texts = torch.tensor([[said_at[c] for c in choices[n].captions] for n in numbers])
            right[torch.tensor(numbers)] = right_choices(images, texts, of_images, of_texts).cpu()
        return _metrics(choices, right)

    def _find(self, choices: list[Choice]) -> dict[str, Path]:
        names = ("images", "data/images", "val2017", ".")
        folders = [self._folder / name for name in names]
        if self._images is not None:
            folders = [Path(self._images)]
        return find_pictures(
            (name for each in choices for name, _ in each.pictures), folders, self._setting
        )

    @property
    def _setting(self) -> str:
        return f"folder ({self._folder}) of benchmark {self.name!r}"

    def _read(self) -> dict[str, list[Choice]]:
        """Read the questions of every file that is there."""
        names = (_WINOGROUND, _OWN, *(f"{stem}.json" for stem in (*_SUGARCREPE, *_ARO)))
        places = [
            [path for name in names if (path := folder / name).is_file()]
            for folder in (self._folder, self._folder / "data")
        ]
        paths = next(filter(None, places), [])
        if not paths:
            raise UserError(
                f"{self._setting} has no {_WINOGROUND} (Winoground), add_att.json ... (SugarCrepe),"
                f" {_ARO[0]}.json (ARO) or {_OWN}; name the folder that holds them"
            )
        return {path.stem: self._questions_in(path) for path in paths}

    def _questions_in(self, path: Path) -> list[Choice]:
        content = read_annotations(path, self._setting)
        try:
            found = list(_choices_in(path, content))
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{self._setting}: {path} cannot be used: {reason}") from error
        if not found:
            raise UserError(f"{self._setting}: {path} has no question")
        return found


def _choices_in(path: Path, content: Any) -> Iterator[Choice]:
    """Read the questions of a file of one of the layouts."""
    if path.name == _WINOGROUND:
        for row in content:
            pictures = tuple((str(row[f"image_{i}"]), None) for i in (0, 1))
            captions = tuple(text_of(row[f"caption_{i}"]) for i in (0, 1))
            yield Choice(pictures, captions, str(row.get("collapsed_tag", "")))
    elif path.name == _OWN:
        for row in content:
            captions = tuple(map(text_of, row["captions"]))
            pictures = tuple((str(name), None) for name in row["images"])
            if not (pictures and captions) or len(pictures) + len(captions) < 3:
                raise ValueError("a question needs pictures and captions, of one of them several")
            yield Choice(pictures, captions, str(row.get("kind", "")))
    elif path.stem in _SUGARCREPE:
        for row in content.values():
            captions = (text_of(row["caption"]), text_of(row["negative_caption"]))
            yield Choice(((str(row["filename"]), None),), captions)
    else:
        for row in content:
            left, top, width, height = (int(row[f"bbox_{side}"]) for side in "xywh")
            kind = row.get("relation_name") or "_".join(map(str, row.get("attributes", ())))
            captions = (text_of(row["true_caption"]), text_of(row["false_caption"]))
            box = (left, top, left + width, top + height)
            yield Choice(((str(row["image_path"]), box),), captions, str(kind))


def right_choices(images: Tensor, texts: Tensor, of_images: Tensor, of_texts: Tensor) -> Tensor:
    """Tell which questions are answered rightly, of questions with equally many choices.

    With s_ij the inner product of picture i and caption j of a question,

        text_i = s_ii > s_ij for all j != i,    image_i = s_ii > s_ji for all j != i

    Args:
        images: (N, D).
        texts: (T, D).
        of_images: (Q, I) int64 rows of the pictures of each question.
        of_texts: (Q, C) int64 rows of its captions.

    Returns:
        (Q, 2) bool: whether all text_i are true, and all image_i, for i below I and C.

    Example:
        >>> images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [2.0, 0.5]])
        >>> right_choices(images, texts, torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
        tensor([[False, False]])
    """
    device = images.device
    scores = torch.bmm(
        images[of_images.to(device)].double(), texts[of_texts.to(device)].double().mT
    )
    count = min(scores.shape[1:])
    own = scores.diagonal(dim1=1, dim2=2)[:, :count]
    others = scores.clone()
    others.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    by_image = (own > others.amax(dim=2)[:, :count]).all(dim=1)
    by_text = (own > others.amax(dim=1)[:, :count]).all(dim=1)
    return torch.stack([by_image, by_text], dim=1)


def _metrics(choices: list[Choice], right: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    """Shares of the questions, and of those of each kind."""
    both = right.all(dim=1)

    def share(hits: Tensor) -> float:
        return float(hits.double().mean())

    metrics = {"text_acc": share(right[:, 0]), "acc": share(both)}
    if any(len(each.pictures) > 1 for each in choices):
        metrics["image_acc"] = share(right[:, 1])
    by_kind: dict[str, list[bool]] = {}
    for each, is_right in zip(choices, both.tolist(), strict=True):
        if each.kind:
            by_kind.setdefault(each.kind, []).append(is_right)
    kinds = {
        kind: {"questions": len(hits), "acc": sum(hits) / len(hits)}
        for kind, hits in sorted(by_kind.items())
    }
    large = [row["acc"] for row in kinds.values() if row["questions"] >= _LEAST_OF_KIND]
    if large:
        metrics["macro_acc"] = math.fsum(large) / len(large)
    return metrics, {"questions": len(choices), "kinds": kinds}
