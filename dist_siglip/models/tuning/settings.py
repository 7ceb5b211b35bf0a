"""Locking, learning rates and weight decay of each tower.

Locking stops gradients, and keeps what has none in evaluation mode: no dropout, no running
statistics. A tower that is locked whole builds no graph. A tower of random weights cannot be
locked, and a new projection behind a locked tower trains.
"""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.errors import UserError
from dist_siglip.models.dual_encoder import DualEncoder
from dist_siglip.models.tuning.layer_groups import LayerGroup, layer_groups
from dist_siglip.models.tuning.lora import LoraSettings, add_adapters, is_adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """How one tower is trained.

    Args:
        locked: keep its weights, but for ``unlocked_groups``. A locked image tower is LiT.
        unlocked_groups: last groups of a locked tower that train all the same: the first is its
            head (last norm, pooling, projection), each further one a block.
        learning_rate_factor: multiplies the learning rate of this tower; > 0. SigLIP fine-tunes a
            pretrained image tower with 0.1.
        layer_decay: multiplies the learning rate once more for every group between a parameter
            and the end of the tower; in (0, 1], 1 trains all layers alike.
        weight_decay: of this tower instead of ``optim.weight_decay``; >= 0. SigLIP does not decay
            pretrained weights: 0.
        lora: low-rank adapters in place of the weights, which are then locked. Null has none.
    """

    locked: bool = False
    unlocked_groups: int = 0
    learning_rate_factor: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float | None = None
    lora: LoraSettings | None = None

    @property
    def is_locked(self) -> bool:
        """Whether the weights the tower was built with are kept, at least most of them."""
        return self.locked or self.lora is not None


class Tuning(NamedTuple):
    """How a parameter departs from the rest.

    Attributes:
        learning_rate_factor: multiplies the learning rate.
        weight_decay: of this parameter, if it decays at all; None is that of the optimizer.
    """

    learning_rate_factor: float
    weight_decay: float | None


def check_tower(tower: Tower, config: TowerConfig) -> None:
    """Refuse numbers out of range.

    Raises:
        UserError: naming the setting.
    """
    name = f"{tower}_tower"
    if config.unlocked_groups < 0:
        raise UserError(f"{name}.unlocked_groups ({config.unlocked_groups}) must be >= 0")
    if config.unlocked_groups and not config.is_locked:
        raise UserError(
            f"{name}.unlocked_groups ({config.unlocked_groups}) needs {name}.locked: true"
        )
    factor, decay = config.learning_rate_factor, config.weight_decay
    if not 0 < factor < math.inf:
        raise UserError(
            f"{name}.learning_rate_factor ({factor}) must be > 0; to keep its weights, lock it"
        )
    if not 0 < config.layer_decay <= 1:
        raise UserError(f"{name}.layer_decay ({config.layer_decay}) must be in (0, 1], e.g. 0.8")
    if decay is not None and not 0 <= decay < math.inf:
        raise UserError(f"{name}.weight_decay ({decay}) must be >= 0, or null")


def tune_towers(
    encoder: DualEncoder,
    *,
    image_tower: TowerConfig,
    text_tower: TowerConfig,
    never_loaded: Collection[str] = (),
) -> dict[str, Tuning]:
    """Lock what is to be locked, and say how the rest departs from the optimizer's settings.

    Args:
        encoder: changed in place: ``requires_grad`` of its parameters, and which of its modules
            stay in evaluation mode.
        image_tower: of the image tower.
        text_tower: of the text tower.
        never_loaded: parameters of the encoder that are random, by name; they train in any case.

    Returns:
        The parameters of the encoder that train otherwise than by default, by name.

    Raises:
        UserError: if a number is out of range, more groups are to be unlocked than there are, a
            tower without blocks has a layer decay, or all that is to be locked was never loaded.
    """
    configs: dict[Tower, TowerConfig] = {"image": image_tower, "text": text_tower}
    found = layer_groups(encoder)
    # Adapters change names, not parameters.
    random = {id(p) for name, p in encoder.named_parameters() if name in never_loaded}
    for tower, config in configs.items():
        check_tower(tower, config)
        _check_groups(tower, config, [group for group in found.values() if group.tower == tower])
        if config.lora is not None:
            add_adapters(encoder, tower, config.lora)
    parameters = dict(encoder.named_parameters())
    tuned: dict[str, Tuning] = {}
    found = layer_groups(encoder)
    kept = {
        name
        for name, group in found.items()
        if configs[group.tower].is_locked
        and group.groups_behind >= configs[group.tower].unlocked_groups
        and not is_adapter(name)
    }
    for tower in configs:
        of_tower = [name for name in kept if found[name].tower == tower]
        unlocked = [name for name in of_tower if id(parameters[name]) in random]
        _check_loaded(tower, configs[tower], of_tower, unlocked)
        kept.difference_update(unlocked)
    for name, group in found.items():
        config = configs[group.tower]
        if name in kept:
            parameters[name].requires_grad_(False)
            continue
        factor = config.learning_rate_factor * config.layer_decay**group.groups_behind
        if factor != 1 or config.weight_decay is not None:
            tuned[name] = Tuning(factor, config.weight_decay)
    encoder.keep_in_evaluation(_locked_modules(encoder))
    return tuned


def _check_loaded(
    tower: Tower, config: TowerConfig, kept: list[str], never_loaded: list[str]
) -> None:
    """Refuse to keep a tower of random weights; say which new parts train all the same."""
    if not never_loaded:
        return
    if len(never_loaded) == len(kept):
        setting = "lora" if config.lora is not None else "locked"
        raise UserError(
            f"{tower}_tower.{setting} keeps the weights of a tower that were never loaded and are "
            "random; name them by pretrained, by model: local-dir: or hf-hub:, or by hf_model_name "
            "or timm_model_pretrained in the model's config, or unlock the tower"
        )
    logger.info(
        "%s_tower: %d parameters have no weights and train, though the tower is locked (%s, ...)",
        tower,
        len(never_loaded),
        min(never_loaded),
    )


def _check_groups(tower: Tower, config: TowerConfig, found: list[LayerGroup]) -> None:
    deepest = max((group.groups_behind for group in found), default=0)
    if config.unlocked_groups > deepest + 1:
        raise UserError(
            f"{tower}_tower.unlocked_groups ({config.unlocked_groups}) must be at most "
            f"{deepest + 1}: the head, {max(deepest - 1, 0)} blocks and the stem"
        )
    if config.layer_decay != 1 and deepest < 2:
        raise UserError(
            f"{tower}_tower.layer_decay ({config.layer_decay}) needs a tower of blocks; set it to 1"
        )


def _locked_modules(encoder: DualEncoder) -> list[nn.Module]:
    """Modules all of whose parameters are locked, outermost ones only."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            own = list(child.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                found.append(child)
            else:
                visit(child)

    visit(encoder)
    return found
