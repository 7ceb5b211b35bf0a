"""The rows that one shard adds to a table of pairs.

Of every sample the preferred picture and all captions are picked; what is missing is told.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.damage import Damage
from dist_siglip.data.remote.locations import redact
from dist_siglip.data.shard_index import ShardIndex, explain_dots


class ShardRows(NamedTuple):
    """The rows one shard adds to a table."""

    image_offsets: NDArray[np.int64]
    image_sizes: NDArray[np.int64]
    caption_offsets: NDArray[np.int64]
    caption_sizes: NDArray[np.int64]
    dropped: list[int]

    @property
    def num_samples(self) -> int:
        """Complete samples of the shard."""
        return len(self.image_offsets)

    @classmethod
    def of(
        cls,
        index: ShardIndex,
        pictures: list[str],
        captions: list[str],
        others: list[str],
        damage: Damage,
    ) -> "ShardRows":
        """Pick the members of every sample; tell ``damage`` what is missing."""
        if index.damage:
            damage.shard(index.damage)
        image_offsets, image_sizes = _select(index, pictures)
        of_captions = [_select(index, [extension]) for extension in (*captions, *others)]
        caption_offsets = np.stack([offsets for offsets, _ in of_captions])
        caption_sizes = np.stack([sizes for _, sizes in of_captions])
        has_picture = image_offsets >= 0
        has_caption = (caption_offsets[: len(captions)] >= 0).any(axis=0)
        for what, has, extensions in (
            ("picture", has_picture, pictures),
            ("caption", has_caption | ~has_picture, captions),
        ):
            missing = np.flatnonzero(~has)
            if missing.size:
                key, hints = index.keys()[missing[0]], [index.note]
                hints.append(explain_dots(key, index.members_of(int(missing[0])), extensions))
                hint = "".join(f" ({hint})" for hint in hints if hint)
                present = ", ".join(f".{extension}" for extension in index.extensions[:8])
                few = f"{missing.size} of {index.num_samples} samples"
                damage.samples(
                    missing.size,
                    f"shard {redact(index.path)!r}: {few} have no {what} ({listed(extensions)}), "
                    f"first {key!r}{hint}; the shard holds {present}: write it again with both "
                    "members of every sample",
                )
        whole = has_picture & has_caption
        return cls(
            image_offsets[whole],
            image_sizes[whole],
            caption_offsets[:, whole],
            caption_sizes[:, whole],
            np.flatnonzero(~whole).tolist(),
        )


def _select(
    index: ShardIndex, extensions: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets (-1: none) and sizes of the preferred member of every sample of one shard."""
    offsets = np.full(index.num_samples, -1, dtype=np.int64)
    sizes = np.zeros(index.num_samples, dtype=np.int64)
    for extension in reversed(extensions):  # the preferred one is written last
        if extension in index.extensions:
            chosen = index.kinds == index.extensions.index(extension)
            offsets[index.samples[chosen]] = index.offsets[chosen]
            sizes[index.samples[chosen]] = index.sizes[chosen]
    return offsets, sizes


def listed(extensions: Sequence[str]) -> str:
    """Write extensions with their dots, for a text."""
    return ", ".join(f".{extension}" for extension in extensions)
