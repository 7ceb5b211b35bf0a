"""Statistics of the pictures and captions of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import (
    EMPTY_CAPTION,
    CaptionRule,
    EmptyCaptions,
    Tokenizer,
    caption_id,
    caption_ids_of,
    picture_id,
)
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.picture import EncodedPicture, sniff_media_type
from dist_siglip.data.samples.picture_policy import PicturePolicy

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Measured(NamedTuple):
    """Samples that could be read, row by row.

    Attributes:
        numbers: (samples, 4) float64: width and height in pixels, bytes of the picture, characters
            of the caption.
        formats: media type of each picture.
        caption_ids: (samples,) int64, equal for equal captions: texts, or tokens.
        picture_ids: (samples,) int64, equal for equal bytes.
        num_bad: samples that could not be used.
        num_empty: those of them whose caption is empty.
        num_transparent: pictures that say that they have transparent pixels.
    """

    numbers: NDArray[np.float64]
    formats: list[str]
    caption_ids: NDArray[np.int64]
    picture_ids: NDArray[np.int64]
    num_bad: int
    num_empty: int = 0
    num_transparent: int = 0


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """Measures samples of a table; only headers of pictures are decoded.

    Args:
        table: where the members are.
        captions: which caption counts; of several, the first.
        pictures: what decides the size of an encoded picture, and how large one may be.
        tokenizer: captions of equal tokens are equal, and those without a token empty; None
            compares texts.
    """

    table: PairTable
    captions: CaptionRule
    pictures: PicturePolicy
    tokenizer: Tokenizer | None = None

    def __call__(self, sample_ids: Sequence[int]) -> Measured:
        """Measure samples, by id."""
        reader, first = ShardReader(self.table.cache), self.captions.always_first()
        is_empty = EmptyCaptions(self.tokenizer)
        numbers, formats, pictures, num_bad = [], [], [], 0
        captions: list[str] = []
        num_empty = num_transparent = 0
        for sample_id in sample_ids:
            try:
                data = reader.read(self.table.image_span(sample_id))
                encoded = EncodedPicture(data, self.pictures)
                media = sniff_media_type(data)
                spans = self.table.caption_spans(sample_id)
                members = ((kind, reader.read(span)) for kind, span in spans)
                text = first.choose(members, (0,), is_empty=is_empty)
            except BadSampleError as error:
                num_bad += 1
                num_empty += str(error) == EMPTY_CAPTION
                continue
            numbers.append((*encoded.size, len(data), len(text)))
            num_transparent += encoded.has_transparency
            formats.append(media.removeprefix("image/"))
            captions.append(text)
            pictures.append(picture_id(data))
        reader.close()
        return Measured(
            np.array(numbers, dtype=np.float64).reshape(-1, 4),
            formats,
            np.array(self._identify(captions), dtype=np.int64),
            np.array(pictures, dtype=np.int64),
            num_bad,
            num_empty,
            num_transparent,
        )

    def _identify(self, captions: list[str]) -> list[int]:
        if self.tokenizer is None or not captions:
            return [caption_id(text) for text in captions]
        tokens = self.tokenizer(captions).long()
        return caption_ids_of(self.tokenizer, captions, tokens).tolist()


def choose_samples(num_samples: int, most: int | None, seed: int) -> NDArray[np.int64]:
    """Choose at most so many samples, evenly at random, in their order.

    Example:
        >>> choose_samples(5, None, 0).tolist(), len(choose_samples(1000, 10, 0))
        ([0, 1, 2, 3, 4], 10)
    """
    if most is None or most >= num_samples:
        return np.arange(num_samples)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    return np.sort(generator.choice(num_samples, most, replace=False))


def summarize(parts: Sequence[Measured]) -> dict[str, object]:
    """Join measurements into plain values for a table or JSON.

    Returns:
        samples, bad, and empty_captions among those; transparent; quantiles (see ``QUANTILES``) of
        width, height, short_side, aspect_ratio (width / height), picture_bytes,
        caption_characters; formats; and of captions and pictures how many are distinct, how many
        samples share theirs with another, and how many have the most common one.
    """
    numbers = np.concatenate([part.numbers for part in parts] or [np.zeros((0, 4))])
    width, height, size, characters = numbers.T
    columns = {
        "width": width,
        "height": height,
        "short_side": np.minimum(width, height),
        "aspect_ratio": width / height,
        "picture_bytes": size,
        "caption_characters": characters,
    }
    kinds, counts = np.unique([f for part in parts for f in part.formats], return_counts=True)
    return {
        "samples": len(numbers),
        "bad": sum(part.num_bad for part in parts),
        "empty_captions": sum(part.num_empty for part in parts),
        "transparent": sum(part.num_transparent for part in parts),
        "quantiles": {
            name: np.quantile(values, QUANTILES).tolist() if len(values) else []
            for name, values in columns.items()
        },
        "formats": dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
        "captions": _sharing(parts, "caption_ids"),
        "pictures": _sharing(parts, "picture_ids"),
    }


def _sharing(parts: Sequence[Measured], field: str) -> dict[str, int]:
    ids = np.concatenate([getattr(part, field) for part in parts] or [np.zeros(0, np.int64)])
    _, counts = np.unique(ids, return_counts=True)
    return {
        "distinct": len(counts),
        "shared": int(counts[counts > 1].sum()),
        "most": int(counts.max(initial=0)),
    }
