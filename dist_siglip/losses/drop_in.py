"""The sigmoid loss as open_clip's trainer expects to find it: a module, nothing more."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, resolve_group
from dist_siglip.errors import UserError
from dist_siglip.losses.sigmoid import siglip_loss
from dist_siglip.losses.trip import DEFAULT_CHUNK_ROWS

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
        chunk_rows: side of the largest tile of logits.

    Raises:
        UserError: if ``dist_impl`` is unknown or given together with ``exchange``; on the first
            call, if ``rank`` or ``world_size`` differ from the group's.

    Example:
        >>> import torch
        >>> loss = SigLipLoss(True, 0, 1)
        >>> eye = torch.eye(2)
        >>> loss(eye, eye, torch.tensor(10.0), torch.tensor(-10.0), output_dict=True)
        {'contrastive_loss': tensor(0.6932)}
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
        *,
        exchange: ExchangeName = "auto",
        group: ProcessGroup | None = None,
        chunk_rows: int = DEFAULT_CHUNK_ROWS,
    ) -> None:
        super().__init__()
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

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return ``siglip_loss``, or {"contrastive_loss": it} if ``output_dict``."""
        self._check_world()
        loss = siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            exchange=self.exchange,
            group=self.group,
            chunk_rows=self.chunk_rows,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def _check_world(self) -> None:
        group = resolve_group(self.group)
        actual = {"rank": 0, "world_size": 1}
        if group is not None:
            actual = {"rank": group.rank(), "world_size": group.size()}
        for name, found in actual.items():
            given = getattr(self, name)
            if given is not None and given != found:
                raise UserError(
                    f"{name} ({given}) differs from the process group's ({found}); leave it out "
                    "or pass the group it belongs to"
                )
