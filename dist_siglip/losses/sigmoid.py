"""Sigmoid loss over the global batch, in a single pass of the shards around the ranks.

Because a tile gives its loss and all gradients at once (``tiles``), the shards of one side and
their gradient accumulators visit every rank together, once. After the pass the loss is known and
every gradient is at home; backward only multiplies by the incoming scalar and communicates
nothing.

The texts travel, unless only they need a gradient (a frozen image tower): then the images travel
and no accumulator does. With frozen texts none does either. The numbers are the same.

Memory per rank: O(B * D + chunk_rows^2), whatever the number of ranks (exchange "ring").
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from dist_siglip.distributed import AccumulatorSpec, Exchange, ExchangeName, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    FiniteCheck,
    LossOutput,
    Nonfinite,
    check_negatives,
    check_pairs,
    check_scalar,
    describe_wanted,
    tile_shape_of,
)
from dist_siglip.losses.kernels.pair_terms import Duplicates, Kernel, choose_kernel, join_ids
from dist_siglip.losses.kernels.tiles import SigmoidTiles, inner_product, logits_dtype
from dist_siglip.losses.mined_negatives import MinedTerms, check_mining, mine_negatives
from dist_siglip.losses.ring_pass import (
    PrecomputedGradient,
    RingPass,
    Shard,
    Tile,
    attach_gradients,
    largest_tile,
    prepare_pass,
    wants_gradient,
)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    negative_text_features: Tensor | None = None,
    mined_negatives: int = 0,
    mined_weight: float = 1.0,
    caption_ids: Tensor | None = None,
    picture_ids: Tensor | None = None,
    duplicates: Duplicates = "positive",
    nonfinite: Nonfinite = "raise",
    finite_check: FiniteCheck | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Sigmoid loss of this rank's images against the texts of all ranks.

    With y[i, j] = +1 if i == j else -1 over the global batch of N pairs on W ranks:

        loss = W/N * sum_{i on this rank} sum_{j < N} w[i, j] * softplus(-y[i, j] * logits[i, j])
        logits = logit_scale * image_features @ text_features.T + logit_bias

    and w[i, j] = 1. With ids, a duplicate is a pair i != j whose caption ids or whose picture ids
    are equal, on whatever ranks: the same caption elsewhere, or another caption of the picture.
    "positive": y = +1 for duplicates too; "masked": w = 0 for them; "negative": they are only
    counted. N stays the number of rows: neither the positives of a row nor the masked pairs change
    the divisor.

    ``negative_text_features`` are M further texts on all ranks, v[k], which no picture belongs to.
    They travel with the others, and the loss has in addition

        W/N * sum_{i on this rank} sum_{k < M} softplus(logit_scale * image_features[i] . v[k]
                                                        + logit_bias)

    With ``mined_negatives`` = k it has in addition, with mined_weight = a,

        W/N * a * sum_{i on this rank} sum_{j in H[i]} softplus(logits[i, j])

    where H[i] are the k texts of the global batch with the largest logits that are not i's own and
    share no id with it, whatever ``duplicates`` are; fewer if there are no more. Logits are
    compared in steps of logit_scale * 2^-16, and of equal ones the first in rank order is taken.
    Without ids the caption of i under another picture may be among them. Texts without a picture
    are not.

    Distributed contract: every rank passes its own rows; the mean over ranks of the returned
    value is the loss of the global batch, and the mean over ranks of the gradients (what DDP and
    FSDP compute) is its gradient: for both towers, scale and bias, for even and uneven local
    batches (W/N, not 1/B). One small all-gather on the CPU, then one pass of the exchange;
    backward communicates nothing. Mining is a pass without gradients before it. First-order
    gradients only: create_graph=True raises.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised, same dtype; row i belongs to image i. B may differ
            between ranks.
        logit_scale: one element > 0, the multiplier (not its logarithm).
        logit_bias: one element, added to every logit; None for none.
        negative_text_features: (m, D), L2-normalised, same dtype, whatever B; m may differ between
            ranks. A row of zeros is none: it adds nothing. Either all ranks pass them or none does.
        mined_negatives: k, at least 0, see above. Texts then travel whatever trains.
        mined_weight: a > 0, see above.
        caption_ids: (B,), integers, equal for equal captions; None for none. Either all ranks
            pass them or none does.
        picture_ids: (B,), integers, equal for equal pictures; likewise.
        duplicates: what duplicates are, see above; without effect if there are no ids.
        nonfinite: "raise" refuses features, scale and bias that are not finite; "propagate" looks
            for nothing. The same on every rank.
        finite_check: memory of earlier calls, see ``nonfinite``; None checks on a CPU only.
        exchange: how features reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time. None is 1024 on a
            CPU, 8192 rows and 4096 columns on a GPU.
        kernel: who computes the terms of a tile: "triton", one kernel of ours; "compiled",
            PyTorch's operations through torch.compile; "eager", these as they are; "auto": eager on
            a CPU, triton on a GPU, or compiled where triton is missing or does not build.

    Returns:
        (), float32 (float64 for float64 features); a sum over pairs times W/N.

    Raises:
        UserError: if features are not real (B, D), shapes or dtypes of the two sides differ,
            chunk_rows < 1, ``mined_negatives`` < 0, ``mined_weight`` is not a finite number > 0,
            ``duplicates`` or ``kernel`` is unknown or the kernel cannot be had, features, scale or
            bias are not finite or the scale not above 0 (names rank and row), or ranks disagree on
            dtype, D, exchange, duplicates, mining, which gradients they need, whether there is a
            bias, or the values of scale and bias (names the rank). On a device those values are
            compared at the first call only; ``chunk_rows`` and ``kernel`` may differ between ranks,
            the result is the same up to rounding.

    Example:
        >>> features = torch.eye(2, requires_grad=True)
        >>> loss = siglip_loss(features, torch.eye(2), torch.tensor(10.0), torch.tensor(-10.0))
        >>> loss
        tensor(0.6932, grad_fn=<_AttachBackward>)
        >>> same = torch.tensor([7, 7])  # now every logit belongs to a positive
        >>> siglip_loss(features, torch.eye(2), torch.tensor(10.0), torch.tensor(-10.0),
        ...             caption_ids=same)
        tensor(10.6932, grad_fn=<_AttachBackward>)

    Source:
        Zhai et al. 2023, arXiv:2303.15343, Algorithm 1 and section 3.3 (chunked form); the bias
        is added to the logits as in the authors' big_vision code. Duplicates and mined negatives
        are ours.
    """
    return siglip_loss_output(
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        negative_text_features=negative_text_features,
        mined_negatives=mined_negatives,
        mined_weight=mined_weight,
        caption_ids=caption_ids,
        picture_ids=picture_ids,
        duplicates=duplicates,
        nonfinite=nonfinite,
        finite_check=finite_check,
        exchange=exchange,
        group=group,
        chunk_rows=chunk_rows,
        kernel=kernel,
    ).loss


def siglip_loss_output(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    negative_text_features: Tensor | None = None,
    mined_negatives: int = 0,
    mined_weight: float = 1.0,
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
    """Return ``siglip_loss`` and what was counted; the same contract.

    With mined negatives ``terms`` has their part, mined_loss, and the rest, base_loss.
    """
    check_pairs(image_features, text_features)
    check_negatives(negative_text_features, text_features)
    check_mining(mined_negatives, mined_weight)
    tile_shape = tile_shape_of(chunk_rows, image_features.device)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    chosen = choose_kernel(kernel, image_features)
    check_ids({"caption_ids": caption_ids, "picture_ids": picture_ids}, duplicates, image_features)
    ids = text_ids = join_ids(caption_ids, picture_ids)
    dtype = logits_dtype(image_features)
    scale = logit_scale.reshape(()).to(dtype)
    bias = torch.zeros_like(scale) if logit_bias is None else logit_bias.reshape(()).to(dtype)
    named = {
        "image_features": image_features.detach(),
        "text_features": text_features.detach(),
        "logit_scale": scale.detach(),
        "logit_bias": bias.detach(),
    }
    own_texts, negatives = text_features, negative_text_features
    if negatives is not None:
        named["negative_text_features"] = negatives.detach()
        is_there = (negatives.detach() != 0).any(dim=1)
        num_none = (~is_there).sum()
        text_features = torch.cat([text_features, negatives * is_there[:, None]])
        if ids is not None:  # an id that no picture has
            ids = ids.long()
            none = ids.new_full((len(negatives), *ids.shape[1:]), torch.iinfo(ids.dtype).min)
            text_ids = torch.cat([ids, none])
    wanted = Wanted(*map(wants_gradient, (image_features, text_features, scale, bias)))
    images_travel = wanted.text and not wanted.image and not mined_negatives
    sides = SigmoidSides(images_travel, image_features, text_features)
    home_ids, travelling_ids = (text_ids, ids) if sides.images_travel else (ids, text_ids)
    plan = prepare_pass(
        [sides.travelling] if travelling_ids is None else [sides.travelling, travelling_ids],
        named=named,
        nonfinite=nonfinite,
        finite_check=finite_check,
        accumulators=[AccumulatorSpec(image_features.shape[1:], dtype)] * sides.brings_back(wanted),
        exchange=exchange,
        group=group,
        purpose=(
            f"sigmoid loss; {sides.travellers} travel; gradients: "
            f"{describe_wanted(wanted._asdict())}; "
            f"{'no bias' if logit_bias is None else 'bias'}; "
            f"duplicates: {'no ids' if ids is None else duplicates}"
            f"{'' if picture_ids is None else ', with picture ids'}"
            f"{'' if negatives is None else '; with negative texts'}"
            f"{f'; mined: {mined_negatives}, weight {mined_weight:g}' if mined_negatives else ''}"
        ),
        shared={"logit_scale": scale.detach(), "logit_bias": bias.detach()},
        comes_again=any(wanted),
    )
    mined: MinedTerms | None = None
    with torch.no_grad(), torch.autocast(image_features.device.type, enabled=False):
        if mined_negatives:
            hardest = mine_negatives(
                image_features,
                own_texts,
                mined_negatives,
                ids=ids,
                tile_shape=tile_shape,
                exchange=exchange,
                group=group,
                comes_again=any(wanted),
            )
            mined = MinedTerms(hardest, mined_weight, scale, bias, plan.row_counts)
        ring_pass = SigmoidPass(
            sides,
            plan,
            scale.detach(),
            bias.detach(),
            home_ids,
            wanted,
            tile_shape,
            chosen,
            duplicates,
            mined,
        )
        gradients = ring_pass.gradients(ring_pass.run(plan))
        sums = ring_pass.tiles.sums()
    # Mean over ranks of (W / N * own rows) is the sum over all rows divided by N.
    factor: float | Tensor = plan.world_size / max(plan.total_rows, 1)
    if negatives is not None and not sides.images_travel:  # rows that travel are not N
        num_images = torch.full((), len(image_features), dtype=dtype, device=sides.home.device)
        factor = plan.world_size / sum_over_ranks(num_images, group).clamp(min=1)
    terms: dict[str, Tensor] = {}
    total = sums.value
    if mined is not None:
        total = total + mined.value
        terms["mined_loss"] = (mined.value * factor).to(dtype)
    value = (total * factor).to(dtype)
    if finite_check is not None:
        finite_check.remember(value)
    loss = attach_gradients(
        "siglip_loss",
        value,
        [
            PrecomputedGradient(image_features, gradients.image, scale.detach() * factor),
            PrecomputedGradient(text_features, gradients.text, scale.detach() * factor),
            PrecomputedGradient(scale, gradients.scale, factor),
            PrecomputedGradient(bias, gradients.bias, factor),
        ],
    )
    if negatives is not None:
        # Rows of zeros met every image with the bias alone, which is known.
        loss = loss - plan.world_size * num_none * softplus(bias)
    if terms:
        terms["base_loss"] = loss.detach() - terms["mined_loss"]
    return LossOutput(loss, sums.duplicate_pairs, terms)


class Wanted(NamedTuple):
    """Which gradients are needed on this rank."""

    image: bool
    text: bool
    scale: bool
    bias: bool


class _Gradients(NamedTuple):
    """Without W/N and the incoming gradient; those of the features without logit_scale too."""

    image: Tensor | None
    text: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


class SigmoidSides:
    """Which of the two sides stays at home and which travels."""

    def __init__(self, images_travel: bool, image_features: Tensor, text_features: Tensor) -> None:
        self.images_travel = images_travel
        pair = (image_features.detach(), text_features.detach())
        self.travelling, self.home = pair if images_travel else pair[::-1]

    @property
    def travellers(self) -> str:
        """Name what travels."""
        return "images" if self.images_travel else "texts"

    def brings_back(self, wanted: Wanted) -> bool:
        """Whether a gradient travels home with the side that travels."""
        return wanted.text and not self.images_travel


class SigmoidPass(RingPass):
    """The only pass of the loss."""

    def __init__(
        self,
        sides: SigmoidSides,
        plan: Exchange,
        scale: Tensor,
        bias: Tensor,
        home_ids: Tensor | None,
        wanted: Wanted,
        tile_shape: tuple[int, int],
        kernel: Kernel,
        duplicates: Duplicates,
        mined: MinedTerms | None = None,
    ) -> None:
        self.sides, self.wanted, self.home_ids, self.mined = sides, wanted, home_ids, mined
        self.home_wanted = wanted.text if sides.images_travel else wanted.image
        self.tiles = SigmoidTiles(
            sides.home,
            largest_tile(sides.home, plan, tile_shape),
            scale,
            bias,
            kernel=kernel,
            with_derivative=any(wanted),
            has_ids=home_ids is not None,
            duplicates=duplicates,
        )
        # The derivative by the scale follows from either side's gradient.
        follows = self.tiles.sums_scale or sides.brings_back(wanted)
        with_home = self.home_wanted or (wanted.scale and not follows)
        super().__init__(sides.home, plan, tile_shape, with_home_gradient=with_home)

    def gradients(self, brought: Shard) -> _Gradients:
        """Return the gradients that are wanted; ``brought`` came home with the own shard."""
        travelled = brought[0] if brought else None
        sums, mined = self.tiles.sums(), self.mined
        by_bias = sums.derivative if mined is None else sums.derivative + mined.by_bias
        scale_gradient = sums.scale if self.wanted.scale else None
        if scale_gradient is not None and mined is not None:
            scale_gradient = scale_gradient + mined.by_scale
        if self.wanted.scale and scale_gradient is None:
            # sum_ij derivative_ij * similarity_ij, from what is already there.
            if self.home_gradient is not None:
                scale_gradient = inner_product(self.sides.home, self.home_gradient)
            elif travelled is not None:
                scale_gradient = inner_product(self.sides.travelling, travelled)
        home = self.home_gradient if self.home_wanted else None
        return _Gradients(
            *((None, home) if self.sides.images_travel else (home, travelled)),
            scale_gradient,
            by_bias if self.wanted.bias else None,
        )

    def replayed(self) -> tuple[Hashable, Sequence[Tensor]] | None:
        """Say what the tiles depend on."""
        if self.mined is not None:  # whose places depend on the owner
            return None
        own = self.tiles.replayed()
        if own is None or self.home_ids is None:
            return own
        return own[0], (*own[1], self.home_ids)

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> Tensor | None:
        """Add one tile to the sums; return its derivative."""
        derivative = self.tiles.derivative(
            home,
            shard[0],
            diagonal=place.diagonal,
            row_ids=None if self.home_ids is None else self.home_ids[place.rows],
            column_ids=None if self.home_ids is None else shard[1],
        )
        if derivative is not None and self.mined is not None:
            self.mined.add_to(derivative, place)
        return derivative


def check_ids(ids: dict[str, Tensor | None], duplicates: str, features: Tensor) -> None:
    """Raise ``UserError`` unless ids are integers beside the features, or None."""
    if duplicates not in get_args(Duplicates):
        raise UserError(
            f"duplicates ({duplicates!r}) must be one of {', '.join(get_args(Duplicates))}"
        )
    for name, given in ids.items():
        if given is None:
            continue
        is_whole = not (given.dtype.is_floating_point or given.dtype.is_complex)
        if given.shape != features.shape[:1] or not is_whole:
            raise UserError(
                f"{name} {tuple(given.shape)} ({given.dtype}) must be integers, one for each of "
                f"the {features.shape[0]} pairs"
            )
        if given.device != features.device:
            raise UserError(
                f"{name} ({given.device}) must be on the features' device ({features.device})"
            )
