"""Distillation of teachers' logits over the global batch, in the passes of the pairwise losses.

A teacher says how much each image and each text of the global batch belong together; the student
learns that in place of, or beside, which pair is the matching one. Features of the teachers travel
with those of the student, and each rank makes the logits of both for the tile at hand:

    sigmoid    one pass; every pair has a probability of its own
    softmax    two passes; the first collects the log-sum-exp of rows and columns, of the student
               and of every teacher, the second the value and the gradients

Tiles are PyTorch's own operations on every device, in memory O(chunk_rows^2).
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from dist_siglip.distributed import AccumulatorSpec, Exchange, ExchangeName
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    FiniteCheck,
    LossOutput,
    Nonfinite,
    TeacherFeatures,
    check_pairs,
    check_rows,
    check_scalar,
    describe_wanted,
    tile_shape_of,
)
from dist_siglip.losses.kernels.tiles import inner_product, logits_dtype, similarity, sum_dtype
from dist_siglip.losses.ring_pass import (
    PrecomputedGradient,
    RingPass,
    Shard,
    Tile,
    attach_gradients,
    prepare_pass,
    wants_gradient,
)

Form = Literal["sigmoid", "softmax"]


def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    teachers: TeacherFeatures,
    form: Form = "sigmoid",
    share: float = 1.0,
    nonfinite: Nonfinite = "raise",
    finite_check: FiniteCheck | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> LossOutput:
    """Cross-entropy of this rank's pairs with what K teachers say, over the global batch.

    Over the global batch of N pairs on W ranks, z = logit_scale * image_features @ text_features.T
    + logit_bias, and t[k] likewise of teacher k with its own fixed scale and bias. "sigmoid":

        q = mean over k of sigmoid(t[k])
        loss = W/N * sum_{i on this rank} sum_{j < N} softplus(z[i, j]) - q[i, j] * z[i, j]

    "softmax", with p the mean over k of the softmax of t[k] (averaged after it) over the texts of
    an image, and p' over the images of a text:

        loss = W/N * 1/2 * sum_{i on this rank} (
            log sum_{j < N} exp(z[i, j]) - sum_j p[i, j] z[i, j]
            + log sum_{j < N} exp(z[j, i]) - sum_j p'[j, i] z[j, i] )

    With ``share`` below 1 the value is (1 - share) * ``siglip_loss`` (or ``softmax_loss``) plus
    share * this loss, in the same passes: the targets of both are mixed.

    Distributed contract: that of ``siglip_loss`` and ``softmax_loss``; each pass sends the rows of
    all teachers beside those of the student. Teachers get no gradient.

    Args:
        image_features: (B, D), L2-normalised.
        text_features: (B, D), L2-normalised, same dtype.
        logit_scale: one element > 0, of the student.
        logit_bias: one element; None for none. Without effect in the softmax form.
        teachers: features of the same pairs; a bias of each is needed in the sigmoid form alone.
        form: see above.
        share: see above; in (0, 1].
        nonfinite: as in ``siglip_loss``, features of teachers included.
        finite_check: as in ``siglip_loss``.
        exchange: as in ``siglip_loss``.
        group: process group; the default group if None.
        chunk_rows: as in ``siglip_loss``.

    Returns:
        The value, (), float32 (float64 for float64 features), with the terms distillation_loss;
        distillation_kl, this loss less the entropy of the teachers, which is 0 for a student that
        agrees; distillation_gain, by how much it is below that of a student for which each text is
        as likely as any other, 1/N; and base_loss, if ``share`` is below 1.

    Raises:
        UserError: as ``siglip_loss``, or if features of teachers do not fit the pairs or their
            dims, a scale is not above 0, or a bias is missing in the sigmoid form.

    Example:
        >>> eye, ten = torch.eye(2), torch.tensor(10.0)
        >>> teachers = TeacherFeatures(eye, eye, dims=(2,), scales=(10.0,), biases=(-5.0,))
        >>> distillation_loss(eye, eye, ten, -ten / 2, teachers=teachers).loss
        tensor(0.0804)

    Source:
        Vasu et al. 2024, arXiv:2311.17049, equation 2 (softmax form; the mean over teachers is
        taken of probabilities as in the authors' code). The sigmoid form is ours.
    """
    _check(image_features, text_features, logit_scale, logit_bias, teachers, form)
    dtype = logits_dtype(image_features)
    scale = logit_scale.reshape(()).to(dtype)
    bias = torch.zeros_like(scale) if logit_bias is None else logit_bias.reshape(()).to(dtype)
    wanted = {
        "image": wants_gradient(image_features),
        "text": wants_gradient(text_features),
        "scale": wants_gradient(scale),
        "bias": wants_gradient(bias),
    }
    # The side that travels should be the one that needs no gradient.
    swapped = wanted["text"] and not wanted["image"]
    pairs = ((image_features, teachers.image), (text_features, teachers.text))
    (home, teacher_home), (columns, teacher_columns) = reversed(pairs) if swapped else pairs
    home_wanted, columns_wanted = (
        wanted["text" if swapped else "image"],
        wanted["image" if swapped else "text"],
    )
    sides = _Sides(
        home.detach(),
        columns.detach(),
        teacher_home.detach(),
        teacher_columns.detach(),
        scale.detach(),
        bias.detach(),
        teachers,
        share,
        tile_shape_of(chunk_rows, image_features.device),
    )

    def prepare(
        travelling: Shard, accumulators: list[AccumulatorSpec], *, is_first: bool
    ) -> Exchange:
        named = {
            "image_features": image_features.detach(),
            "text_features": text_features.detach(),
            "teacher_image_features": teachers.image.detach(),
            "teacher_text_features": teachers.text.detach(),
            "logit_scale": scale.detach(),
            "logit_bias": bias.detach(),
        }
        return prepare_pass(
            travelling,
            named=named if is_first else {},
            nonfinite=nonfinite if is_first else "propagate",
            finite_check=finite_check if is_first else None,
            accumulators=accumulators,
            combine="logaddexp" if is_first and form == "softmax" else "sum",
            exchange=exchange,
            group=group,
            purpose=(
                f"distillation in the {form} form, share {share}; "
                f"{'images' if swapped else 'texts'} travel; "
                f"teachers: dims {teachers.dims}, scales {teachers.scales}, biases "
                f"{teachers.biases}; gradients: {describe_wanted(wanted)}"
            ),
            shared={"logit_scale": scale.detach(), "logit_bias": bias.detach()}
            if is_first
            else None,
            comes_again=any(wanted.values()),
        )

    with torch.no_grad(), torch.autocast(image_features.device.type, enabled=False):
        accumulators = [AccumulatorSpec(columns.shape[1:], dtype)] * columns_wanted
        # The derivative by the scale follows from the gradient of either side.
        with_home = home_wanted or (wanted["scale"] and not columns_wanted)
        if form == "sigmoid":
            plan = prepare(sides.travelling, accumulators, is_first=True)
            ring_pass: _SigmoidPass | _SoftmaxPass = _SigmoidPass(sides, plan, with_home)
        else:
            sums = [AccumulatorSpec((), dtype)] * (1 + len(teachers.dims))
            plan = prepare(sides.travelling, sums, is_first=True)
            first = _LogSumPass(sides, plan)
            column_sums = torch.stack(first.run(plan), dim=1)
            plan = prepare((*sides.travelling, column_sums), accumulators, is_first=False)
            ring_pass = _SoftmaxPass(sides, plan, first.sums, with_home)
        brought = ring_pass.run(plan)
        by_scale: Tensor | None = None
        if wanted["scale"] and ring_pass.home_gradient is not None:
            by_scale = inner_product(sides.home, ring_pass.home_gradient)
        elif wanted["scale"]:
            by_scale = inner_product(sides.columns, brought[0])
    # Mean over ranks of (W / N * own rows) is the sum over all rows divided by N.
    factor = plan.world_size / max(plan.total_rows, 1) * ring_pass.part
    found = ring_pass.values(max(plan.total_rows, 2))
    learned, entropy, even, base = ((each * factor).to(dtype) for each in found)
    value = learned if share == 1 else (1 - share) * base + share * learned
    if finite_check is not None:
        finite_check.remember(value)
    loss = attach_gradients(
        "distillation_loss",
        value,
        [
            PrecomputedGradient(
                home, ring_pass.home_gradient if home_wanted else None, scale.detach() * factor
            ),
            PrecomputedGradient(columns, brought[0] if brought else None, scale.detach() * factor),
            PrecomputedGradient(scale, by_scale, factor),
            PrecomputedGradient(bias, ring_pass.by_bias if wanted["bias"] else None, factor),
        ],
    )
    terms = {
        "distillation_loss": learned,
        "distillation_kl": learned - entropy,
        "distillation_gain": even - learned,
        **({} if share == 1 else {"base_loss": base}),
    }
    return LossOutput(loss, None, terms)


def check_form(form: str) -> None:
    """Raise ``UserError`` unless the name is that of a form."""
    if form not in get_args(Form):
        raise UserError(f"form ({form!r}) must be one of {', '.join(get_args(Form))}")


def _check(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    teachers: TeacherFeatures,
    form: str,
) -> None:
    check_pairs(image_features, text_features)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    check_form(form)
    rows = {"teacher_image_features": teachers.image, "teacher_text_features": teachers.text}
    check_rows(**rows)
    for name, given in rows.items():
        if given.shape != (len(image_features), sum(teachers.dims)):
            raise UserError(
                f"{name} {tuple(given.shape)} must be ({len(image_features)}, "
                f"{sum(teachers.dims)}): a row for each pair, and the columns of teachers with "
                f"dims {list(teachers.dims)} side by side"
            )
    check_teacher_logits(teachers.dims, teachers.scales, teachers.biases, form)


def check_teacher_logits(
    dims: tuple[int, ...],
    scales: tuple[float | None, ...],
    biases: tuple[float | None, ...],
    form: str,
    names: tuple[str, ...] = (),
) -> None:
    """Check that every teacher has what a form of distillation makes its logits of.

    Args:
        dims: of K teachers.
        scales: of each; None where it is not known.
        biases: likewise.
        form: "sigmoid" or "softmax".
        names: of teachers, for error texts; () counts them from 0.

    Raises:
        UserError: naming the teacher.
    """
    if not dims or not len(dims) == len(scales) == len(biases):
        raise UserError(
            f"teachers have {len(dims)} dims, {len(scales)} scales and {len(biases)} biases; give "
            "one of each for every teacher, and at least one teacher"
        )
    names = names or tuple(f"teacher {number}" for number in range(len(dims)))
    for name, scale, bias in zip(names, scales, biases, strict=True):
        if scale is None or not 0 < scale < math.inf:
            raise UserError(
                f"scale ({scale}) of {name} must be a number above 0, by which its "
                "cosines become logits (CLIP models: 100); give its scale"
            )
        if form == "sigmoid" and (bias is None or not math.isfinite(bias)):
            raise UserError(
                f"bias ({bias}) of {name} must be a number: the sigmoid form needs one, "
                "and a teacher of a softmax loss has none; give its bias, or take form softmax"
            )


class _Sides(NamedTuple):
    """What stays, what travels, and how both become logits."""

    home: Tensor
    columns: Tensor
    teacher_home: Tensor
    teacher_columns: Tensor
    scale: Tensor
    bias: Tensor
    teachers: TeacherFeatures
    share: float
    tile_shape: tuple[int, int]

    @property
    def travelling(self) -> Shard:
        """Student's and teachers' columns."""
        return self.columns, self.teacher_columns

    def logits(self, rows: slice, shard: Shard) -> Tensor:
        """Logits of the student, (rows, columns)."""
        return similarity(self.home[rows], shard[0]).mul_(self.scale).add_(self.bias)

    def teacher_logits(self, rows: slice, shard: Shard) -> list[Tensor]:
        """Logits of each teacher, in the dtype of the student's."""
        sides = (
            side.split(self.teachers.dims, dim=1) for side in (self.teacher_home[rows], shard[1])
        )
        return [
            similarity(mine, theirs).to(self.scale.dtype).mul_(scale).add_(bias or 0.0)
            for mine, theirs, scale, bias in zip(
                *sides, self.teachers.scales, self.teachers.biases, strict=True
            )
        ]


class _DistillationPass(RingPass):
    """Sums over the tiles of a form: value, entropy of the teachers, and what they expect.

    Attributes:
        part: share of each sum that counts.
        by_bias: sum of the derivative, (); 0 where the bias has no effect.
    """

    part = 1.0

    def __init__(self, sides: _Sides, plan: Exchange, with_home: bool) -> None:
        super().__init__(sides.home, plan, sides.tile_shape, with_home_gradient=with_home)
        self.sides = sides
        wide = sum_dtype(sides.home.device)
        zeros = sides.home.new_zeros(5, dtype=wide)
        self.value, self.entropy, self.expected, self.base, self.by_bias = zeros.unbind()

    def values(self, num_pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return loss, entropy, loss of a student for which all of N texts are alike, and base."""
        raise NotImplementedError

    def _mix(self, target: Tensor, diagonal: int | None) -> Tensor:
        """Mix the matching pairs into the target of a tile, in place."""
        if self.sides.share < 1:
            target.mul_(self.sides.share)
            if diagonal is not None:
                target.diagonal(diagonal).add_(1 - self.sides.share)
        return target

    def _add(self, total: Tensor, terms: Tensor) -> None:
        total += terms.sum(dim=1).sum(dtype=total.dtype)


class _SigmoidPass(_DistillationPass):
    """The only pass of the sigmoid form."""

    num_visited = 0

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> Tensor:
        """Add one tile to the sums; return its derivative."""
        z = self.sides.logits(place.rows, shard)
        of_teachers = self.sides.teacher_logits(place.rows, shard)
        # Both from their own logits: 1 - q would lose the digits of a q close to 1.
        is_pair = _mean(of_teachers, torch.sigmoid)
        is_none = _mean(of_teachers, lambda t: torch.sigmoid(-t))
        terms = softplus(-z.abs())
        if self.sides.share < 1:
            of_base = terms + z.clamp(min=0)
            if place.diagonal is not None:
                matching = z.diagonal(place.diagonal)
                of_base.diagonal(place.diagonal).copy_(torch.logaddexp(-matching, 0 * matching))
            self._add(self.base, of_base)
        terms.add_(z.clamp(min=0).mul_(is_none)).sub_(z.clamp(max=0).mul_(is_pair))
        self._add(self.value, terms)
        self._add(self.entropy, torch.special.entr(is_pair) + torch.special.entr(is_none))
        self._add(self.expected, is_pair)
        self.num_visited += z.numel()
        derivative = z.sigmoid_().sub_(self._mix(is_pair, place.diagonal))
        self._add(self.by_bias, derivative)
        return derivative

    def values(self, num_pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sums; all texts alike have probabilities 1/N."""
        others = self.num_visited - self.expected
        even = self.expected * math.log(num_pairs) - others * math.log1p(-1 / num_pairs)
        return self.value, self.entropy, even, self.base


class _LogSumPass(RingPass):
    """First pass of the softmax form: log-sum-exp of rows and columns, student first."""

    def __init__(self, sides: _Sides, plan: Exchange) -> None:
        super().__init__(sides.home, plan, sides.tile_shape, with_home_gradient=False)
        self.sides = sides
        self.sums = sides.home.new_full(
            (len(sides.home), 1 + len(sides.teachers.dims)), -torch.inf, dtype=sides.scale.dtype
        )

    def begin(self, contributions: Shard) -> None:
        """Start the sums of the columns."""
        for sums in contributions:
            sums.fill_(-torch.inf)

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> None:
        """Add one tile to the sums."""
        of_teachers = self.sides.teacher_logits(place.rows, shard)
        for number, logits in enumerate([self.sides.logits(place.rows, shard), *of_teachers]):
            of_rows, of_columns = self.sums[place.rows, number], added[number]
            of_rows.copy_(torch.logaddexp(of_rows, logits.logsumexp(dim=1)))
            of_columns.copy_(torch.logaddexp(of_columns, logits.logsumexp(dim=0)))


class _SoftmaxPass(_DistillationPass):
    """Second pass of the softmax form."""

    part = 0.5

    def __init__(self, sides: _Sides, plan: Exchange, row_sums: Tensor, with_home: bool) -> None:
        super().__init__(sides, plan, with_home)
        self.row_sums = row_sums

    def tile(self, place: Tile, home: Tensor, shard: Shard, added: Shard) -> Tensor:
        """Add one tile to the sums; ``shard`` ends with the sums of columns."""
        z = self.sides.logits(place.rows, shard)
        of_teachers = self.sides.teacher_logits(place.rows, shard)
        derivative = torch.zeros_like(z)
        for sums in (self.row_sums[place.rows].T[:, :, None], shard[2].T[:, None, :]):
            target = _mean(
                [t - each for t, each in zip(of_teachers, sums[1:], strict=True)], torch.exp
            )
            log_student = z - sums[0]
            self._add(self.value, -target * log_student)
            self._add(self.entropy, torch.special.entr(target))
            self._add(self.expected, target)
            if self.sides.share < 1 and place.diagonal is not None:
                self.base -= log_student.diagonal(place.diagonal).sum(dtype=self.base.dtype)
            derivative.add_(log_student.exp_()).sub_(self._mix(target, place.diagonal))
        return derivative

    def values(self, num_pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sums; all texts alike have probabilities 1/N."""
        return self.value, self.entropy, self.expected * math.log(num_pairs), self.base


def _mean(logits: list[Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over the teachers of a function of their logits."""
    total = of(logits[0])
    for each in logits[1:]:
        total += of(each)
    return total.div_(len(logits)) if len(logits) > 1 else total
