"""A contrastive loss plus terms that shape the space: CUA and CUAXU on either base loss."""

import math

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, agree_once
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    LossOutput,
    LossOverBase,
    Nonfinite,
    TeacherFeatures,
    call_loss,
    ids_for,
    prefix_dims_of,
)
from dist_siglip.losses.geometry import alignment_loss, cross_uniformity_loss, uniformity_loss
from dist_siglip.losses.kernels.pair_terms import Kernel, check_kernel


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

    @property
    def prefix_dims(self) -> tuple[int, ...]:
        """Prefixes that the base is computed at."""
        return prefix_dims_of(self.base)

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
