"""The similarities of the pairs and non-pairs of all ranks, as calibration wants them."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import (
    ExchangeName,
    gather_rows,
    max_over_ranks,
    prepare_exchange,
    sum_over_ranks,
)
from dist_siglip.errors import UserError
from dist_siglip.losses.calibration import Calibration, WeightedSimilarities, calibrate_scale_bias
from dist_siglip.losses.pair_terms import Duplicates
from dist_siglip.losses.trip import check_pairs
from dist_siglip.pair_ids import join_ids, share_an_id

# Bins of the similarities of non-pairs, each represented by the mean of its members: within 1e-4
# the softplus is straight to (200 * 1e-4)^2 / 24 = 2e-5 of its value at a scale of 200.
_NUM_BINS = 20_000
_CHUNK_ROWS = 1024


def calibrate_on_features(
    image_features: Tensor,
    text_features: Tensor,
    global_batch_size: int,
    *,
    scale_before: float = 10.0,
    bias_before: float = -10.0,
    caption_ids: Tensor | None = None,
    picture_ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Calibration:
    """Fit scale and bias to the pairs of all ranks; see ``calibrate_scale_bias``.

    Distributed contract: every rank passes its own pairs, any number of them (0 too); one trip
    of the texts without gradient, then small sums. Every rank gets the same numbers to the bit,
    and up to rounding they are the same however the pairs are distributed.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised; row i belongs to image i.
        global_batch_size: N, pairs of a training batch over all ranks; not the number given here.
        scale_before: multiplier for ``loss_before``.
        bias_before: bias for ``loss_before``.
        caption_ids: (B,) int64, equal for equal captions; needed unless duplicates are negative.
        picture_ids: (B,) int64, equal for equal pictures; None if they are not known.
        duplicates: what the loss makes of an equal caption, or picture, of another pair.
        exchange: how the texts reach the other ranks.
        group: process group.

    Raises:
        UserError: if features are not finite, all ranks together have fewer than 2 pairs, or no
            scale above 0 fits; on every rank.

    Example:
        >>> images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> texts = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.6, 0.8]])
        >>> fitted = calibrate_on_features(images, texts, 16)
        >>> round(fitted.relative_bias, 2), fitted.loss_after < fitted.loss_before
        (1.62, True)
    """
    positives, negatives = collect_similarities(
        image_features,
        text_features,
        global_batch_size,
        caption_ids=caption_ids,
        picture_ids=picture_ids,
        duplicates=duplicates,
        exchange=exchange,
        group=group,
    )
    return calibrate_scale_bias(
        positives,
        negatives,
        global_batch_size,
        scale_before=scale_before,
        bias_before=bias_before,
    )


@torch.no_grad()
def collect_similarities(
    image_features: Tensor,
    text_features: Tensor,
    global_batch_size: int,
    *,
    caption_ids: Tensor | None = None,
    picture_ids: Tensor | None = None,
    duplicates: Duplicates = "negative",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> tuple[WeightedSimilarities, WeightedSimilarities]:
    """Collect the similarities of pairs and non-pairs; contract as ``calibrate_on_features``.

    Own pairs are kept one by one, all others in bins of 1e-4 with the mean of their members.

    Returns:
        (pairs, non-pairs), equal on every rank, weighted for a batch of ``global_batch_size``.

    Example:
        >>> features = torch.eye(2)
        >>> pairs, others = collect_similarities(features, features, 9)
        >>> pairs.values, others
        (tensor([1., 1.], dtype=torch.float64), WeightedSimilarities(values=tensor([0.], \
dtype=torch.float64), weights=tensor([8.], dtype=torch.float64)))
    """
    if duplicates != "negative" and caption_ids is None:
        raise UserError(f"duplicates ({duplicates!r}) needs caption_ids to know equal captions by")
    check_pairs(image_features, text_features)
    image_features, text_features = _wide(image_features), _wide(text_features)
    _check_finite(image_features, text_features, group)
    columns = [text_features]
    ids = None if duplicates == "negative" else join_ids(caption_ids, picture_ids)
    if ids is not None:
        columns.append(ids.to(text_features.device))
    trip = prepare_exchange(
        columns,
        exchange=exchange,
        group=group,
        purpose=f"calibration; batch of {global_batch_size}; duplicates: {duplicates}",
    )
    if trip.total_rows < 2:
        raise UserError(f"pairs to calibrate on ({trip.total_rows}) must be at least 2")
    # Kinds: equal captions, others. For each bin, how many and the sum of their similarities.
    bins = torch.zeros(2, 2, _NUM_BINS, dtype=torch.float64)

    def visit(owner: int, shard: tuple[Tensor, ...], _contributions: tuple[Tensor, ...]) -> None:
        for row in range(0, len(image_features), _CHUNK_ROWS):
            rows = slice(row, row + _CHUNK_ROWS)
            # Counted on the CPU: sums by bin are not deterministic on a GPU.
            similarities = (image_features[rows] @ shard[0].T).cpu()
            is_equal = torch.zeros_like(similarities, dtype=torch.bool)
            if len(shard) > 1:
                is_equal = share_an_id(columns[1][rows], shard[1]).cpu()
            is_other = torch.ones_like(is_equal)
            if owner == trip.rank:
                is_other.diagonal(row).fill_(False)
            for kind, mask in enumerate((is_other & is_equal, is_other & ~is_equal)):
                _count(bins[kind], similarities[mask])

    trip.run(visit)
    bins = sum_over_ranks(bins.to(image_features.device), group).cpu()
    own = gather_rows((image_features * text_features).sum(dim=1), group).cpu()
    pairs = WeightedSimilarities(own, torch.full_like(own, 1 / len(own)))
    # What one of all ordered couples of different pairs weighs.
    share = (global_batch_size - 1) / (trip.total_rows * (trip.total_rows - 1))
    equal, others = (_summarise(kind, share) for kind in bins)
    if duplicates == "positive":
        pairs = WeightedSimilarities(
            torch.cat([pairs.values, equal.values]), torch.cat([pairs.weights, equal.weights])
        )
    return pairs, others


def _count(bins: Tensor, similarities: Tensor) -> None:
    """Add similarities to (2, bins): their number, and their sum."""
    places = ((similarities + 1) * (_NUM_BINS / 2)).long().clamp_(0, _NUM_BINS - 1)
    bins[0] += torch.bincount(places, minlength=_NUM_BINS)
    bins[1] += torch.bincount(places, weights=similarities, minlength=_NUM_BINS)


def _summarise(bins: Tensor, share: float) -> WeightedSimilarities:
    counts, totals = bins[:, bins[0] > 0]
    return WeightedSimilarities(totals / counts, counts * share)


def _wide(features: Tensor) -> Tensor:
    """Widen to float64, on the CPU where the device (Apple's GPUs) has none."""
    return (
        features.detach().cpu() if features.device.type == "mps" else features.detach()
    ).double()


def _check_finite(images: Tensor, texts: Tensor, group: ProcessGroup | None) -> None:
    """Refuse on all ranks what one of them cannot use."""
    is_bad = ~(images.isfinite().all() & texts.isfinite().all())
    if max_over_ranks(is_bad.double(), group) > 0:
        raise UserError("features to calibrate on are not all finite; check the weights")
