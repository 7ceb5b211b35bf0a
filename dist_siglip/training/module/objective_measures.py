"""What objectives measure in an evaluation, and what a decoder writes of some of its pictures."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.samples.patches import patch_mask
from dist_siglip.data.samples.regions import Box
from dist_siglip.distributed import gather_rows, max_over_ranks, sum_over_ranks
from dist_siglip.metrics.evaluation import ARRAY_PAIRS
from dist_siglip.models import BuiltModel
from dist_siglip.models.text_tower import ModelTokenizer
from dist_siglip.objectives import Captioning, Regions, Rows
from dist_siglip.objectives.captioning import boxes_of

GALLERY_PICTURES = 24  # that a report shows


def spread_rows(num_rows: int, count: int) -> set[int]:
    """Choose rows that lie evenly, so that the choice depends on nothing but their number.

    Example:
        >>> sorted(spread_rows(10, 3)), spread_rows(2, 3)
        ([0, 3, 7], {0, 1})
    """
    count = min(count, num_rows)
    return {round(index * num_rows / count) for index in range(count)}


def regions_of(batch: ImageTextBatch) -> Regions | None:
    """Return the regions of a batch, if its data have any."""
    if batch.region_texts is None or batch.region_boxes is None:
        return None
    return Regions(batch.region_texts, batch.region_boxes)


class FoundRegion(NamedTuple):
    """A box that a decoder wrote for a text; boxes are in shares of the image it saw.

    Attributes:
        text: of the region.
        box: of the region: top, left, bottom, right.
        written: likewise, by the decoder.
    """

    text: str
    box: Box
    written: Box


class Written(NamedTuple):
    """What a decoder wrote of a picture.

    Attributes:
        caption: of the picture.
        region: of its region; None without one.
    """

    caption: str
    region: FoundRegion | None


class ObjectiveMeasures:
    """Sums of what objectives measure in an evaluation, and what is written of some pictures.

    Distributed contract: ranks call each method equally often, as batches of an evaluation are.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._kept: list[tuple[Tensor, ...]] = []

    def update(
        self,
        objectives: Mapping[str, Any],
        batch: ImageTextBatch,
        tokens: Tensor,
        num_pictures: int,
    ) -> None:
        """Measure one batch of this rank.

        Args:
            objectives: by name.
            batch: of the evaluation.
            tokens: (B, T, C) of its pictures.
            num_pictures: of the evaluation, of which a few are kept to write about.
        """
        mask, regions = patch_mask(batch.images), regions_of(batch)
        rows = Rows(tokens, batch.texts, batch.sample_ids, batch.valid, regions, mask)
        for objective in objectives.values():
            for name, term in objective.measure(rows).items():
                both = torch.stack([term.total.float(), term.number.float()])
                self._sums[name] = self._sums.get(name, 0) + both
        shown = spread_rows(min(num_pictures, ARRAY_PAIRS), GALLERY_PICTURES)
        chosen = torch.tensor(sorted(shown), dtype=torch.int64)
        is_kept = batch.valid & torch.isin(batch.sample_ids, chosen.to(batch.sample_ids))
        seen = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
        kept = (batch.sample_ids, tokens, seen, *(rows.regions or ()))
        self._kept.append(tuple(each[is_kept] for each in kept))

    def compute(
        self, objectives: Mapping[str, Any], built: BuiltModel
    ) -> tuple[dict[str, float], dict[int, Written]]:
        """Return the means over all ranks by name, and what was written by sample id.

        What counts nothing anywhere, as boxes where no picture has regions, has no mean.
        """
        names = list(self._sums)
        if not names:
            return {}, {}
        sums = sum_over_ranks(torch.stack([self._sums[name] for name in names])).tolist()
        means = {
            name: total / number
            for name, (total, number) in zip(names, sums, strict=True)
            if number
        }
        ids, *rows = (torch.cat(column) for column in zip(*self._kept, strict=True))
        written: dict[int, Written] = {}
        for objective in objectives.values():
            if isinstance(objective, Captioning):
                written = _written(objective, built, ids, *rows)
        return means, written


def _written(
    objective: Captioning,
    built: BuiltModel,
    ids: Tensor,
    tokens: Tensor,
    seen: Tensor,
    region_texts: Tensor | None = None,
    boxes: Tensor | None = None,
) -> dict[int, Written]:
    """What is written of the pictures of all ranks, by sample id; each rank writes as many rows."""
    most = int(max_over_ranks(torch.tensor(len(ids), device=ids.device)))
    tokenizer = built.tokenizer
    if most == 0 or not isinstance(tokenizer, ModelTokenizer):
        return {}

    def filled(rows: Tensor, value: int = 0) -> Tensor:
        return torch.cat([rows, rows.new_full((most - len(rows), *rows.shape[1:]), value)])

    def read(texts: Tensor) -> list[str]:
        marks = objective.writing.is_target(texts)
        return [
            tokenizer.decode(row[mark].tolist()) for row, mark in zip(texts, marks, strict=True)
        ]

    tokens = filled(tokens)
    mask = None if bool(seen.all()) else filled(seen, 1)
    every = gather_rows(filled(ids, -1)).tolist()
    captions = read(gather_rows(objective.write(tokens, mask)).cpu())
    regions: list[FoundRegion | None] = [None] * len(every)
    if "referring" in objective.tasks and region_texts is not None and boxes is not None:
        texts = filled(region_texts)
        bins = gather_rows(objective.write_boxes(tokens, texts, mask))
        found = boxes_of(bins, objective.box_bins).tolist()
        true = gather_rows(filled(boxes)).tolist()
        regions = [
            FoundRegion(text, (*box,), (*written,)) if box[2] > box[0] else None
            for text, box, written in zip(read(gather_rows(texts).cpu()), true, found, strict=True)
        ]
    return {
        sample_id: Written(caption, region)
        for sample_id, caption, region in zip(every, captions, regions, strict=True)
        if sample_id >= 0
    }
