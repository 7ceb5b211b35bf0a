"""A pairwise loss and more: terms that shape the space (CUA, CUAXU), or what teachers say."""

import math

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, agree_once
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    FiniteCheck,
    LossOutput,
    LossOverBase,
    Nonfinite,
    TeacherFeatures,
    call_loss,
    duplicates_of,
    ids_for,
    mined_of,
    uses_logit_bias,
)
from dist_siglip.losses.distillation import Form, check_form, distillation_loss
from dist_siglip.losses.geometry import alignment_loss, cross_uniformity_loss, uniformity_loss
from dist_siglip.losses.kernels.pair_terms import Kernel, check_kernel
from dist_siglip.losses.modules import ClipLoss, SigLipLoss, check_world


class WeightedLoss(LossOverBase):
    """A base loss plus weighted alignment, uniformity and cross-uniformity, all over the ranks.

        loss = base + alignment * A + uniformity * (U_image + U_text) / 2 + cross_uniformity * X

    With weights 1, 1, 0 (the defaults) this is CUA, with 1, 1, 1 CUAXU. A term of weight 0 is not
    computed. Alignment needs no pass, uniformity one per modality, cross-uniformity one.

    Distributed contract: that of ``siglip_loss``, for towers, scale and bias.

    Args:
        base: module called with (image_features, text_features, logit_scale, logit_bias), given
            as a class path: ``dist_siglip.losses.SigLipLoss`` or ``dist_siglip.losses.ClipLoss``.
        alignment: weight of the mean squared distance of matching pairs, >= 0.
        uniformity: weight of the mean uniformity of the two modalities, >= 0.
        cross_uniformity: weight of the uniformity of pairs that do not match, >= 0.
        exchange: how features reach other ranks for these terms; the base has its own.
        group: process group of these terms; the default group if None.
        chunk_rows: side of the largest tile of these terms. Null is 1024 on a CPU, 8192 x 4096
            on a GPU.
        kernel: who computes the tiles of these terms: auto, triton, compiled or eager.

    Raises:
        UserError: if a weight is negative or not finite, or ``kernel`` is unknown.

    Example:
        >>> import torch
        >>> from dist_siglip.losses import ClipLoss
        >>> eye = torch.eye(3)
        >>> WeightedLoss(ClipLoss())(eye, eye, torch.tensor(100.0), None)
        tensor(-4.)

    Source:
        Fahim et al. 2024, arXiv:2405.18570; all weights are 1 there, the base is CLIP's.
    """

    def __init__(
        self,
        base: nn.Module,
        alignment: float = 1.0,
        uniformity: float = 1.0,
        cross_uniformity: float = 0.0,
        *,
        exchange: ExchangeName = "auto",
        group: ProcessGroup | None = None,
        chunk_rows: int | None = None,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        check_kernel(kernel)
        for name, weight in (
            ("alignment", alignment),
            ("uniformity", uniformity),
            ("cross_uniformity", cross_uniformity),
        ):
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(f"{name} ({weight}) must be a finite weight, 0 or above")
        self.base = base
        self.alignment = alignment
        self.uniformity = uniformity
        self.cross_uniformity = cross_uniformity
        self.exchange: ExchangeName = exchange
        self.group = group
        self.chunk_rows = chunk_rows
        self.kernel: Kernel = kernel

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        *,
        caption_ids: Tensor | None = None,
        picture_ids: Tensor | None = None,
        nonfinite: Nonfinite = "raise",
        return_statistics: bool = False,
        teachers: TeacherFeatures | None = None,
    ) -> Tensor | LossOutput:
        """Return the weighted sum; ids and teachers go to a base that uses them.

        ``return_statistics`` returns it with what the base counted, as ``LossOutput``.

        Raises:
            UserError: as the terms do, or if weights differ between ranks.
        """
        agree_once(
            f"weighted loss; alignment {self.alignment}, uniformity {self.uniformity}, "
            f"cross_uniformity {self.cross_uniformity}",
            self.group,
        )
        output = call_loss(
            self.base,
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            ids=ids_for(self.base, caption_ids, picture_ids),
            nonfinite=nonfinite,
            teachers=teachers,
        )
        loss = output.loss
        if self.alignment:
            term = alignment_loss(
                image_features, text_features, nonfinite=nonfinite, group=self.group
            )
            loss = loss + self.alignment * term
        if self.uniformity:
            for features in (image_features, text_features):
                term = uniformity_loss(
                    features,
                    nonfinite=nonfinite,
                    exchange=self.exchange,
                    group=self.group,
                    chunk_rows=self.chunk_rows,
                    kernel=self.kernel,
                )
                loss = loss + 0.5 * self.uniformity * term
        if self.cross_uniformity:
            term = cross_uniformity_loss(
                image_features,
                text_features,
                nonfinite=nonfinite,
                exchange=self.exchange,
                group=self.group,
                chunk_rows=self.chunk_rows,
                kernel=self.kernel,
            )
            loss = loss + self.cross_uniformity * term
        return output._replace(loss=loss) if return_statistics else loss


class DistillationLoss(LossOverBase):
    """A pairwise loss, and what teachers say about the same pairs: ``distillation_loss``.

        loss = (1 - share) * base + share * distillation

    Distributed contract: that of ``siglip_loss``. A base of the same kind as the form (SigLipLoss
    without duplicates and mined negatives for sigmoid, ClipLoss for softmax) is computed in the
    passes of distillation; another one has its own.

    Args:
        base: a pairwise loss by its class path. Null is ``dist_siglip.losses.SigLipLoss``.
        share: of distillation, in (0, 1]; 1 does not compute the base. MobileCLIP takes .75 for
            ViT-B and 1 for its small models.
        form: sigmoid, a probability for each pair, or softmax, as DataCompDR.
        exchange: how features reach other ranks for distillation, and for a base in its passes.
        group: process group of these; the default group if None.
        chunk_rows: side of their largest tile. Null is 1024 on a CPU, 8192 x 4096 on a GPU.
        check_finite: raise on every rank if a row of a teacher, or any other input or value of
            distillation, is not finite, and name it. On a GPU a step or two late.

    Attributes:
        uses_teachers: True: a call must bring ``teachers``.

    Raises:
        UserError: if ``share`` or ``form`` is out of range.

    Example:
        >>> import torch
        >>> eye, ten = torch.eye(2), torch.tensor(10.0)
        >>> teachers = TeacherFeatures(eye, eye, dims=(2,), scales=(10.0,), biases=(-5.0,))
        >>> DistillationLoss(share=1.0)(eye, eye, ten, -ten / 2, teachers=teachers)
        tensor(0.0804)
    """

    def __init__(
        self,
        base: nn.Module | None = None,
        share: float = 0.75,
        form: Form = "sigmoid",
        *,
        exchange: ExchangeName = "auto",
        group: ProcessGroup | None = None,
        chunk_rows: int | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise UserError(
                f"share ({share}) must be in (0, 1]; for the base alone leave DistillationLoss out"
            )
        check_form(form)
        self.base = SigLipLoss() if base is None else base
        self.share = share
        self.form: Form = form
        self.exchange: ExchangeName = exchange
        self.group = group
        self.chunk_rows = chunk_rows
        self.finite_check = FiniteCheck() if check_finite else None

    @property
    def uses_teachers(self) -> bool:
        """Teachers are what it is about."""
        return True

    @property
    def uses_logit_bias(self) -> bool:
        """Whether the base, if it is computed, or the form depends on logit_bias."""
        return self.form == "sigmoid" or (self.share < 1 and uses_logit_bias(self.base))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        *,
        caption_ids: Tensor | None = None,
        picture_ids: Tensor | None = None,
        nonfinite: Nonfinite = "raise",
        return_statistics: bool = False,
        teachers: TeacherFeatures | None = None,
    ) -> Tensor | LossOutput:
        """Return the loss; ids go to a base that uses them.

        ``return_statistics`` returns it with what the base counted and terms of both, as
        ``LossOutput``.

        Raises:
            UserError: as ``distillation_loss`` and the base, if there are no teachers, or ranks
                have different shares.
        """
        if teachers is None:
            raise UserError(
                "DistillationLoss needs teachers: list them in model.teachers, or pass the keyword "
                "teachers"
            )
        agree_once(f"distillation loss; share {self.share}, form {self.form}", self.group)
        is_joined = self.share < 1 and self._joins_base()
        pairs = (image_features, text_features, logit_scale, logit_bias)
        learned = distillation_loss(
            *pairs,
            teachers=teachers,
            form=self.form,
            share=self.share if is_joined else 1.0,
            nonfinite=nonfinite,
            finite_check=self.finite_check,
            exchange=self.exchange,
            group=self.group,
            chunk_rows=self.chunk_rows,
        )
        if self.share == 1 or is_joined:
            return learned if return_statistics else learned.loss
        ids = ids_for(self.base, caption_ids, picture_ids)
        base = call_loss(self.base, *pairs, ids=ids, nonfinite=nonfinite, teachers=teachers)
        loss = (1 - self.share) * base.loss + self.share * learned.loss
        terms = {**base.terms, "base_loss": base.loss.detach(), **learned.terms}
        output = LossOutput(loss, base.duplicate_pairs, terms)
        return output if return_statistics else loss

    def _joins_base(self) -> bool:
        """Whether the base is what the passes of distillation give beside it."""
        base = self.base
        if type(base) not in (SigLipLoss, ClipLoss):
            return False
        assert isinstance(base, SigLipLoss | ClipLoss)
        is_alike = base.group is self.group and base.exchange == self.exchange
        if not is_alike or duplicates_of(base) is not None or mined_of(base)[0]:
            return False
        check_world(base.rank, base.world_size, base.group)
        return isinstance(base, SigLipLoss) == (self.form == "sigmoid")
