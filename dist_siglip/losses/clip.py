"""The softmax loss as open_clip's trainer expects to find it: a module, nothing more."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName
from dist_siglip.errors import UserError
from dist_siglip.losses.drop_in import check_world
from dist_siglip.losses.finite import FiniteCheck
from dist_siglip.losses.softmax import softmax_loss


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
        chunk_rows: side of the largest tile of logits. Null is 1024 on a CPU, 4096 on a GPU.
        check_finite: raise on every rank if a row of the features, the scale or the loss is not
            finite, and name it. On a GPU a step or two late, so that nothing waits.

    Attributes:
        uses_logit_bias: False: the bias may be frozen.

    Raises:
        UserError: if ``use_horovod``; on the first call, if ``rank`` or ``world_size`` differ
            from the group's.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> ClipLoss(True, True)(eye, eye, torch.tensor(1.0), output_dict=True)
        {'contrastive_loss': tensor(0.3133)}
    """

    uses_logit_bias = False

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
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise UserError("use_horovod (True) must be False; start with torchrun or srun instead")
        self.rank = rank
        self.world_size = world_size
        self.exchange: ExchangeName = exchange
        self.group = group
        self.chunk_rows = chunk_rows
        self._finite_check = FiniteCheck() if check_finite else None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return ``softmax_loss``, or {"contrastive_loss": it} if ``output_dict``."""
        check_world(self.rank, self.world_size, self.group)
        loss = softmax_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            finite_check=self._finite_check,
            exchange=self.exchange,
            group=self.group,
            chunk_rows=self.chunk_rows,
        )
        return {"contrastive_loss": loss} if output_dict else loss
