"""Distinct pictures and captions of all ranks, and which of them are positive pairs.

Rows are pairs, and what a row shows may occur again: a picture with five captions has five rows, a
caption may stand under several pictures. Retrieval ranks every distinct picture and caption once,
that of the lowest sample id. A picture and a caption are a positive pair if any row has both.
Every row is a query; rows of one picture have one rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import gather_rows
from dist_siglip.metrics.rows import mark_first


class PositivePairs(NamedTuple):
    """Positive pairs of images and texts, by their ids.

    Attributes:
        pairs: (E, 2) int64, image id and text id of each, the same on every rank, without repeats
            and in rising order; None: where the ids are equal.
    """

    pairs: Tensor | None = None

    def between(self, image_ids: Tensor, text_ids: Tensor, side: int) -> "PositiveTiles":
        """Find the positive pairs of a shard of texts for each rectangle, with one or two reads.

        Args:
            image_ids: (R,) int64.
            text_ids: (C,) int64.
            side: of the rectangles, those of ``tile_slices``.

        Example:
            >>> pairs = torch.tensor([[1, 7], [1, 8], [2, 8]])
            >>> found = PositivePairs(pairs).between(torch.tensor([1, 2]), torch.tensor([8, 7]), 2)
            >>> found.mask(slice(0, 2), slice(0, 2))
            tensor([[ True,  True],
                    [ True, False]])
        """
        return PositiveTiles(self, image_ids, text_ids, side)

    def contains(self, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Mark single images and texts that are positive pairs.

        Example:
            >>> pairs = torch.tensor([[1, 7], [1, 8], [2, 8]])
            >>> PositivePairs(pairs).contains(torch.tensor([1, 2, 3]), torch.tensor([8, 7, 8]))
            tensor([ True, False, False])
        """
        if self.pairs is None:
            return image_ids == text_ids
        known = [self.pairs[:, side].unique() for side in (0, 1)]
        # A pair as one number; the numbers of rising pairs rise.
        codes, _ = _encode(known, self.pairs[:, 0], self.pairs[:, 1])
        wanted, is_known = _encode(known, *torch.broadcast_tensors(image_ids, text_ids))
        places = torch.searchsorted(codes, wanted).clamp(max=len(codes) - 1)
        return is_known & (codes[places] == wanted)

    def swapped(self) -> "PositivePairs":
        """Exchange the roles of images and texts."""
        return self if self.pairs is None else PositivePairs(self.pairs.flip(1).unique(dim=0))


class PositiveTiles:
    """Positive pairs of R images and the C texts of a shard, rectangle by rectangle.

    What the host must know of the rectangles it reads at once, here; ``mask`` reads nothing.

    Attributes:
        shape: (R, C).
    """

    def __init__(
        self, positives: PositivePairs, image_ids: Tensor, text_ids: Tensor, side: int
    ) -> None:
        self.shape = len(image_ids), len(text_ids)
        self._image_ids, self._text_ids, self._side = image_ids, text_ids, side
        self._pairs: tuple[Tensor, Tensor] | None = None
        if positives.pairs is None:
            self._counts = self._count_equal()
            return
        pairs = positives.pairs
        rows, texts = _look_up(image_ids, pairs[:, 0].contiguous(), pairs[:, 1])
        ordered, order = text_ids.sort()
        places, columns = _look_up(texts, ordered, order)
        self._pairs = rows[places], columns
        across = -(-self.shape[1] // side)
        counts = rows.new_zeros(max(1, -(-self.shape[0] // side) * across))
        tiles = self._pairs[0] // side * across + columns // side
        counts.scatter_add_(0, tiles, torch.ones_like(tiles))
        self._counts = counts.tolist()

    def _count_equal(self) -> list[int]:
        """Count equal ids by rectangle, row by row."""
        counts = []
        columns = [part.sort().values for part in self._text_ids.split(self._side)]
        for rows in self._image_ids.split(self._side):
            for ids in columns:
                first, last = (torch.searchsorted(ids, rows, right=end) for end in (False, True))
                counts.append((last - first).sum())
        found: list[int] = torch.stack(counts).tolist() if counts else []
        return found

    def count(self, rows: slice, columns: slice) -> int:
        """Positive pairs of a rectangle; known to the host."""
        across = -(-self.shape[1] // self._side)
        place = rows.start // self._side * across + columns.start // self._side
        return self._counts[place] if place < len(self._counts) else 0

    def mask(self, rows: slice, columns: slice) -> Tensor | None:
        """Mark the positive pairs of a rectangle; None where it has none, as most have."""
        if not self.count(rows, columns):
            return None
        if self._pairs is None:
            return self._image_ids[rows, None] == self._text_ids[None, columns]
        height, width = rows.stop - rows.start, columns.stop - columns.start
        row, column = self._pairs[0] - rows.start, self._pairs[1] - columns.start
        is_here = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        # What lies elsewhere is marked in a cell of its own.
        cells = torch.where(is_here, row * width + column, height * width)
        found = torch.zeros(height * width + 1, dtype=torch.bool, device=row.device)
        return found.index_fill_(0, cells, True)[:-1].view(height, width)


class DistinctItems(NamedTuple):
    """Distinct pictures and captions of all ranks, which retrieval ranks.

    Attributes:
        images: (B,) bool, which of this rank's rows stand for a distinct picture.
        texts: (B,) bool, likewise for captions.
        image_ids: (B,) int64, of the pictures of this rank's rows; where no picture of any rank
            occurs twice, those of their captions.
        text_ids: (B,) int64, of their captions.
        positives: of these ids.
        num_images: different pictures of all ranks.
        num_texts: different captions of all ranks.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    positives: PositivePairs
    num_images: int
    num_texts: int

    @classmethod
    def of(
        cls,
        picture_ids: Tensor,
        caption_ids: Tensor,
        sample_ids: Tensor,
        *,
        group: ProcessGroup | None = None,
    ) -> "DistinctItems":
        """Find the different pictures and captions of all ranks.

        Distributed contract: one ``gather_rows`` of three numbers a row.

        Args:
            picture_ids: (B,) int64, of this rank's rows.
            caption_ids: (B,) int64.
            sample_ids: (B,) int64, each once over all ranks.
            group: process group.

        Example:
            >>> pictures, captions = torch.tensor([4, 4, 5]), torch.tensor([1, 2, 2])
            >>> found = DistinctItems.of(pictures, captions, torch.arange(3))
            >>> found.images.tolist(), found.texts.tolist()
            ([True, False, True], [True, True, False])
        """
        rows = gather_rows(torch.stack([picture_ids, caption_ids, sample_ids], dim=1), group)
        rows = rows[rows[:, 2].argsort()]
        first_images, first_texts = (mark_first(rows[:, kind]) for kind in (0, 1))
        positives, image_ids = PositivePairs(), caption_ids
        if int(first_images.sum()) < len(rows):
            positives, image_ids = PositivePairs(rows[:, :2].unique(dim=0)), picture_ids
        return cls(
            torch.isin(sample_ids, rows[first_images, 2]),
            torch.isin(sample_ids, rows[first_texts, 2]),
            image_ids,
            caption_ids,
            positives,
            int(first_images.sum()),
            int(first_texts.sum()),
        )

    def of_all_rows(
        self, image_ranks: Tensor, text_ranks: Tensor, *, group: ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor]:
        """Expand ranks of distinct pictures and captions to this rank's rows.

        Distributed contract: one or two ``gather_rows`` of two numbers an item.
        """
        if self.positives.pairs is not None:
            image_ranks = _ranks_of(self.image_ids, self.images, image_ranks, group)
        return image_ranks, _ranks_of(self.text_ids, self.texts, text_ranks, group)


def _encode(known: list[Tensor], image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return one number for each pair of ids, and whether both are known."""
    images, texts = known
    rows = torch.searchsorted(images, image_ids.contiguous()).clamp(max=len(images) - 1)
    columns = torch.searchsorted(texts, text_ids.contiguous()).clamp(max=len(texts) - 1)
    is_known = (images[rows] == image_ids) & (texts[columns] == text_ids)
    return rows * len(texts) + columns, is_known


def _ranks_of(ids: Tensor, kept: Tensor, ranks: Tensor, group: ProcessGroup | None) -> Tensor:
    """Look up the rank of every id among those kept on all ranks."""
    known = gather_rows(torch.stack([ids[kept], ranks], dim=1), group)
    ordered, order = known[:, 0].sort()
    return known[order, 1][torch.searchsorted(ordered, ids)]


def _look_up(wanted: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Find every value whose key is wanted.

    Args:
        wanted: (A,).
        keys: (E,), in rising order.
        values: (E,).

    Returns:
        (M,) places in ``wanted``, and the values found for them.
    """
    first, last = (torch.searchsorted(keys, wanted, right=right) for right in (False, True))
    counts = last - first
    places = torch.repeat_interleave(counts)
    within = torch.arange(len(places), device=wanted.device)
    within -= torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return places, values[first[places] + within]
