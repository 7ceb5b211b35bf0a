"""Choice of the pairs of a large batch that a model has most to learn from, beside a reference.

The score of image i and text j is what a learner loses on them more than a reference does. Pairs
are chosen in chunks: the first at random, each next one by what its pairs and their meeting with
those already chosen promise. No rank ever holds the matrix of all scores: each one scores its own
rows against the rows of a chunk, which all ranks get.

Memory per rank: O(B * D + chunk * D + tile), beside the features.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from dist_siglip.distributed import gather_rows, resolve_group
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import TeacherFeatures, tile_shape_of
from dist_siglip.losses.kernels.pair_terms import Duplicates, share_an_id
from dist_siglip.losses.kernels.tiles import similarity, sum_dtype

_LEAST_UNIFORM = 2.0**-25  # half of the smallest number that a draw has


class Choice(NamedTuple):
    """Chosen pairs.

    Attributes:
        positions: (size,) int64, ascending, among the rows of all ranks in rank order; the same on
            every rank.
        learnability: (B,), score of each own pair by itself.
        is_chosen: (B,) bool, of the own pairs.
    """

    positions: Tensor
    learnability: Tensor
    is_chosen: Tensor


class LearnabilityScores:
    """Scores of this rank's pairs, by themselves and with other ones.

        s[i, j] = loss[i, j] of the learner - loss[i, j] of the reference
        loss[i, j] = softplus(-y[i, j] * (scale * image[i] . text[j] + bias))

    with y[i, j] = +1 if i == j, else -1. The loss of several models is the mean of their losses.

    Args:
        learner: its features of B pairs.
        reference: of the same pairs.
        ids: (B,) or (B, kinds), equal for duplicates; None for none.
        duplicates: what pairs i != j that share an id are, as in ``siglip_loss``.

    Attributes:
        own: (B,), s[i, i].
    """

    def __init__(
        self,
        learner: TeacherFeatures,
        reference: TeacherFeatures,
        ids: Tensor | None = None,
        duplicates: Duplicates = "negative",
    ) -> None:
        self._models = (learner, reference)
        self._ids = None if duplicates == "negative" else ids
        self._duplicates = duplicates
        losses = [
            torch.stack(
                [
                    softplus(-scale * (image * text).sum(dim=1) - (bias or 0.0))
                    for image, text, scale, bias in zip(
                        *_blocks(model, model.image, model.text),
                        model.scales,
                        model.biases,
                        strict=True,
                    )
                ]
            ).mean(dim=0)
            for model in self._models
        ]
        self.own = (losses[0] - losses[1]).to(sum_dtype(learner.image.device))

    def columns(self, rows: Tensor) -> list[Tensor]:
        """Return what ``with_others`` wants of some own rows: features side by side, and ids."""
        sides = (side[rows] for model in self._models for side in (model.image, model.text))
        packed = torch.cat(list(sides), dim=1)
        return [packed] if self._ids is None else [packed, self._ids[rows]]

    def with_others(self, others: list[Tensor]) -> Tensor:
        """Return (B,), the sum of s[i, j] + s[j, i] over pairs j that are not the own pair i."""
        added = torch.zeros_like(self.own)
        widths = [model.image.shape[1] for model in self._models for _ in range(2)]
        sides = others[0].split(widths, dim=1)
        step = tile_shape_of(None, added.device)[0]
        for first in range(0, len(added), step):
            rows = slice(first, first + step)
            equal = None if self._ids is None else share_an_id(self._ids[rows], others[1])
            for sign, model, image, text in zip(
                (1, -1), self._models, sides[::2], sides[1::2], strict=True
            ):
                for home, away in ((model.image[rows], text), (model.text[rows], image)):
                    losses = self._losses(model, home, away, equal)
                    added[rows] += sign * losses.sum(dim=1, dtype=added.dtype)
        return added

    def _losses(
        self, model: TeacherFeatures, rows: Tensor, columns: Tensor, equal: Tensor | None
    ) -> Tensor:
        """Losses (rows, columns) of one side of own pairs and the other side of others."""
        total: Tensor | None = None
        blocks = _blocks(model, rows, columns)
        for row, column, scale, bias in zip(*blocks, model.scales, model.biases, strict=True):
            logits = similarity(row, column).mul_(scale).add_(bias or 0.0)
            if equal is not None and self._duplicates == "positive":
                logits = torch.where(equal, -logits, logits)
            losses = softplus(logits)
            total = losses if total is None else total.add_(losses)
        assert total is not None  # a model has a block
        if equal is not None and self._duplicates == "masked":
            total.masked_fill_(equal, 0.0)
        return total.div_(len(model.dims)) if len(model.dims) > 1 else total


@torch.no_grad()
def choose_learnable(
    scores: LearnabilityScores,
    noise: Tensor,
    size: int,
    *,
    group: ProcessGroup | None = None,
) -> Choice:
    """Choose pairs of the batch of all ranks in chunks, by what the learner has yet to learn.

    The first chunk is uniform over all pairs. Each next one is drawn without replacement from the
    softmax, over the pairs that are left, of

        s[i, i] + sum over chosen j of (s[i, j] + s[j, i])

    by the largest sums of this and Gumbel noise -log(-log(noise)). A pair whose score is not finite
    comes last.

    Distributed contract: every rank passes its own rows, any number of them; all ranks return the
    same positions. They are those of one process that holds all rows in rank order, up to the
    rounding of scores: two pairs that tie within it may change places. For each chunk one
    ``gather_rows`` of a number per pair, and those of the chunk's features. No autograd.

    Args:
        scores: of this rank's B pairs.
        noise: (B, chunks), uniform in [0, 1), a column for each chunk.
        size: pairs to choose over all ranks; chunks differ by one at most.
        group: process group; the default group if None.

    Raises:
        UserError: unless there are as many pairs as are to be chosen, and a pair for each chunk.

    Source:
        Evans et al. 2024, arXiv:2406.17711 (JEST); the noise in place of a draw is ours.
    """
    rows, chunks = noise.shape
    group = resolve_group(group)
    rank = 0 if group is None else group.rank()
    counts = gather_rows(torch.tensor([rows], device=noise.device), group).tolist()
    total, start = sum(counts), sum(counts[:rank])
    if not chunks <= size <= total:
        raise UserError(
            f"pairs to choose ({size}) must be from the number of chunks ({chunks}) to that of "
            f"pairs ({total})"
        )
    promised, positions = scores.own.clone(), []
    is_chosen = torch.zeros(rows, dtype=torch.bool, device=noise.device)
    lowest = torch.finfo(promised.dtype).min
    bounds = [size * chunk // chunks for chunk in range(chunks + 1)]
    with torch.autocast(noise.device.type, enabled=False):
        for chunk, (first, last) in enumerate(pairwise(bounds)):
            keys = -(-noise[:, chunk].clamp(min=_LEAST_UNIFORM).to(promised.dtype).log()).log()
            if chunk:
                keys += promised
            keys.masked_fill_(~promised.isfinite(), lowest).masked_fill_(is_chosen, -math.inf)
            everyone = gather_rows(keys, group)
            order = everyone.argsort(descending=True, stable=True)
            positions.append(order[: last - first].sort().values)
            here = positions[-1] - start
            here = here[(here >= 0) & (here < rows)]
            is_chosen[here] = True
            if chunk + 1 < chunks:
                others = [gather_rows(column, group) for column in scores.columns(here)]
                promised += scores.with_others(others)
    return Choice(torch.cat(positions).sort().values, scores.own, is_chosen)


def _blocks(model: TeacherFeatures, *sides: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Cut sides into the columns of each model."""
    return tuple(side.split(model.dims, dim=1) for side in sides)
