"""What is kept of patches while a dense evaluation goes over pictures: a bank, and counts."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import fetch_rows, gather_rows, sum_over_ranks
from dist_siglip.evaluation.encoding import rank_and_size
from dist_siglip.metrics.dense import (
    Segmentation,
    confusion_counts,
    patch_text_shares,
    patch_text_sums,
    pointing_counts,
    segmentation_of,
    share_of,
)

_KEYS = 2**62


class Patches(NamedTuple):
    """Patches of the B pictures of a batch, on the device of the model.

    Attributes:
        numbers: of the pictures.
        pixels: (B, 3, H, W) uint8, or packed patches.
        tokens: (B, T, C) float32.
        features: (B, T, D) float32.
        labels: (B, T) int64; -1 for no class.
        grid: rows and columns; None of packed patches, which say their own.
        padding: (B, T) bool, True where there is no patch; None if all are there.
    """

    numbers: list[int]
    pixels: Tensor
    tokens: Tensor
    features: Tensor
    labels: Tensor
    grid: tuple[int, int] | None
    padding: Tensor | None = None


class PatchBank:
    """Labelled patches that may vote: at most so many, chosen without regard to ranks and order.

    Every patch has a random number, drawn from the seed, its picture and its place. Those with the
    lowest numbers of all ranks stay.

    Args:
        most: patches of all ranks.
        seed: of the numbers.
    """

    def __init__(self, most: int, seed: int) -> None:
        self._most = most
        self._seed = seed
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_rows = 0

    def add(self, batch: Patches) -> None:
        """Take over what may be among the lowest; memory stays below twice the bank and a batch."""
        count = batch.labels.shape[1]
        keys = torch.from_numpy(
            np.concatenate(
                [
                    np.empty(0, np.int64),
                    *(self._numbers_of(picture, count) for picture in batch.numbers),
                ]
            )
        ).to(batch.labels.device)
        labels = batch.labels.flatten()
        has_class = labels >= 0
        rows = (keys[has_class], batch.tokens.flatten(0, 1)[has_class], labels[has_class])
        self._parts.append(rows)
        self._num_rows += len(rows[0])
        if self._num_rows > 2 * self._most:
            self._cut()

    def shared_out(self, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Give each rank its part of the bank, (M, C) tokens and (M,) labels, in one order.

        Distributed contract: one ``gather_rows`` of numbers and one ``fetch_rows``.
        """
        self._cut()
        ((keys, tokens, labels),) = self._parts
        order = gather_rows(keys, group).argsort(stable=True)[: self._most]
        rank, world_size = rank_and_size(group)
        own = order[len(order) * rank // world_size : len(order) * (rank + 1) // world_size]
        tokens, labels = fetch_rows([tokens, labels], own, group=group)
        return tokens, labels

    def _cut(self) -> None:
        keys, tokens, labels = (torch.cat(each) for each in zip(*self._parts, strict=True))
        kept = keys.argsort(stable=True)[: self._most]
        self._parts = [(keys[kept], tokens[kept], labels[kept])]
        self._num_rows = len(kept)

    def _numbers_of(self, picture: int, count: int) -> NDArray[np.int64]:
        stream = np.random.Philox(np.random.SeedSequence([self._seed, picture]))
        return np.random.Generator(stream).integers(_KEYS, size=count)


class PatchCounts:
    """Counts of what was told of the patches, first of this rank, then of all."""

    def __init__(self, num_classes: int, background: int | None, device: torch.device) -> None:
        self._background = background
        self._num_classes = num_classes
        square = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._confusions = {way: square.clone() for way in ("knn", "linear", "text")}
        self._hits = {
            way: torch.zeros(2, dtype=torch.int64, device=device) for way in ("linear", "text")
        }
        self._retrieved = torch.zeros(4, dtype=torch.float64, device=device)

    @property
    def num_patches(self) -> int:
        """Patches with a class."""
        return int(self._confusions["knn"].sum())

    def add(self, scores: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Count the patches of a batch.

        Args:
            scores: (B, T, K) by way.
            labels: (B, T).

        Returns:
            (B, T) told classes by way; texts tell objects only.
        """
        background, told = self._background, {}
        for way, each in scores.items():
            own = labels
            if way == "text" and background is not None:
                numbers = torch.arange(self._num_classes, device=labels.device)
                each = each.masked_fill(numbers == background, -math.inf)
                own = labels.where(labels != background, -1)
            told[way] = each.argmax(dim=2)
            self._confusions[way] += confusion_counts(
                told[way].flatten(), own.flatten(), self._num_classes
            )
        for way, counts in self._hits.items():
            counts += pointing_counts(scores[way], labels, background)
        self._retrieved += patch_text_sums(scores["text"], labels, background)
        return told

    def sum_over_ranks(self, group: ProcessGroup | None) -> None:
        """Add the counts of all ranks."""
        for counts in (self._confusions, self._hits):
            for way, each in counts.items():
                counts[way] = sum_over_ranks(each, group)
        self._retrieved = sum_over_ranks(self._retrieved, group)

    def summarise(self, classes: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
        """Make metrics and details."""
        told = {
            way: segmentation_of(counts, self._background)
            for way, counts in self._confusions.items()
        }
        metrics = {}
        for way in ("knn", "linear"):
            metrics[f"{way}_mean_iou"] = told[way].mean_iou
            metrics[f"{way}_accuracy"] = told[way].accuracy
        retrieved = patch_text_shares(self._retrieved)
        metrics |= {
            "linear_pointing": share_of(self._hits["linear"]),
            "text_pointing": share_of(self._hits["text"]),
            "patch_to_text_recall@1": retrieved.recall_at_1,
            "text_to_patch_map": retrieved.mean_average_precision,
            "text_mean_iou": told["text"].mean_iou,
        }
        counts = self._confusions["knn"].sum(dim=1).tolist()
        by_class = [
            {"name": name, "patches": counts[number], **_ious(told, number)}
            for number, name in enumerate(classes)
        ]
        details = {
            "patches": self.num_patches,
            "background": None if self._background is None else classes[self._background],
            "classes": by_class,
        }
        return metrics, details


def _ious(told: dict[str, Segmentation], number: int) -> dict[str, float]:
    found = {f"{way}_iou": float(each.ious[number]) for way, each in told.items()}
    return {name: iou for name, iou in found.items() if math.isfinite(iou)}
