"""Which pictures and captions of all ranks are different ones, and which of them belong together?

Rows are pairs, and what a row shows may occur again: a picture with five captions has five rows, a
caption may stand under several pictures. A gallery holds every different picture and every
different caption once, that of the lowest sample id; a picture and a caption belong together if
any row has both. Every row asks; rows of one picture get one answer.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import gather_rows


class Belonging(NamedTuple):
    """Which images and texts belong together, by their ids.

    Attributes:
        pairs: (E, 2) int64, the image id and text id of everything that does, on every rank the
            same, without repeats and in rising order; None: where the ids are equal.
    """

    pairs: Tensor | None = None

    def mask(self, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Return (R, C) bool for R images and C texts.

        Example:
            >>> pairs = torch.tensor([[1, 7], [1, 8], [2, 8]])
            >>> Belonging(pairs).mask(torch.tensor([1, 2]), torch.tensor([8, 7]))
            tensor([[ True,  True],
                    [ True, False]])
        """
        if self.pairs is None:
            return image_ids[:, None] == text_ids[None, :]
        found = torch.zeros(
            len(image_ids), len(text_ids), dtype=torch.bool, device=image_ids.device
        )
        rows, texts = _look_up(image_ids, self.pairs[:, 0].contiguous(), self.pairs[:, 1])
        ordered, order = text_ids.sort()
        places, columns = _look_up(texts, ordered, order)
        found[rows[places], columns] = True
        return found

    def holds(self, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Tell of single images and texts whether they belong together.

        Args:
            image_ids: of any shape.
            text_ids: of a shape that broadcasts with it.

        Example:
            >>> pairs = torch.tensor([[1, 7], [1, 8], [2, 8]])
            >>> Belonging(pairs).holds(torch.tensor([1, 2, 3]), torch.tensor([8, 7, 8]))
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

    def turned(self) -> "Belonging":
        """Return the same with texts in the place of images."""
        return self if self.pairs is None else Belonging(self.pairs.flip(1).unique(dim=0))


class DistinctItems(NamedTuple):
    """The galleries that the rows of all ranks make.

    Attributes:
        images: (B,) bool, which of this rank's rows stand in the gallery of pictures.
        texts: (B,) bool, likewise of captions.
        image_ids: (B,) int64, of the pictures of this rank's rows; where no picture of any rank
            occurs twice, those of their captions.
        text_ids: (B,) int64, of their captions.
        belonging: of these ids.
        num_images: different pictures of all ranks.
        num_texts: different captions of all ranks.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    belonging: Belonging
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
        first_images, first_texts = (_first_of_each(rows[:, kind]) for kind in (0, 1))
        belonging, image_ids = Belonging(), caption_ids
        if int(first_images.sum()) < len(rows):
            belonging, image_ids = Belonging(rows[:, :2].unique(dim=0)), picture_ids
        return cls(
            torch.isin(sample_ids, rows[first_images, 2]),
            torch.isin(sample_ids, rows[first_texts, 2]),
            image_ids,
            caption_ids,
            belonging,
            int(first_images.sum()),
            int(first_texts.sum()),
        )

    def of_all_rows(
        self, image_ranks: Tensor, text_ranks: Tensor, *, group: ProcessGroup | None = None
    ) -> tuple[Tensor, Tensor]:
        """Give each of this rank's rows what its picture, and its caption, got in the gallery.

        Distributed contract: one or two ``gather_rows`` of two numbers an item.

        Args:
            image_ranks: of this rank's pictures in the gallery, in the order of its rows.
            text_ranks: of its captions.
            group: process group.
        """
        if self.belonging.pairs is not None:
            image_ranks = _spread(self.image_ids, self.images, image_ranks, group)
        return image_ranks, _spread(self.text_ids, self.texts, text_ranks, group)


def _encode(known: list[Tensor], image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return one number for each pair of ids, and whether both are known."""
    images, texts = known
    rows = torch.searchsorted(images, image_ids.contiguous()).clamp(max=len(images) - 1)
    columns = torch.searchsorted(texts, text_ids.contiguous()).clamp(max=len(texts) - 1)
    is_known = (images[rows] == image_ids) & (texts[columns] == text_ids)
    return rows * len(texts) + columns, is_known


def _first_of_each(ids: Tensor) -> Tensor:
    """Mark the first occurrence of every id."""
    ordered, order = ids.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    marked = torch.empty_like(is_first)
    marked[order] = is_first
    return marked


def _spread(ids: Tensor, kept: Tensor, ranks: Tensor, group: ProcessGroup | None) -> Tensor:
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
