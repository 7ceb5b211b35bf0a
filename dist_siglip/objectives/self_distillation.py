"""Self-distillation and masked prediction: a student learns what an average of itself says.

The teacher is an average over steps of image tower and heads, which whoever trains keeps. It sees
one global view of each picture; the student sees small crops of it, or the same view with some of
its patches hidden.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dist_siglip.data.samples.transforms import ViewRule
from dist_siglip.errors import UserError
from dist_siglip.models import BuiltModel, TokenShape
from dist_siglip.models.image_tokens import require_views
from dist_siglip.objectives.objective import Objective, Rows, Term, uniform
from dist_siglip.objectives.prototypes import PrototypeHead, prototype_losses

Assignment = Literal["centre", "sinkhorn"]

_MASK_STREAM = 1 << 20  # of ``uniform``, and as many of those behind it as there are patches
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # from one stream of ``uniform`` to the next
_LOCAL_SHARE = 3 / 8  # of the side of the model's pictures, 96 of 256 pixels


class TeacherObjective(Objective):
    """An objective whose targets are a teacher's choice among prototypes.

        p = softmax((g - c) / tau_t),    L = - sum_k p_k log softmax(h / tau_s)_k

    with teacher logits g and student logits h. The centre c follows the mean of g over all ranks,
    used from the next step on; with "sinkhorn" it is instead what gives every prototype an equal
    share of the global batch. tau_t rises over the first steps of the objective.

    A subclass says in ``chosen`` what of a picture the head reads.
    """

    head: PrototypeHead
    views: ViewRule
    hides_patches: ClassVar[bool] = False

    def __init__(
        self,
        weight: float,
        start: float,
        ramp_steps: int,
        *,
        global_scale: tuple[float, float],
        prototypes: int,
        hidden: int,
        bottleneck: int,
        student_temperature: float,
        teacher_temperature: float,
        first_teacher_temperature: float,
        temperature_steps: int,
        assignment: Assignment,
        centre_momentum: float,
    ) -> None:
        super().__init__(weight, start, ramp_steps)
        who = type(self).__name__
        for name, size, least in (
            ("prototypes", prototypes, 2),
            ("hidden", hidden, 1),
            ("bottleneck", bottleneck, 1),
            ("temperature_steps", temperature_steps, 0),
        ):
            if size < least:
                raise UserError(f"{name} ({size}) of {who} must be at least {least}")
        for name, value in (
            ("student_temperature", student_temperature),
            ("teacher_temperature", teacher_temperature),
            ("first_teacher_temperature", first_teacher_temperature),
        ):
            if not 0 < value < math.inf:
                raise UserError(f"{name} ({value}) of {who} must be above 0")
        if not 0 <= centre_momentum < 1:
            raise UserError(f"centre_momentum ({centre_momentum}) of {who} must be in [0, 1)")
        if assignment not in ("centre", "sinkhorn"):
            raise UserError(f"assignment ({assignment}) of {who} must be centre or sinkhorn")
        _check_scale("global_scale", global_scale, who)
        self._sizes = prototypes, hidden, bottleneck
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.first_teacher_temperature = first_teacher_temperature
        self.temperature_steps = temperature_steps
        self.assignment, self.centre_momentum = assignment, centre_momentum
        self.views = ViewRule(global_scale=global_scale)

    def build(self, built: BuiltModel, image: TokenShape) -> None:
        """Make the head.

        Raises:
            UserError: as ``require_views``.
        """
        require_views(built.encoder.clip.visual, type(self).__name__)
        self.head = PrototypeHead(image.width, *self._sizes)

    def chosen(self, pooled: Tensor, tokens: Tensor, draws: Tensor) -> Tensor:
        """Return the (b, R, C) vectors of the teacher's view that its head reads.

        Args:
            pooled: (b, C).
            tokens: (b, T, C).
            draws: (b,).
        """
        raise NotImplementedError

    def measure(self, rows: Rows) -> dict[str, Term]:
        """Return nothing: an evaluation has no views."""
        return {}

    def temperature_at(self, steps_begun: int) -> float:
        """Return the teacher's temperature, a number of steps after the objective began.

        Example:
            >>> objective = SelfDistillation(temperature_steps=2)
            >>> [round(objective.temperature_at(steps), 3) for steps in (0, 1, 2, 9)]
            [0.04, 0.055, 0.07, 0.07]
        """
        share = min(steps_begun / self.temperature_steps, 1.0) if self.temperature_steps else 1.0
        first = self.first_teacher_temperature
        return first + share * (self.teacher_temperature - first)

    def _losses(self, rows: Rows, student: Tensor) -> Tensor:
        """(b, R, V) losses of V student vectors against each of R of the teacher."""
        target = rows.targets[self.name]
        losses = prototype_losses(
            student.flatten(0, 1),
            self.head.prototypes(),
            target.rows.flatten(0, 1),
            target.prototypes,
            target.centre,
            student_temperature=self.student_temperature,
            teacher_temperature=target.temperature,
        )
        return losses.unflatten(0, student.shape[:2])


class SelfDistillation(TeacherObjective):
    """Cross-entropy of small crops against what the teacher says of a large one.

        L = 1/(V N) sum_vi - sum_k p_ik log softmax(h_vi / tau_s)_k

    The head reads what the tower pools, before any projection.

    Args:
        weight: as ``Objective``.
        start: as ``Objective``.
        ramp_steps: as ``Objective``.
        local_views: V, small crops of each picture.
        local_size: their side in pixels, a multiple of the patches; null is 3/8 of the model's.
        local_scale: share of the picture's area that a small crop keeps, (least, most).
        global_scale: likewise of the teacher's crop.
        prototypes: K.
        hidden: channels inside of the head.
        bottleneck: channels of its vector.
        student_temperature: tau_s, > 0.
        teacher_temperature: tau_t, > 0, after ``temperature_steps``.
        first_teacher_temperature: tau_t at the first step.
        temperature_steps: steps over which it then changes, by equal parts.
        assignment: "centre", or "sinkhorn": three rounds over the global batch.
        centre_momentum: of the centre, in [0, 1).

    Raises:
        UserError: if a number is out of range; later, if the image tower takes no views, or hides
            patches by itself.

    Source:
        Loss and head: Caron et al. 2021 (DINO), arXiv:2104.14294. Beside a text loss: Naeem et al.
        2023 (SILC), arXiv:2310.13355. One global and 8 local views, an image that stays as it is
        for the text loss, weight 1 times a factor of 0.25 to 1 by size: Tschannen et al. 2025
        (SigLIP 2), arXiv:2502.14786, section 2.3. Prototypes, sizes and temperatures are DINO's.
        Its gradient of prototypes is not stopped for an epoch, as DINO's is.
    """

    name: ClassVar[str] = "self_distillation"

    def __init__(
        self,
        weight: float = 1.0,
        start: float = 0.0,
        ramp_steps: int = 0,
        local_views: int = 8,
        local_size: int | None = None,
        local_scale: tuple[float, float] = (0.05, 0.4),
        global_scale: tuple[float, float] = (0.4, 1.0),
        prototypes: int = 65_536,
        hidden: int = 2048,
        bottleneck: int = 256,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        first_teacher_temperature: float = 0.04,
        temperature_steps: int = 1000,
        assignment: Assignment = "centre",
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__(
            weight,
            start,
            ramp_steps,
            global_scale=global_scale,
            prototypes=prototypes,
            hidden=hidden,
            bottleneck=bottleneck,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            first_teacher_temperature=first_teacher_temperature,
            temperature_steps=temperature_steps,
            assignment=assignment,
            centre_momentum=centre_momentum,
        )
        self.needs = frozenset({"global view", "local views"})
        for name, value in (("local_views", local_views), ("local_size", local_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} ({value}) of SelfDistillation must be at least 1")
        _check_scale("local_scale", local_scale, "SelfDistillation")
        self._local = local_views, local_size, local_scale

    def build(self, built: BuiltModel, image: TokenShape) -> None:
        """Make the head, and settle the size of small crops.

        Raises:
            UserError: as ``require_views``, or if patches do not divide ``local_size``.
        """
        super().build(built, image)
        number, size, scale = self._local
        patch = require_views(built.encoder.clip.visual, "SelfDistillation")
        sides = (built.image_size,) * 2 if isinstance(built.image_size, int) else built.image_size
        if size is None:
            size = max(round(_LOCAL_SHARE * min(sides) / patch), 1) * patch
        if size % patch:
            raise UserError(
                f"local_size ({size}) of SelfDistillation must be a multiple of the {patch} pixels "
                "of a patch"
            )
        self.views = ViewRule(
            global_scale=self.views.global_scale,
            local_views=number,
            local_size=size,
            local_scale=scale,
        )

    def chosen(self, pooled: Tensor, tokens: Tensor, draws: Tensor) -> Tensor:
        """Return the pooled vector, (b, 1, C)."""
        return pooled[:, None]

    def forward(self, rows: Rows) -> dict[str, Term]:
        """Return ``self_distillation_loss``, in nats, summed over pictures."""
        assert rows.local_views is not None
        losses = self._losses(rows, self.head(rows.local_views)[:, None])
        means = losses.mean(dim=(1, 2))
        return {"self_distillation_loss": Term((means * rows.valid).sum(), rows.valid.sum())}


class MaskedPrediction(TeacherObjective):
    """Cross-entropy of hidden patches against what the teacher, which sees them, says there.

        L    = 1/N sum_i ( sum_n m_in H_in / sum_n m_in )
        H_in = - sum_k p_ink log softmax(h_in / tau_s)_k

    Hidden is what the tower embeds of a patch: a learned vector stands in for it, and its position
    stays. Teacher and student see the same view. A share of the patches of each picture, the same
    number of all, is drawn for each sample.

    Args:
        weight: as ``Objective``.
        start: as ``Objective``.
        ramp_steps: as ``Objective``.
        share: of the patches that are hidden, in (0, 1).
        all_patches: let patches that are seen count, too, alike (iBOT++).
        global_scale: as ``SelfDistillation``, which must have the same one.
        prototypes: as ``SelfDistillation``.
        hidden: as ``SelfDistillation``.
        bottleneck: as ``SelfDistillation``.
        student_temperature: as ``SelfDistillation``.
        teacher_temperature: as ``SelfDistillation``.
        first_teacher_temperature: as ``SelfDistillation``.
        temperature_steps: as ``SelfDistillation``.
        assignment: as ``SelfDistillation``.
        centre_momentum: as ``SelfDistillation``.

    Raises:
        UserError: as ``SelfDistillation``.

    Source:
        Zhou et al. 2022 (iBOT), arXiv:2111.07832. Uniform masks beside a text loss: Maninis et al.
        2025 (TIPS), arXiv:2410.16512. Half of the embedded patches, weight 0.25 times the factor of
        self-distillation: Tschannen et al. 2025 (SigLIP 2), arXiv:2502.14786, section 2.3. All
        patches: TIPSv2, arXiv:2604.12012. A head apart from that of whole pictures: TIPS.
    """

    name: ClassVar[str] = "masked_prediction"
    hides_patches = True

    def __init__(
        self,
        weight: float = 0.25,
        start: float = 0.0,
        ramp_steps: int = 0,
        share: float = 0.5,
        all_patches: bool = False,
        global_scale: tuple[float, float] = (0.4, 1.0),
        prototypes: int = 65_536,
        hidden: int = 2048,
        bottleneck: int = 256,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        first_teacher_temperature: float = 0.04,
        temperature_steps: int = 1000,
        assignment: Assignment = "centre",
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__(
            weight,
            start,
            ramp_steps,
            global_scale=global_scale,
            prototypes=prototypes,
            hidden=hidden,
            bottleneck=bottleneck,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            first_teacher_temperature=first_teacher_temperature,
            temperature_steps=temperature_steps,
            assignment=assignment,
            centre_momentum=centre_momentum,
        )
        self.needs = frozenset({"global view", "masked view"})
        if not 0 < share < 1:
            raise UserError(f"share ({share}) of MaskedPrediction must be in (0, 1)")
        self.share, self.all_patches = share, all_patches

    def build(self, built: BuiltModel, image: TokenShape) -> None:
        """Make the head and what stands in for hidden patches.

        Raises:
            UserError: as ``require_views``, or if no patch would be hidden, or all.
        """
        super().build(built, image)
        self.num_hidden = math.floor(self.share * image.num_tokens + 0.5)
        if not 0 < self.num_hidden < image.num_tokens:
            raise UserError(
                f"share ({self.share}) of MaskedPrediction hides {self.num_hidden} of "
                f"{image.num_tokens} patches; choose another share"
            )
        self.mask_token = nn.Parameter(torch.zeros(image.width))
        nn.init.normal_(self.mask_token, std=0.02)

    def stand_in(self) -> Tensor:
        """Return the (C,) vector of a hidden patch; a tensor of its own."""
        return self.mask_token.clone()

    def mask(self, draws: Tensor, num_patches: int) -> Tensor:
        """Draw which patches of each picture are hidden.

        Args:
            draws: (b,), see ``Rows``.
            num_patches: T.

        Returns:
            (b, T) bool; ``num_hidden`` of each row are True.
        """
        places = torch.arange(num_patches, device=draws.device) * _GOLDEN
        order = uniform(draws[:, None] + places, _MASK_STREAM).argsort(dim=1, stable=True)
        hidden = torch.zeros_like(order, dtype=torch.bool)
        return hidden.scatter(1, order[:, : self.num_hidden], True)

    def chosen(self, pooled: Tensor, tokens: Tensor, draws: Tensor) -> Tensor:
        """Return the patches that count, (b, M, C): the hidden ones, or all."""
        if self.all_patches:
            return tokens
        return _patches(tokens, self.mask(draws, tokens.shape[1]), self.num_hidden)

    def forward(self, rows: Rows) -> dict[str, Term]:
        """Return ``masked_prediction_loss``, in nats per patch, summed over pictures."""
        assert rows.masked_tokens is not None
        assert rows.mask is not None
        tokens = rows.masked_tokens
        if not self.all_patches:
            tokens = _patches(tokens, rows.mask, self.num_hidden)
        losses = self._losses(rows, self.head(tokens)[:, :, None])
        means = losses.mean(dim=(1, 2))
        return {"masked_prediction_loss": Term((means * rows.valid).sum(), rows.valid.sum())}


def _patches(tokens: Tensor, mask: Tensor, number: int) -> Tensor:
    """(b, number, C) of (b, T, C) where a mask is True, which has as many in each row."""
    places = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :number]
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def _check_scale(name: str, scale: tuple[float, float], who: str) -> None:
    least, most = scale
    if not 0 < least <= most <= 1:
        raise UserError(f"{name} ({list(scale)}) of {who} must be 0 < least <= most <= 1")
