"""Where are the picture and the caption of sample number i?

A ``PairTable`` joins the indices of all shards of one data set into flat arrays, 32 bytes a sample,
numbered shard after shard in the order given. Building it is the check before training: a shard
that is damaged, or a sample that lacks its picture or its caption, is found here and nowhere later.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.index import ShardIndex, load_index
from dist_siglip.errors import UserError

CAPTION_EXTENSION = "txt"
_READERS = 8  # threads that wait for a slow file system together


class Span(NamedTuple):
    """The bytes of one member: which shard, from where, how many."""

    shard: str
    offset: int
    size: int


@dataclass(frozen=True, eq=False, kw_only=True)
class PairTable:
    """Pictures and captions of a data set by sample id.

    Attributes:
        shards: the tar files, in order.
        starts: (shards + 1,) int64, the id of the first sample of each shard; last, the total.
        image_offsets: (samples,) int64.
        image_sizes: (samples,) int64.
        caption_offsets: (samples,) int64.
        caption_sizes: (samples,) int64.
        fingerprint: hash of shard names, member names, offsets and sizes.
        shard_lines: a line for each shard, "name<TAB>samples<TAB>hash", which tells changes apart.
    """

    shards: tuple[str, ...]
    starts: NDArray[np.int64]
    image_offsets: NDArray[np.int64]
    image_sizes: NDArray[np.int64]
    caption_offsets: NDArray[np.int64]
    caption_sizes: NDArray[np.int64]
    fingerprint: str
    shard_lines: str

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return int(self.starts[-1])

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(int(count) for count in np.diff(self.starts))

    def image_span(self, sample_id: int) -> Span:
        """Say where the encoded picture of a sample lies."""
        shard = self.shards[self._shard_of(sample_id)]
        return Span(shard, int(self.image_offsets[sample_id]), int(self.image_sizes[sample_id]))

    def caption_span(self, sample_id: int) -> Span:
        """Say where the caption of a sample lies."""
        shard = self.shards[self._shard_of(sample_id)]
        return Span(shard, int(self.caption_offsets[sample_id]), int(self.caption_sizes[sample_id]))

    def shard_range(self, sample_id: int) -> tuple[int, int]:
        """Return the first id of a sample's shard, and the id after its last."""
        shard = self._shard_of(sample_id)
        return int(self.starts[shard]), int(self.starts[shard + 1])

    def describe(self, sample_id: int) -> str:
        """Name a sample for a log line, as ``shard/key``; reads the index of its shard again."""
        number = self._shard_of(sample_id)
        shard, place = self.shards[number], sample_id - int(self.starts[number])
        try:
            return ascii(f"{shard}/{load_index(shard).keys()[place]}")
        except (OSError, UserError, IndexError):  # the shard changed or vanished since
            return f"{shard!r}, sample {place}"

    def _shard_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self.starts, sample_id, side="right")) - 1


def build_pair_table(
    shards: Sequence[str], *, image_extensions: Sequence[str], name: str = "shards"
) -> PairTable:
    """Index shards and join them into one table.

    A sample may hold other members (they are ignored); of several pictures the one whose
    extension comes first in ``image_extensions`` counts. Fresh side-cars are used, missing ones
    written.

    Args:
        shards: local tar files.
        image_extensions: extensions of the picture, without the dot, in order of preference.
        name: the setting the shards came from, for error texts.

    Raises:
        UserError: if a shard is damaged, a sample lacks its picture or its caption, or there is
            no sample at all.
    """
    extensions = [extension.lower().lstrip(".") for extension in image_extensions]
    with ThreadPoolExecutor(max_workers=_READERS) as readers:
        indices = list(readers.map(load_index, shards))
    images = [_select(index, extensions, "picture") for index in indices]
    captions = [_select(index, [CAPTION_EXTENSION], "caption") for index in indices]
    starts = np.cumsum([0] + [index.num_samples for index in indices], dtype=np.int64)
    if starts[-1] == 0:
        raise UserError(
            f"{name} holds no samples in {len(indices)} shards; a sample is a picture "
            f"({_listed(extensions)}) and a caption (.{CAPTION_EXTENSION}) of the same name"
        )
    digest = hashlib.blake2b(digest_size=8)
    lines = [
        f"{ascii(os.path.basename(index.path))[1:-1]}\t{index.num_samples}\t{index.digest[:16]}"
        for index in indices
    ]
    for index in indices:
        line = f"{os.path.basename(index.path)}\0{index.num_samples}\0{index.digest}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return PairTable(
        shards=tuple(shards),
        starts=starts,
        image_offsets=np.concatenate([offsets for offsets, _ in images]),
        image_sizes=np.concatenate([sizes for _, sizes in images]),
        caption_offsets=np.concatenate([offsets for offsets, _ in captions]),
        caption_sizes=np.concatenate([sizes for _, sizes in captions]),
        fingerprint=digest.hexdigest(),
        shard_lines="\n".join(lines),
    )


def _select(
    index: ShardIndex, extensions: Sequence[str], what: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and sizes of the preferred member of every sample of one shard."""
    offsets = np.full(index.num_samples, -1, dtype=np.int64)
    sizes = np.zeros(index.num_samples, dtype=np.int64)
    for extension in reversed(extensions):  # the preferred one is written last
        if extension in index.extensions:
            chosen = index.kinds == index.extensions.index(extension)
            offsets[index.samples[chosen]] = index.offsets[chosen]
            sizes[index.samples[chosen]] = index.sizes[chosen]
    missing = np.flatnonzero(offsets < 0)
    if missing.size:
        present = ", ".join(f".{extension}" for extension in index.extensions[:8])
        raise UserError(
            f"shard {index.path!r}: {missing.size} of {index.num_samples} samples have no {what} "
            f"({_listed(extensions)}), first {index.keys()[missing[0]]!r}; the shard holds "
            f"{present}: write it again with both members of every sample"
        )
    return offsets, sizes


def _listed(extensions: Sequence[str]) -> str:
    return ", ".join(f".{extension}" for extension in extensions)
