"""Pictures and captions that occur more than once in packed shards.

Pictures are equal by their bytes, and alike if a thumbnail of 9 x 8 grey pixels rises and falls
alike from left to right (a difference hash of 64 bits): copies at another size or quality mostly
are, crops and other pictures mostly are not. Captions are equal by their text.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_siglip.data.index.pairs import PairTable, build_pair_table
from dist_siglip.data.samples.captions import decode_caption
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.identity import caption_id, picture_id
from dist_siglip.data.samples.picture import REDUCTIONS, EncodedPicture
from dist_siglip.data.samples.picture_policy import (
    EXTENSIONS_OF,
    PICTURE_EXTENSIONS,
    PicturePolicy,
    with_formats,
)
from dist_siglip.system.atomic import open_atomically

_CHUNK = 500  # samples that one thread looks at
_MOST_KEYS = 1000  # of a group in the list
_LEAST_SIDE = 72  # pixels that a thumbnail is made of


class Duplicates(NamedTuple):
    """How many samples share what with another one.

    Attributes:
        pictures: bytes of the picture.
        alike: the thumbnail, of pictures of other bytes.
        captions: the first caption.
        pairs: picture and caption.
    """

    pictures: int
    alike: int
    captions: int
    pairs: int


def report_duplicates(
    shards: Sequence[str], out: Path, pictures: PicturePolicy, *, workers: int
) -> Duplicates:
    """Look for what occurs more than once, and list it.

    Args:
        shards: as ``pack`` wrote them.
        out: file for a JSON line about each group: what is the "same" (picture, alike, caption or
            pair), "samples" how many, and their first thousand "keys".
        pictures: what decides the pixels of an encoded picture.
        workers: threads that read and decode.
    """
    table = build_pair_table(
        shards,
        image_extensions=with_formats(PICTURE_EXTENSIONS, EXTENSIONS_OF),
        caption_extensions=("txt", "cls"),
    )
    chunks = np.array_split(np.arange(table.num_samples), -(-table.num_samples // _CHUNK))
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(partial(_describe, table, pictures), chunks))
    picture, thumbnail, caption = np.concatenate(parts, axis=1)
    pair = np.unique(np.stack([picture, caption]), axis=1, return_inverse=True)[1].reshape(-1)
    # Of pictures of equal bytes one stands for all; flat ones are like each other and tell nothing.
    first = np.zeros(len(picture), dtype=bool)
    first[np.unique(picture, return_index=True)[1]] = True
    counts: list[int] = []
    keys = [key for _, key in table.names(range(table.num_samples))]
    with open_atomically(out) as file:
        for same, ids, counted in (
            ("picture", picture, np.ones_like(first)),
            ("alike", thumbnail, first & (thumbnail != 0)),
            ("caption", caption, caption >= 0),
            ("pair", pair, caption >= 0),
        ):
            counts.append(0)
            for group in _groups(ids, np.flatnonzero(counted)):
                counts[-1] += len(group)
                named = [keys[place] for place in group[:_MOST_KEYS]]
                line = {"same": same, "samples": len(group), "keys": named}
                file.write(json.dumps(line).encode() + b"\n")
    return Duplicates(*counts)


def _describe(
    table: PairTable, pictures: PicturePolicy, sample_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return (3, samples): id of picture, thumbnail and caption (-1: there is none)."""
    reader = ShardReader(table.cache)
    found = np.full((3, len(sample_ids)), -1, dtype=np.int64)
    for place, sample_id in enumerate(sample_ids.tolist()):
        data = reader.read(table.image_span(sample_id))
        found[0, place] = picture_id(data)
        encoded = EncodedPicture(data, pictures)
        enough = min(encoded.size) // _LEAST_SIDE
        reduction = next(each for each in REDUCTIONS if each <= max(1, enough))
        found[1, place] = thumbnail_hash(encoded.decode(reduction))
        for kind, span in table.caption_spans(sample_id)[:1]:
            if kind == "txt":
                found[2, place] = caption_id(decode_caption(reader.read(span)))
    reader.close()
    return found


def thumbnail_hash(image: Image.Image) -> int:
    """Hash where a picture gets brighter from left to right; 0 if it nowhere does.

    Example:
        >>> thumbnail_hash(Image.new("RGB", (30, 20), "red"))
        0
    """
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(small).astype(np.int64)
    rises = np.packbits(pixels[:, 1:] > pixels[:, :-1])
    return int(rises.view(">i8")[0])


def _groups(ids: NDArray[np.int64], places: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield the places of each id that occurs more than once among some, in order."""
    order = places[np.argsort(ids[places], kind="stable")]
    ends = np.flatnonzero(np.diff(ids[order])) + 1
    groups = [group for group in np.split(order, ends) if len(group) > 1]
    yield from sorted(groups, key=lambda group: int(group[0]))
