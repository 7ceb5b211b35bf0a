"""Retrieval on pictures in a folder: of several languages, or with captions of paragraphs."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS
from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError, check_least
from dist_siglip.evaluation.benchmark import (
    Benchmark,
    BenchmarkResult,
    EvaluatedModel,
    check_languages,
)
from dist_siglip.evaluation.encoding import DEFAULT_BATCH_ROWS, encode_texts, own_part
from dist_siglip.evaluation.files.pictures import (
    encode_picture_files,
    find_pictures,
    read_annotations,
    text_of,
)
from dist_siglip.evaluation.retrieval import check_top_k, retrieval_metrics
from dist_siglip.system.regular_file import read_regular

_ENGLISH = "en"
_LINES = "captions.jsonl"
_DOCCI = "docci_descriptions.jsonlines"
_KARPATHY = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")
_LONGER = " and so on"
_MOST_CAPTION_BYTES = 1 << 20


class _Captioned(NamedTuple):
    """A picture by name, and its captions by language."""

    picture: str
    captions: dict[str, list[str]]


class FolderRetrieval(Benchmark):
    """Retrieval in both directions, on pictures and captions in a folder.

    Metrics: those of ``Retrieval``, of several languages the mean, with each language as a part.
    A picture without a caption in a language is not in the gallery of that language.

    Layouts of the folder:

    - Crossmodal-3600: captions.jsonl as published, pictures in images/;
    - Urban1k: image/NAME.jpg, caption/NAME.txt; other folders of ShareGPT4V's form, too;
    - DOCCI: docci_descriptions.jsonlines, images/, of which the split "test" counts;
    - Karpathy's dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json, likewise;
    - any other: captions.jsonl, {"image": "a.jpg", "captions": ...} a line, where captions are a
      text, a list of texts, or an object of these by language.

    Args:
        folder: of captions and pictures.
        name: of this benchmark.
        images: folder of the pictures. Null: images in the folder, or the folder.
        languages: those that are asked. Null: all that are there.
        most_captions: of a picture in each language, the first ones; 1 is what CLIP_benchmark
            takes of Crossmodal-3600. Null: all.
        top_k: the K of recall@K.
        local_batch_size: pictures and captions that a rank encodes together.

    Source:
        Thapliyal et al. 2022, arXiv:2205.12522 (Crossmodal-3600); Zhang et al. 2024,
        arXiv:2403.15378 (Urban1k); Onoe et al. 2024, arXiv:2404.19753 (DOCCI).
    """

    task = "zeroshot_retrieval"
    parts_are_languages = True

    def __init__(
        self,
        folder: str,
        name: str = "folder_retrieval",
        images: str | None = None,
        languages: list[str] | None = None,
        most_captions: int | None = None,
        top_k: Sequence[int] = (1, 5, 10),
        local_batch_size: int = DEFAULT_BATCH_ROWS,
    ) -> None:
        super().__init__(name)
        self._folder = Path(folder)
        self._images = images
        self._languages = languages
        self._most_captions = most_captions
        self._top_k = tuple(top_k)
        self._local_batch_size = local_batch_size

    def check(self) -> None:
        """Find what is wrong with settings and files."""
        super().check()
        check_top_k(self._top_k, self.name)
        check_least(1, most_captions=self._most_captions, local_batch_size=self._local_batch_size)
        found = self._read()
        self._languages_of(found)
        self._find(found)

    def evaluate(
        self, model: EvaluatedModel, *, group: ProcessGroup | None = None
    ) -> BenchmarkResult:
        """Look for every caption and every picture in each language; see the base class.

        Raises:
            UserError: on every rank: a picture cannot be used, or features are not finite.
        """
        found = self._read()
        paths = self._find(found)
        images = encode_picture_files(
            model,
            [paths[each.picture] for each in found],
            batch_rows=self._local_batch_size,
            group=group,
        )
        parts, details = {}, {}
        for language in self._languages_of(found):
            parts[language], details[language] = self._ask(model, found, images, language, group)
        means = {
            name: math.fsum(metrics[name] for metrics in parts.values()) / len(parts)
            for name in next(iter(parts.values()))
        }
        if self._languages is None and set(parts) == {_ENGLISH}:
            parts = {}
        return BenchmarkResult(means, {"languages": details, "parts": parts})

    def _ask(
        self,
        model: EvaluatedModel,
        found: list[_Captioned],
        images: Tensor,
        language: str,
        group: ProcessGroup | None,
    ) -> tuple[dict[str, float], dict[str, Any]]:
        has = [row for row, each in enumerate(found) if each.captions.get(language)]
        captions = [found[row].captions[language][: self._most_captions] for row in has]
        texts = [text for own in captions for text in own]
        owners = torch.tensor(
            [row for row, own in zip(has, captions, strict=True) for _ in own], device=images.device
        )
        features = encode_texts(model, texts, batch_rows=self._local_batch_size, group=group)
        rows = torch.tensor(has, device=images.device)
        mine, said = own_part(len(rows), group), own_part(len(texts), group)
        metrics, num_images, num_texts = retrieval_metrics(
            images[rows[mine]],
            features[said],
            rows[mine],
            owners[said],
            self._top_k,
            group=group,
        )
        num_full = torch.tensor(count_full(model.tokenizer, texts[said]), device=images.device)
        return metrics, {
            "pictures": num_images,
            "captions": num_texts,
            "captions_that_fill_the_context": int(sum_over_ranks(num_full, group)),
        }

    def _languages_of(self, found: list[_Captioned]) -> list[str]:
        present = sorted({name for each in found for name, own in each.captions.items() if own})
        unknown = [name for name in self._languages or () if name not in present]
        if unknown or self._languages == []:
            raise UserError(
                f"languages ({unknown or []}) of benchmark {self.name!r} must be among those of "
                f"{self._folder}: {', '.join(present)}"
            )
        check_languages(self._languages or present, self._setting)
        return self._languages or present

    @property
    def _setting(self) -> str:
        return f"folder ({self._folder}) of benchmark {self.name!r}"

    def _find(self, found: list[_Captioned]) -> dict[str, Path]:
        folders = [self._folder / "images", self._folder / "image", self._folder]
        if self._images is not None:
            folders = [Path(self._images)]
        return find_pictures((each.picture for each in found), folders, self._setting)

    def _read(self) -> list[_Captioned]:
        """Read names and captions of the pictures, in whatever layout they are."""
        names = (_LINES, _DOCCI, *_KARPATHY)
        path = next((p for name in names if (p := self._folder / name).is_file()), None)
        is_pairs = path is None and (self._folder / "caption").is_dir()
        if path is None and not is_pairs:
            raise UserError(
                f"{self._setting} has neither {', '.join(names)} nor image/ and caption/; name the "
                "folder that holds them"
            )
        content = None if path is None else read_annotations(path, self._setting)
        try:
            if path is None:
                path = self._folder / "caption"
                found = list(_pairs_in(self._folder))
            else:
                found = list(_captioned_in(path.name, content))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{self._setting}: {path} cannot be used: {reason}") from error
        if not any(own for each in found for own in each.captions.values()):
            raise UserError(f"{self._setting}: {path} has no caption that counts")
        return found


def _captioned_in(file: str, content: Any) -> Iterator[_Captioned]:
    """Read the pictures of an annotation file."""
    if file == _DOCCI:
        for row in content:
            if row["split"] == "test":
                yield _Captioned(str(row["image_file"]), {_ENGLISH: [text_of(row["description"])]})
    elif file in _KARPATHY:
        for row in content["images"]:
            if row["split"] == "test":
                name = "/".join(filter(None, (row.get("filepath"), row["filename"])))
                captions = [text_of(each["raw"]) for each in row["sentences"]]
                yield _Captioned(name, {_ENGLISH: captions})
    else:
        for row in content:
            if "image/key" in row:  # Crossmodal-3600
                own = {
                    name: _texts_of(value["caption"])
                    for name, value in row.items()
                    if isinstance(value, dict) and "caption" in value
                }
                yield _Captioned(str(row["image/key"]), own)
            elif isinstance(row["captions"], dict):
                own = {str(name): _texts_of(value) for name, value in row["captions"].items()}
                yield _Captioned(str(row["image"]), own)
            else:
                yield _Captioned(str(row["image"]), {_ENGLISH: _texts_of(row["captions"])})


def _texts_of(value: Any) -> list[str]:
    return [text_of(each) for each in ([value] if isinstance(value, str) else value)]


def _pairs_in(folder: Path) -> Iterator[_Captioned]:
    """Read the pictures of image/ whose captions are in caption/, by their names."""
    captions = {path.stem: path for path in sorted((folder / "caption").glob("*.txt"))}
    pictures = {
        path.stem: path.name
        for path in sorted((folder / "image").glob("*"))
        if path.suffix.lower().lstrip(".") in PICTURE_EXTENSIONS
    }
    lone = sorted(captions.keys() ^ pictures.keys())
    if lone:
        raise ValueError(f"{len(lone)} files of image/ and caption/ are no pairs, first {lone[0]}")
    for stem, path in captions.items():
        text = read_regular(path, _MOST_CAPTION_BYTES).decode()
        yield _Captioned(pictures[stem], {_ENGLISH: [text_of(" ".join(text.split()))]})


def count_full(tokenizer: Callable[[list[str]], Tensor], texts: Sequence[str]) -> int:
    """Count texts whose tokens do not change if something is added: the rest was cut, or just fits.

    Args:
        tokenizer: list of strings to (B, L) token ids.
        texts: of this rank.

    Example:
        >>> count_full(lambda texts: torch.tensor([[ord(t[0]), len(t[:4])] for t in texts]), ["a"])
        0
    """
    num_full = 0
    for start in range(0, len(texts), DEFAULT_BATCH_ROWS):
        part = list(texts[start : start + DEFAULT_BATCH_ROWS])
        longer = tokenizer([text + _LONGER for text in part])
        num_full += int((tokenizer(part) == longer).all(dim=1).sum())
    return num_full
