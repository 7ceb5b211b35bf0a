"""Hard negatives mined by the ring: for each picture the texts of all ranks that are most like it.

A pass without gradients comes before that of the loss: shards of texts travel, and a rank keeps the
best k for each of its pictures. In the pass of the loss they count once more, so that gradients of
texts on other ranks come home as those of all pairs do. One product of a tile and one way of the
texts more than without, and memory for k numbers a picture and one tile of keys.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from dist_siglip.distributed import Exchange, ExchangeName, prepare_exchange
from dist_siglip.errors import UserError
from dist_siglip.losses.kernels.pair_terms import share_an_id
from dist_siglip.losses.kernels.tiles import logits_dtype, similarity, sum_dtype
from dist_siglip.losses.ring_pass import RingPass, Shard, Tile

# Cosines are compared in steps of it: products of tiles of different shape round differently, and
# equal texts must tie wherever they lie.
_STEP = 2.0**-16
_MOST_STEPS = 2.0**30
_POSITION_BITS = 32
_LAST_POSITION = 2**_POSITION_BITS - 1
_NONE = torch.iinfo(torch.int64).min


def check_mining(mined_negatives: int, mined_weight: float) -> None:
    """Raise ``UserError`` unless there are 0 or more mined negatives, of a weight above 0."""
    if mined_negatives < 0:
        raise UserError(f"mined_negatives ({mined_negatives}) must be at least 0; 0 mines none")
    if not 0 < mined_weight < float("inf"):
        raise UserError(
            f"mined_weight ({mined_weight}) must be a finite number above 0; for none set "
            "mined_negatives to 0"
        )


class MinedNegatives(NamedTuple):
    """The hardest texts of each of this rank's pictures.

    Attributes:
        positions: (B, k) int64, rows of the texts of all ranks in rank order, hardest first.
        similarities: (B, k) in the logits' dtype, of picture and text.
        exist: (B, k) bool, False where a picture has fewer negatives.
        row_counts: texts of every rank.
    """

    positions: Tensor
    similarities: Tensor
    exist: Tensor
    row_counts: tuple[int, ...]


@torch.no_grad()
def mine_negatives(
    image_features: Tensor,
    text_features: Tensor,
    k: int,
    *,
    ids: Tensor | None,
    tile_shape: tuple[int, int],
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    comes_again: bool = False,
) -> MinedNegatives:
    """Find for each picture the k texts of all ranks with the largest logits that are not its own.

    Logits rise with the inner product, which is compared in steps of 2^-16; of equal ones the first
    in rank order is taken. A text that shares an id with the picture's is not a negative.

    Distributed contract: every rank passes its own rows, any number of them (0 too), and gets those
    of its pictures, the same as one process that holds all rows. One exchange of texts and ids.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), row i of pair i.
        k: at least 1; may exceed the number of texts.
        ids: (B,), or (B, kinds), see ``join_ids``; None leaves out the own text alone.
        tile_shape: rows and columns of the largest tile.
        exchange: how texts reach other ranks.
        group: process group.
        comes_again: as in ``prepare_exchange``.

    Example:
        >>> texts = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> mine_negatives(texts, texts, 1, ids=None, tile_shape=(2, 2)).positions.flatten()
        tensor([1, 0, 1])
    """
    plan = prepare_exchange(
        [text_features] if ids is None else [text_features, ids],
        exchange=exchange,
        group=group,
        purpose=f"{k} mined negatives",
        comes_again=comes_again,
    )
    mining = _MiningPass(image_features.detach(), plan, k, ids, tile_shape)
    mining.run(plan)
    return MinedNegatives(
        _LAST_POSITION - (mining.keys & _LAST_POSITION),
        mining.similarities,
        mining.keys > _NONE,
        plan.row_counts,
    )


class _MiningPass(RingPass):
    """Keeps the best k of each row at home, as keys whose order is that of the choice."""

    def __init__(
        self,
        home: Tensor,
        plan: Exchange,
        k: int,
        ids: Tensor | None,
        tile_shape: tuple[int, int],
    ) -> None:
        super().__init__(home, plan, tile_shape, with_home_gradient=False)
        self._ids, self._starts = ids, [0, *accumulate(plan.row_counts)]
        shape = (len(home), k)
        self.keys = torch.full(shape, _NONE, dtype=torch.int64, device=home.device)
        self.similarities = home.new_zeros(shape, dtype=logits_dtype(home))

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> None:
        """Keep what is better in one tile."""
        found = similarity(home, shard[0])
        start = self._starts[place.owner] + place.columns.start
        positions = torch.arange(start, start + found.shape[1], device=found.device)
        # The step of a cosine above, the position below: greater is harder, then earlier.
        steps = (found / _STEP).round_().clamp_(-_MOST_STEPS, _MOST_STEPS)
        keys = steps.to(torch.int64).bitwise_left_shift_(_POSITION_BITS)
        keys += _LAST_POSITION - positions
        if self._ids is not None:
            keys.masked_fill_(share_an_id(self._ids[place.rows], shard[1]), _NONE)
        elif place.diagonal is not None:
            keys.diagonal(place.diagonal).fill_(_NONE)
        k = self.keys.shape[1]
        best, columns = keys.topk(min(k, keys.shape[1]), dim=1, sorted=False)
        best, chosen = torch.cat([self.keys[place.rows], best], dim=1).topk(k, dim=1)
        known = torch.cat([self.similarities[place.rows], found.gather(1, columns)], dim=1)
        self.keys[place.rows] = best
        self.similarities[place.rows] = known.gather(1, chosen)


class MinedTerms:
    """What mined negatives add to the value and the derivatives of the tiles of a loss.

        weight * sum_i sum_{j mined for i} softplus(logit_scale * similarity[i, j] + logit_bias)

    Args:
        mined: of this rank's pictures.
        weight: of each.
        logit_scale: () in the logits' dtype.
        logit_bias: likewise.
        row_counts: rows of the shards in the pass of the loss: texts, and whatever stands behind
            those of a rank.

    Attributes:
        value: ().
        by_bias: (), its derivative by the bias.
        by_scale: (), that by the scale.
    """

    def __init__(
        self,
        mined: MinedNegatives,
        weight: float,
        logit_scale: Tensor,
        logit_bias: Tensor,
        row_counts: tuple[int, ...],
    ) -> None:
        logits = mined.similarities * logit_scale + logit_bias
        wide = sum_dtype(logits.device)
        values = torch.where(mined.exist, softplus(logits, threshold=40.0), 0.0)
        self._derivative = torch.where(mined.exist, weight * torch.sigmoid(logits), 0.0)
        self.value = weight * values.sum(dtype=wide)
        self.by_bias = self._derivative.sum(dtype=wide)
        self.by_scale = (self._derivative * mined.similarities).sum(dtype=wide)
        self._positions = mined.positions
        self._starts = [0, *accumulate(row_counts)]
        if row_counts != mined.row_counts:
            there = [0, *accumulate(mined.row_counts)]
            starts, moved = mined.positions.new_tensor([there, self._starts])
            owners = torch.searchsorted(starts, mined.positions, right=True) - 1
            self._positions = mined.positions + (moved - starts)[owners.clamp_(max=len(there) - 2)]

    def add_to(self, derivative: Tensor, place: Tile) -> None:
        """Add their derivatives to those of one tile, (rows, columns)."""
        width = derivative.shape[1]
        columns = self._positions[place.rows] - (self._starts[place.owner] + place.columns.start)
        is_here = (columns >= 0) & (columns < width)
        added = torch.where(is_here, self._derivative[place.rows], 0.0).to(derivative.dtype)
        derivative.scatter_add_(1, columns.clamp_(0, width - 1), added)
