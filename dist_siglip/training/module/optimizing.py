"""How does a Lightning module get its optimizer, and its gradients their norm?"""

from collections.abc import Iterable, Mapping

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_siglip.errors import UserError
from dist_siglip.models.tuning.layer_groups import lies_in_block
from dist_siglip.training.optim import OptimConfig, ParameterRule, build_optimizer


def configure(
    module: LightningModule,
    config: OptimConfig,
    rules: Mapping[str, ParameterRule],
    *,
    is_sharded: bool,
) -> OptimizerLRSchedulerConfig:
    """Build what ``configure_optimizers`` returns, for the precision of the Trainer.

    Raises:
        UserError: as ``build_optimizer``, or if gradients would be both scaled and sharded.
    """
    trainer = module.trainer
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and is_sharded:
        raise UserError(
            "trainer.precision (16-mixed) scales gradients, which sharded ones do not take; use "
            "bf16-mixed"
        )
    optimizer, schedule = build_optimizer(
        module,
        config,
        trainer.max_steps,
        rules,
        scales_gradients=scaler is not None,
        is_sharded=is_sharded,
        in_block=lies_in_block,
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }


def clip(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    algorithm: str | None,
    is_wanted: bool,
) -> Tensor | None:
    """Clip gradients by their global norm, in place.

    Args:
        parameters: whose gradients; sharded or not.
        max_norm: Null or 0 does not clip.
        algorithm: must be "norm" or None.
        is_wanted: whether the norm is asked for where nothing is clipped.

    Returns:
        The norm before clipping, whole on every rank; None if it was not computed.

    Raises:
        UserError: if the algorithm is another.
    """
    if algorithm not in (None, "norm"):
        given = getattr(algorithm, "value", algorithm)
        raise UserError(f"trainer.gradient_clip_algorithm ({given}) must be norm")
    norm: Tensor | None = None
    if max_norm:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    elif is_wanted:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
