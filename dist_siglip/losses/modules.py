"""Modules of the sigmoid and the softmax loss, with the interface of open_clip's losses."""

from typing import get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, resolve_group
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    FiniteCheck,
    LossOutput,
    LossOverBase,
    Nonfinite,
    uses_logit_bias,
)
from dist_siglip.losses.kernels.pair_terms import Duplicates, Kernel, check_kernel
from dist_siglip.losses.matryoshka import matryoshka_sigmoid_loss, matryoshka_softmax_loss
from dist_siglip.losses.mined_negatives import check_mining
from dist_siglip.losses.prefixes import check_dims, prefix_shares
from dist_siglip.losses.sigmoid import siglip_loss_output
from dist_siglip.losses.softmax import softmax_loss

_EXCHANGE_OF_DIST_IMPL: dict[str, ExchangeName] = {
    "bidir": "ring",
    "shift": "ring",
    "gather": "all_gather",
    "reduce": "all_gather",
}


class SigLipLoss(nn.Module):
    """``siglip_loss`` with the constructor and call of ``open_clip.loss.SigLipLoss``.

    Args:
        cache_labels: accepted and without effect: labels are never built.
        rank: this process in ``group``; None takes it from the group.
        world_size: size of ``group``; None takes it from the group.
        dist_impl: open_clip's name of an exchange: "bidir" and "shift" mean the ring, "gather"
            and "reduce" mean all_gather. All give the same numbers.
        exchange: name of an exchange of this package; not together with ``dist_impl``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits. Null is 1024 on a CPU, 8192 x 4096 on a GPU.
        kernel: who computes the terms of a tile: auto (eager on a CPU, triton on a GPU, or compiled
            where triton is missing or does not build), triton, compiled or eager.
        duplicates: what pairs with equal captions, or of equal pictures, are, on whatever ranks:
            positive, masked (left out) or negative (only counted). Null never looks at ids.
        mined_negatives: texts of the global batch that count once more as negatives of a picture:
            for each picture the k with the largest logits that are not its own and no duplicates of
            it, see ``siglip_loss``. 0 mines none. Without ``duplicates`` equal captions are not
            known, and may be mined.
        mined_weight: how much more such a text counts.
        check_finite: raise on every rank if a row of the features, the scale, the bias or the
            loss is not finite, and name it. On a GPU a step or two late, so that nothing waits.

    Attributes:
        uses_caption_ids: whether a call must bring ``caption_ids``.
        uses_picture_ids: whether a call may bring ``picture_ids``, too.
        uses_negative_texts: True: a call may bring ``negative_text_features``.

    Raises:
        UserError: if ``dist_impl`` or ``kernel`` is unknown, a number of mining out of range, or
            ``dist_impl`` given together with ``exchange``; on the first call, if ``rank`` or
            ``world_size`` differ from the group's; on a call without ids if ``duplicates`` is set.

    Example:
        >>> import torch
        >>> loss = SigLipLoss(True, 0, 1)
        >>> eye = torch.eye(2)
        >>> loss(eye, eye, torch.tensor(10.0), torch.tensor(-10.0), output_dict=True)
        {'contrastive_loss': tensor(0.6932)}
    """

    uses_negative_texts = True

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
        *,
        exchange: ExchangeName = "auto",
        group: ProcessGroup | None = None,
        chunk_rows: int | None = None,
        kernel: Kernel = "auto",
        duplicates: Duplicates | None = None,
        mined_negatives: int = 0,
        mined_weight: float = 1.0,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        check_kernel(kernel)
        check_mining(mined_negatives, mined_weight)
        if duplicates is not None and duplicates not in get_args(Duplicates):
            raise UserError(
                f"duplicates ({duplicates!r}) must be null or one of "
                f"{', '.join(get_args(Duplicates))}"
            )
        if dist_impl is not None:
            if exchange != "auto":
                raise UserError(
                    f"dist_impl ({dist_impl!r}) and exchange ({exchange!r}) name the same thing; "
                    "give one of them"
                )
            if dist_impl not in _EXCHANGE_OF_DIST_IMPL:
                raise UserError(
                    f"dist_impl ({dist_impl!r}) must be one of {', '.join(_EXCHANGE_OF_DIST_IMPL)}"
                )
            exchange = _EXCHANGE_OF_DIST_IMPL[dist_impl]
        self.rank = rank
        self.world_size = world_size
        self.exchange: ExchangeName = exchange
        self.group = group
        self.chunk_rows = chunk_rows
        self.kernel: Kernel = kernel
        self.duplicates: Duplicates | None = duplicates
        self.mined_negatives, self.mined_weight = mined_negatives, mined_weight
        self.uses_caption_ids = self.uses_picture_ids = duplicates is not None
        self.finite_check = FiniteCheck() if check_finite else None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
        *,
        negative_text_features: Tensor | None = None,
        caption_ids: Tensor | None = None,
        picture_ids: Tensor | None = None,
        nonfinite: Nonfinite = "raise",
        return_statistics: bool = False,
    ) -> Tensor | dict[str, Tensor] | LossOutput:
        """Return ``siglip_loss``, or {"contrastive_loss": it} if ``output_dict``.

        ``return_statistics`` returns it with what was counted instead, as ``LossOutput``.

        ``caption_ids``, (B,), is wanted if ``duplicates`` is set and left aside otherwise;
        ``picture_ids``, (B,), is taken likewise but may be missing.
        """
        self.check_caption_ids(caption_ids)
        check_world(self.rank, self.world_size, self.group)
        output = siglip_loss_output(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            negative_text_features=negative_text_features,
            mined_negatives=self.mined_negatives,
            mined_weight=self.mined_weight,
            caption_ids=caption_ids if self.uses_caption_ids else None,
            picture_ids=picture_ids if self.uses_picture_ids else None,
            duplicates=self.duplicates or "negative",
            nonfinite=nonfinite,
            finite_check=self.finite_check,
            exchange=self.exchange,
            group=self.group,
            chunk_rows=self.chunk_rows,
            kernel=self.kernel,
        )
        if return_statistics:
            return output
        return {"contrastive_loss": output.loss} if output_dict else output.loss

    def check_caption_ids(self, caption_ids: Tensor | None) -> None:
        """Raise ``UserError`` if a call must bring caption ids and brings none."""
        if self.uses_caption_ids and caption_ids is None:
            raise UserError(
                f"duplicates ({self.duplicates!r}) needs caption_ids: pass them, or set it to null"
            )


def check_world(rank: int | None, world_size: int | None, group: ProcessGroup | None) -> None:
    """Raise ``UserError`` if the rank or world size given differs from the process group's."""
    group = resolve_group(group)
    actual_rank, actual_size = (0, 1) if group is None else (group.rank(), group.size())
    for name, given, found in (
        ("rank", rank, actual_rank),
        ("world_size", world_size, actual_size),
    ):
        if given is not None and given != found:
            raise UserError(
                f"{name} ({given}) differs from the process group's ({found}); leave it out "
                "or pass the group it belongs to"
            )


class ClipLoss(nn.Module):
    """``softmax_loss`` with the constructor and call of ``open_clip.loss.ClipLoss``.

    Always the global batch with its true gradient, as open_clip computes it with local_loss and
    gather_with_grad both on, in the memory of a local batch.

    Args:
        local_loss: accepted and without effect: logits are never built whole.
        gather_with_grad: accepted and without effect: gradients always reach their rank.
        cache_labels: accepted and without effect: labels are never built.
        rank: this process in ``group``; None takes it from the group.
        world_size: size of ``group``; None takes it from the group.
        use_horovod: must be False.
        exchange: name of an exchange of this package.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits. Null is 1024 on a CPU, 8192 x 4096 on a GPU.
        kernel: who computes the terms of a tile: auto (eager on a CPU, triton on a GPU, or compiled
            where triton is missing or does not build), triton, compiled or eager.
        check_finite: raise on every rank if a row of the features, the scale or the loss is not
            finite, and name it. On a GPU a step or two late, so that nothing waits.

    Attributes:
        uses_logit_bias: False: the bias may be frozen.
        uses_negative_texts: True: a call may bring ``negative_text_features``.

    Raises:
        UserError: if ``use_horovod``, or ``kernel`` is unknown; on the first call, if ``rank`` or
            ``world_size`` differ from the group's.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> ClipLoss(True, True)(eye, eye, torch.tensor(1.0), output_dict=True)
        {'contrastive_loss': tensor(0.3133)}
    """

    uses_logit_bias = False
    uses_negative_texts = True

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool = False,
        *,
        exchange: ExchangeName = "auto",
        group: ProcessGroup | None = None,
        chunk_rows: int | None = None,
        kernel: Kernel = "auto",
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        check_kernel(kernel)
        if use_horovod:
            raise UserError("use_horovod (True) must be False; start with torchrun or srun instead")
        self.rank = rank
        self.world_size = world_size
        self.exchange: ExchangeName = exchange
        self.group = group
        self.chunk_rows = chunk_rows
        self.kernel: Kernel = kernel
        self.finite_check = FiniteCheck() if check_finite else None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        negative_text_features: Tensor | None = None,
        nonfinite: Nonfinite = "raise",
    ) -> Tensor | dict[str, Tensor]:
        """Return ``softmax_loss``, or {"contrastive_loss": it} if ``output_dict``."""
        check_world(self.rank, self.world_size, self.group)
        loss = softmax_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            negative_text_features=negative_text_features,
            nonfinite=nonfinite,
            finite_check=self.finite_check,
            exchange=self.exchange,
            group=self.group,
            chunk_rows=self.chunk_rows,
            kernel=self.kernel,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class MatryoshkaLoss(LossOverBase):
    """A pairwise loss at prefixes of the dimension, so that features can be cut after training.

    The weighted mean of the base loss over the prefixes, see ``matryoshka_sigmoid_loss``; it sends
    the bytes of the base loss, whose exchange, tiles and duplicates it takes over.

    Args:
        dims: columns of each prefix, like [768, 384, 192, 96]; the dimension itself is one where
            whole features are used, too.
        base: ``dist_siglip.losses.SigLipLoss`` or ``dist_siglip.losses.ClipLoss``, as a class path.
            Null is the first.
        weights: of the prefixes, in the order of dims; they count relative to their sum. Null is
            the same for all.
        separate_logits: whether each prefix but the largest learns a factor of the scale and an
            addition to the bias of its own: cosines of short prefixes are larger.

    Raises:
        UserError: if dims or weights are out of range, or the base is another loss; on the first
            call, if a prefix is larger than the dimension.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> MatryoshkaLoss([2])(eye, eye, torch.tensor(10.0), torch.tensor(-10.0))
        tensor(0.6932)
    """

    def __init__(
        self,
        dims: list[int],
        base: nn.Module | None = None,
        weights: list[float] | None = None,
        separate_logits: bool = False,
    ) -> None:
        super().__init__()
        self.base = SigLipLoss() if base is None else base
        if not isinstance(self.base, SigLipLoss | ClipLoss):
            raise UserError(
                f"base ({type(base).__name__}) must be SigLipLoss or ClipLoss; put MatryoshkaLoss "
                "inside of a loss that adds terms to a base"
            )
        if isinstance(self.base, SigLipLoss) and self.base.mined_negatives:
            raise UserError(
                f"mined_negatives ({self.base.mined_negatives}) of the base: what is hard differs "
                "between prefixes; set it to 0, or leave MatryoshkaLoss out"
            )
        check_dims(dims)
        prefix_shares(dims, weights)
        self.dims, self.weights = list(dims), weights
        self.log_scale_offsets: nn.Parameter | None = None
        self.bias_offsets: nn.Parameter | None = None
        if separate_logits and len(dims) > 1:
            self.log_scale_offsets = nn.Parameter(torch.zeros(len(dims) - 1))
            if uses_logit_bias(self.base):
                self.bias_offsets = nn.Parameter(torch.zeros(len(dims) - 1))

    @property
    def prefix_dims(self) -> tuple[int, ...]:
        """Prefixes that the loss is computed at, from the largest to the smallest."""
        return check_dims(self.dims)

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
    ) -> Tensor | LossOutput:
        """Return the loss; ``return_statistics`` with the duplicates counted, as ``LossOutput``."""
        base = self.base
        assert isinstance(base, SigLipLoss | ClipLoss)
        check_world(base.rank, base.world_size, base.group)
        if self.log_scale_offsets is not None:
            factors = torch.cat([self.log_scale_offsets.new_ones(1), self.log_scale_offsets.exp()])
            logit_scale = logit_scale.reshape(-1) * factors
        if self.bias_offsets is not None and logit_bias is not None:
            added = torch.cat([self.bias_offsets.new_zeros(1), self.bias_offsets])
            logit_bias = logit_bias.reshape(-1) + added
        pairs = (image_features, text_features, logit_scale, logit_bias)
        if isinstance(base, ClipLoss):
            loss = matryoshka_softmax_loss(
                *pairs,
                dims=self.dims,
                weights=self.weights,
                nonfinite=nonfinite,
                finite_check=base.finite_check,
                exchange=base.exchange,
                group=base.group,
                chunk_rows=base.chunk_rows,
                kernel=base.kernel,
            )
            return LossOutput(loss) if return_statistics else loss
        base.check_caption_ids(caption_ids)
        output = matryoshka_sigmoid_loss(
            *pairs,
            dims=self.dims,
            weights=self.weights,
            caption_ids=caption_ids if base.uses_caption_ids else None,
            picture_ids=picture_ids if base.uses_picture_ids else None,
            duplicates=base.duplicates or "negative",
            nonfinite=nonfinite,
            finite_check=base.finite_check,
            exchange=base.exchange,
            group=base.group,
            chunk_rows=base.chunk_rows,
            kernel=base.kernel,
        )
        return output if return_statistics else output.loss
