"""Pairwise losses at prefixes of the features' dimension (Matryoshka), in the passes of one loss.

Features travel once, whole. Each rank cuts what arrives to its first d columns, gives every row
length 1 again, and computes the tiles of every prefix; the gradients of all prefixes, taken back
through the normalisation, meet in the one accumulator that goes home. So the sigmoid loss sends the
bytes that it sends without prefixes; the softmax loss sends two numbers more per row and prefix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import AccumulatorSpec, ExchangeName
from dist_siglip.losses.arguments import FiniteCheck, LossOutput, Nonfinite, describe_wanted
from dist_siglip.losses.kernels.pair_terms import Duplicates, Kernel, join_ids
from dist_siglip.losses.kernels.tiles import inner_product, logits_dtype, sum_dtype
from dist_siglip.losses.prefixes import (
    Prefix,
    PrefixSettings,
    prefix_settings,
    sum_at_home,
    visit_prefixes,
    weighted,
)
from dist_siglip.losses.ring_pass import (
    PrecomputedGradient,
    Shard,
    attach_gradients,
    prepare_pass,
    wants_gradient,
)
from dist_siglip.losses.sigmoid import SigmoidPass, SigmoidSides, Wanted, check_ids
from dist_siglip.losses.softmax import GradientPass, SoftmaxSides, SumPass


def matryoshka_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    caption_ids: Tensor | None = None,
    picture_ids: Tensor | None = None,
    duplicates: Duplicates = "positive",
    nonfinite: Nonfinite = "raise",
    finite_check: FiniteCheck | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    kernel: Kernel = "auto",
) -> LossOutput:
    """Weighted mean of ``siglip_loss`` at prefixes of the dimension, in its one pass.

    With u[:d] / |u[:d]| for the rows of both sides, and weights a[d]:

        loss = sum_d a[d] * siglip_loss(images[d], texts[d], scale[d], bias[d]) / sum_d a[d]

    The prefix of all columns takes features as they are.

    Distributed contract: that of ``siglip_loss``; features travel once, with the same bytes.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised, same dtype.
        logit_scale: one element > 0, or one for each prefix in the order of ``check_dims``.
        logit_bias: likewise, any sign; None for none.
        dims: columns of each prefix, at most D, in any order.
        weights: a[d] >= 0 in the order of ``dims``; None is 1 each.
        caption_ids: as in ``siglip_loss``.
        picture_ids: as in ``siglip_loss``.
        duplicates: as in ``siglip_loss``; each prefix counts the same ones.
        nonfinite: as in ``siglip_loss``.
        finite_check: as in ``siglip_loss``.
        exchange: as in ``siglip_loss``.
        group: process group; the default group if None.
        chunk_rows: as in ``siglip_loss``.
        kernel: as in ``siglip_loss``.

    Raises:
        UserError: as ``siglip_loss``, or if dims or weights are out of range or differ by rank.

    Example:
        >>> eye, ten = torch.eye(4), torch.tensor(10.0)
        >>> matryoshka_sigmoid_loss(eye, eye, ten, -ten, dims=[4]).loss
        tensor(0.6933)

    Source:
        Kusupati et al. 2022, arXiv:2205.13147, equation 1; the sum is divided by the weights, so
        that learning rate and clipping compare with those of one prefix.
    """
    settings = prefix_settings(
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        dims=dims,
        weights=weights,
        nonfinite=nonfinite,
        finite_check=finite_check,
        exchange=exchange,
        group=group,
        chunk_rows=chunk_rows,
        kernel=kernel,
    )
    dtype, dims = logits_dtype(image_features), settings.dims
    ids_given = {"caption_ids": caption_ids, "picture_ids": picture_ids}
    check_ids(ids_given, duplicates, image_features)
    ids = join_ids(caption_ids, picture_ids)
    biases = torch.zeros_like(settings.scales) if settings.biases is None else settings.biases
    wanted = Wanted(*map(wants_gradient, (image_features, text_features, settings.scales, biases)))
    whole = SigmoidSides(wanted.text and not wanted.image, image_features, text_features)
    brings_back = whole.brings_back(wanted)
    plan = prepare_pass(
        [whole.travelling] if ids is None else [whole.travelling, ids],
        named=settings.named(image_features, text_features),
        nonfinite=nonfinite,
        finite_check=finite_check,
        accumulators=[AccumulatorSpec(image_features.shape[1:], dtype)] * brings_back,
        exchange=exchange,
        group=group,
        purpose=settings.purpose(
            "sigmoid loss",
            f"{whole.travellers} travel; gradients: {describe_wanted(wanted._asdict())}; "
            f"{'no bias' if logit_bias is None else 'bias'}; "
            f"duplicates: {'no ids' if ids is None else duplicates}"
            f"{'' if picture_ids is None else ', with picture ids'}",
        ),
        shared=settings.shared(),
        comes_again=any(wanted),
    )
    homes = [Prefix.of(whole.home, dim) for dim in dims]
    passes = []
    for number, (dim, home) in enumerate(zip(dims, homes, strict=True)):
        travelling = Prefix.of(whole.travelling, dim).unit
        pair = (travelling, home.unit) if whole.images_travel else (home.unit, travelling)
        each = SigmoidPass(
            SigmoidSides(whole.images_travel, *pair),
            plan,
            settings.scales[number].detach(),
            biases[number].detach(),
            ids,
            wanted,
            settings.tile_shape,
            settings.kernel,
            duplicates,
        )
        passes.append(each)
    factors = settings.factors()

    def visit(owner: int, shard: Shard, contributions: Shard) -> None:
        total = contributions[0] if contributions else None
        visit_prefixes(passes, dims, factors, owner, shard[0], [shard[1:]] * len(dims), total)

    with torch.no_grad(), torch.autocast(image_features.device.type, enabled=False):
        brought = plan.run(visit)
        for each in passes:
            each.finish()
        found = [each.gradients(()) for each in passes]
        at_home = sum_at_home(passes, homes, factors, whole.home) if any(wanted) else None
        shares = biases.new_tensor(settings.shares, dtype=sum_dtype(biases.device))
        sums = [each.tiles.sums() for each in passes]
        value = (torch.stack([each.value for each in sums]) * shares).sum()
    travelled = brought[0] if brought else None
    by_side = (travelled, at_home) if whole.images_travel else (at_home, travelled)
    factor = plan.world_size / max(plan.total_rows, 1)
    value = (value * factor).to(dtype)
    if finite_check is not None:
        finite_check.remember(value)
    gradients = [
        PrecomputedGradient(features, gradient if is_wanted else None, factor)
        for features, gradient, is_wanted in zip(
            (image_features, text_features), by_side, wanted[:2], strict=True
        )
    ]
    for scalars, parts in (
        (settings.scales, [each.scale for each in found]),
        (biases, [each.bias for each in found]),
    ):
        gradients.append(PrecomputedGradient(scalars, weighted(parts, shares), factor))
    loss = attach_gradients("matryoshka_sigmoid_loss", value, gradients)
    return LossOutput(loss, sums[0].duplicate_pairs)


def matryoshka_softmax_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    nonfinite: Nonfinite = "raise",
    finite_check: FiniteCheck | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Weighted mean of ``softmax_loss`` at prefixes of the dimension, in its two passes.

    Formula as ``matryoshka_sigmoid_loss``, contract that of ``softmax_loss``: features travel once
    in each pass, with one sum of columns for each prefix.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised, same dtype.
        logit_scale: one element > 0, or one for each prefix in the order of ``check_dims``.
        logit_bias: without effect, as in ``softmax_loss``.
        dims: columns of each prefix, at most D, in any order.
        weights: as in ``matryoshka_sigmoid_loss``.
        nonfinite: as in ``softmax_loss``.
        finite_check: as in ``softmax_loss``.
        exchange: as in ``softmax_loss``.
        group: process group; the default group if None.
        chunk_rows: as in ``softmax_loss``.
        kernel: as in ``softmax_loss``.

    Raises:
        UserError: as ``softmax_loss``, or if dims or weights are out of range or differ by rank.

    Example:
        >>> eye = torch.eye(2)
        >>> matryoshka_softmax_loss(eye, eye, torch.tensor(1.0), dims=[2])
        tensor(0.3133)
    """
    settings = prefix_settings(
        image_features,
        text_features,
        logit_scale,
        None,
        dims=dims,
        weights=weights,
        nonfinite=nonfinite,
        finite_check=finite_check,
        exchange=exchange,
        group=group,
        chunk_rows=chunk_rows,
        kernel=kernel,
    )
    wanted = {
        "image": wants_gradient(image_features),
        "text": wants_gradient(text_features),
        "scale": wants_gradient(settings.scales),
    }
    # The side that travels should be the one that needs no gradient.
    swapped = wanted["text"] and not wanted["image"]
    sides = (image_features, text_features)
    rows, columns = reversed(sides) if swapped else sides
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        result = _softmax_passes(
            settings,
            rows.detach(),
            columns.detach(),
            named=settings.named(image_features, text_features),
            row_gradient=wanted["text" if swapped else "image"],
            column_gradient=wanted["image" if swapped else "text"],
            scale_gradient=wanted["scale"],
            purpose=settings.purpose("softmax loss", f"gradients: {describe_wanted(wanted)}"),
        )
    if finite_check is not None:
        finite_check.remember(result.value)
    gradients = [
        PrecomputedGradient(rows, result.rows, result.factor),
        PrecomputedGradient(columns, result.columns, result.factor),
        PrecomputedGradient(settings.scales, result.scales, result.factor),
    ]
    if logit_bias is not None:
        gradients.append(PrecomputedGradient(logit_bias, torch.zeros_like(logit_bias)))
    return attach_gradients("matryoshka_softmax_loss", result.value, gradients)


class _SoftmaxResult(NamedTuple):
    value: Tensor
    factor: float
    rows: Tensor | None = None
    columns: Tensor | None = None
    scales: Tensor | None = None


def _softmax_passes(
    settings: PrefixSettings,
    rows: Tensor,
    columns: Tensor,
    *,
    named: dict[str, Tensor],
    row_gradient: bool,
    column_gradient: bool,
    scale_gradient: bool,
    purpose: str,
) -> _SoftmaxResult:
    dims, dtype = settings.dims, settings.scales.dtype
    plan = prepare_pass(
        [columns],
        named=named,
        nonfinite=settings.nonfinite,
        finite_check=settings.finite_check,
        accumulators=[AccumulatorSpec((), dtype)] * len(dims),
        combine="logaddexp",
        exchange=settings.exchange,
        group=settings.group,
        purpose=purpose,
        shared=settings.shared(),
        comes_again=row_gradient or column_gradient or scale_gradient,
    )
    homes = [Prefix.of(rows, dim) for dim in dims]
    sides = [
        SoftmaxSides(
            home.unit, Prefix.of(columns, dim).unit, scale, settings.tile_shape, settings.kernel
        )
        for home, dim, scale in zip(homes, dims, settings.scales.detach(), strict=True)
    ]
    first = [SumPass(each, plan) for each in sides]

    def add_up(owner: int, shard: Shard, contributions: Shard) -> None:
        for each, dim, sums in zip(first, dims, contributions, strict=True):
            each.visit(owner, (Prefix.of(shard[0], dim).unit,), (sums,))

    column_negatives = plan.run(add_up)
    factor = 0.5 * plan.world_size / max(plan.total_rows, 1)
    shares = settings.scales.new_tensor(settings.shares, dtype=sum_dtype(rows.device))
    positives = torch.stack([each.tiles.sums.positives for each in first])
    negatives = torch.stack(
        [torch.stack([each.tiles.sums.rows for each in first]), torch.stack(column_negatives)]
    )  # (2, K, B)
    excess = negatives - positives
    terms = torch.logaddexp(excess, torch.zeros_like(excess)).sum(dim=(0, 2), dtype=shares.dtype)
    value = ((terms * shares).sum() * factor).to(dtype)
    if not (row_gradient or column_gradient or scale_gradient):
        return _SoftmaxResult(value, factor)

    row_sums, column_sums = torch.logaddexp(negatives, positives).unbind()
    positive_derivatives = -torch.sigmoid(excess).sum(dim=0)
    plan = prepare_pass(
        [columns, column_sums.T.contiguous()],
        named={},
        nonfinite="propagate",
        accumulators=[AccumulatorSpec(columns.shape[1:], dtype)] * column_gradient,
        exchange=settings.exchange,
        group=settings.group,
        purpose=purpose,
        comes_again=True,
    )
    second = [
        GradientPass(
            each,
            plan,
            row_sums[number],
            positive_derivatives[number],
            # The derivative by the scale follows from it.
            row_gradient=row_gradient or scale_gradient,
            with_scale=False,
        )
        for number, each in enumerate(sides)
    ]
    factors = settings.factors()

    def visit(owner: int, shard: Shard, contributions: Shard) -> None:
        sums = [(column.contiguous(),) for column in shard[1].unbind(dim=1)]
        total = contributions[0] if contributions else None
        visit_prefixes(second, dims, factors, owner, shard[0], sums, total)

    brought = plan.run(visit)
    by_scale = []
    for each, one in zip(sides, second, strict=True):
        one.finish()
        if scale_gradient and one.home_gradient is not None:
            by_scale.append(inner_product(each.rows, one.home_gradient))
    at_home = sum_at_home(second, homes, factors, rows) if row_gradient else None
    return _SoftmaxResult(
        value, factor, at_home, brought[0] if brought else None, weighted(by_scale, shares)
    )
