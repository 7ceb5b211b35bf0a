"""What of each tower trains, how fast, and by which low-rank updates.

Locking stops gradients, and keeps what has none in evaluation mode: no dropout, no running
statistics. A tower that is locked whole builds no graph. A tower of random weights cannot be
locked, and a new projection behind a locked tower trains.

A tower is a stem (embeddings), blocks one after another, and a head (last norm, pooling,
projection). Names tell which is which, for the towers of open_clip, timm and transformers.

LoRA is W + (alpha / rank) * B A, where only A (rank, in) and B (out, rank) learn (Hu et al. 2021,
arXiv:2106.09685, section 4.1). B starts at zero, so the model starts as it was. The adapters are
those of peft. ``nn.MultiheadAttention`` keeps its input projection as a bare parameter and never
calls its output layer, so no adapter can be put around them; ``LinearAttention`` is the same
function of the same parameters, made of two linear layers.
"""

import importlib.util
import logging
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.errors import UserError
from dist_siglip.models.dual_encoder import DualEncoder

logger = logging.getLogger(__name__)

_IMAGE_PREFIX = "clip.visual."
# A numbered block, in a numbered stage or not: "blocks.3.", "stages.1.blocks.0.", "layer2.0.".
_BLOCK = re.compile(
    r"(?:^|\.)(?:resblocks|blocks|layers?|block|stages)\.(\d+)\.(?:blocks\.(\d+)\.|(?=downsample))?"
    r"|(?:^|\.)layer(\d+)\.(\d+)\."
)
_IS_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers?|block|stages|layer\d)\.\d+$")
_HEAD = re.compile(
    r"(?:trunk\.|transformer\.|encoder\.)*(?:ln_post|proj|attn_pool|attnpool|head|norm|fc_norm|fc"
    r"|ln_final|text_projection|pooler|final_layer_norm|ln_f)(?:\.|$)"
)
_IS_ADAPTER = re.compile(r"(?:^|\.)lora_(?:A|B)\.")


class LayerGroup(NamedTuple):
    """The layer group of a parameter.

    Attributes:
        tower: "image" or "text".
        groups_behind: groups between it and the end of its tower: 0 in the head, 1 in the last
            block, and so on; the stem has one more than the first block.
    """

    tower: Tower
    groups_behind: int


def lies_in_block(name: str) -> bool:
    """Whether a parameter of this name lies in a numbered block, of a tower or a fusion head.

    Example:
        >>> lies_in_block("clip.visual.transformer.resblocks.3.mlp.c_fc.weight")
        True
        >>> lies_in_block("clip.visual.proj"), lies_in_block("clip.token_embedding.weight")
        (False, False)
    """
    return bool(_BLOCK.search(name))


def layer_groups(encoder: nn.Module) -> dict[str, LayerGroup]:
    """Find the layer group of every name of ``encoder.named_parameters()`` of a dual encoder."""
    found: dict[str, LayerGroup] = {}
    towers: dict[Tower, list[tuple[str, str]]] = {"image": [], "text": []}
    for name, _ in encoder.named_parameters():
        if name.startswith(_IMAGE_PREFIX):
            towers["image"].append((name, name.removeprefix(_IMAGE_PREFIX)))
        else:
            short = name.removeprefix("clip.").removeprefix("text.")
            towers["text"].append((name, short))
    for tower, names in towers.items():
        keys = [_block_of(short) for _, short in names]
        blocks = {key: number for number, key in enumerate(dict.fromkeys(filter(None, keys)))}
        for (name, short), key in zip(names, keys, strict=True):
            if key is not None:
                behind = len(blocks) - blocks[key]
            else:
                behind = 0 if _HEAD.match(short) else len(blocks) + 1
            found[name] = LayerGroup(tower, behind)
    return found


def block_names(module: nn.Module) -> list[str]:
    """Names of the blocks of a tower or of an encoder, outermost ones only: blocks.0, blocks.1."""
    found: list[str] = []
    for name, _ in module.named_modules():
        if _IS_BLOCK.search(name) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _block_of(name: str) -> tuple[int, int] | None:
    """Return stage and block: (2, 1) of trunk.stages.2.blocks.1.gamma; None outside of blocks."""
    match = _BLOCK.search(name)
    if match is None:
        return None
    first, second = match[1] or match[3], match[2] or match[4] or "0"
    return int(first), int(second)


class LinearAttention(nn.Module):
    """Self-attention that takes over the parameters of a ``nn.MultiheadAttention``.

    Args:
        attention: with query, key and value of one width; its parameters move here.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        weight = attention.in_proj_weight
        has_bias = attention.in_proj_bias is not None
        self.in_proj = nn.Linear(width, 3 * width, bias=has_bias, device="meta")
        self.in_proj.weight = weight
        self.out_proj = nn.Linear(width, width, bias=has_bias, device="meta")
        self.out_proj.weight = attention.out_proj.weight
        if has_bias:
            self.in_proj.bias, self.out_proj.bias = attention.in_proj_bias, attention.out_proj.bias
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend from ``query`` to itself; ``key`` and ``value`` must be the same tensor.

        ``query`` and the output are (B, L, C), or (L, B, C) unless ``batch_first``; ``attn_mask``,
        (L, L) or (B * heads, L, L), is added to the logits.
        """
        if key is not query or value is not query or need_weights:
            raise ValueError("LinearAttention is self-attention without returned weights")
        rows = query if self.batch_first else query.transpose(0, 1)
        batch, length, width = rows.shape
        heads = (batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.in_proj(rows).reshape(heads).permute(2, 0, 3, 1, 4).unbind()
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.reshape(batch, self.num_heads, length, length)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        found = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return (found if self.batch_first else found.transpose(0, 1)), None

    def to_multihead(self) -> nn.MultiheadAttention:
        """Give the parameters back to a ``nn.MultiheadAttention``."""
        weight = self.in_proj.weight
        layer: Any = nn.MultiheadAttention(
            weight.shape[1],
            self.num_heads,
            dropout=self.dropout,
            bias=self.in_proj.bias is not None,
            batch_first=self.batch_first,
            device="meta",
        )
        layer.in_proj_weight, layer.in_proj_bias = weight, self.in_proj.bias
        layer.out_proj.weight, layer.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return layer.train(self.training)


def can_split(layer: nn.Module) -> bool:
    """Whether ``LinearAttention`` can stand in for a layer."""
    return (
        isinstance(layer, nn.MultiheadAttention)
        and layer.in_proj_weight is not None
        and layer.bias_k is None
        and not layer.add_zero_attn
    )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters of one tower, whose own weights are then locked.

    Args:
        rank: columns of B and rows of A; >= 1.
        alpha: the update is multiplied by alpha / rank; >= 1. Null is twice the rank.
        dropout: share of an adapter's inputs that is dropped in training; in [0, 1).
        targets: layers to adapt, by the last part or parts of their name, such as qkv or
            mlp.fc1 in towers of timm, in_proj, out_proj or c_fc in those of open_clip. Null
            adapts every matrix of every block, attention included.
    """

    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    targets: list[str] | None = None

    def check(self, tower: Tower) -> None:
        """Refuse numbers out of range, and an installation without peft."""
        name = f"{tower}_tower.lora"
        if self.rank < 1:
            raise UserError(f"{name}.rank ({self.rank}) must be at least 1, e.g. 16")
        if self.alpha is not None and self.alpha < 1:
            raise UserError(f"{name}.alpha ({self.alpha}) must be at least 1, or null")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{name}.dropout ({self.dropout}) must be in [0, 1)")
        if importlib.util.find_spec("peft") is None:
            raise UserError(f'{name} needs peft; run: pip install "dist-siglip[lora]"')


def add_adapters(encoder: DualEncoder, tower: Tower, settings: LoraSettings) -> None:
    """Put adapters into the layers of one tower, in place.

    Whether a parameter requires a gradient stays as it was; those of the adapters do.

    Raises:
        UserError: if a setting is out of range, or a layer is named that the tower lacks.
    """
    settings.check(tower)
    from peft import LoraConfig, inject_adapter_in_model

    module = _module_of(encoder, tower)
    targets = _targets(module, tower, settings.targets)
    trained = {id(p) for p in encoder.parameters() if p.requires_grad}
    known = {id(p) for p in encoder.parameters()}
    for name, layer in list(module.named_modules()):
        if can_split(layer) and any(target.startswith(f"{name}.") for target in targets):
            _replace(module, name, LinearAttention(layer))
    inject_adapter_in_model(
        LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
        ),
        module,
    )
    for parameter in encoder.parameters():
        parameter.requires_grad_(id(parameter) in trained or id(parameter) not in known)


def merge_adapters(encoder: DualEncoder) -> int:
    """Fold every adapter into its matrix and take it out, in place.

    Returns:
        How many there were. Parameters then have the names they had before ``add_adapters``.
    """
    if not any(is_adapter(name) for name, _ in encoder.named_parameters()):
        return 0
    from peft.tuners.lora import LoraLayer

    adapted = [(n, layer) for n, layer in encoder.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        _replace(encoder, name, layer.get_base_layer())
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, LinearAttention):
            _replace(encoder, name, layer.to_multihead())
    return len(adapted)


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name, belongs to an adapter: ``...qkv.lora_A.default.weight``."""
    return bool(_IS_ADAPTER.search(name))


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)


def _module_of(encoder: DualEncoder, tower: Tower) -> nn.Module:
    clip = encoder.clip
    if tower == "image":
        return clip.visual
    return clip.text if hasattr(clip, "text") else clip.transformer


def _targets(module: nn.Module, tower: Tower, asked: list[str] | None) -> list[str]:
    """Names of the layers to adapt: those asked for, else every matrix of every block."""
    names = _adaptable(module)
    if asked is None:
        blocks = tuple(f"{block}." for block in block_names(module))
        found, missing = [name for name in names if name.startswith(blocks)], []
    else:
        ends = {end: [n for n in names if n == end or n.endswith(f".{end}")] for end in asked}
        found = [name for name in names if any(name in matches for matches in ends.values())]
        missing = [end for end, matches in ends.items() if not matches]
    if missing or not found:
        known = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})
        raise UserError(
            f"{tower}_tower.lora.targets ({', '.join(missing) or 'null'}): the tower has no such "
            f"layer; it has {', '.join(known) or 'none that an adapter could take'}"
        )
    return found


def _adaptable(module: nn.Module) -> list[str]:
    """Linear layers by name, and the two of each attention that ``LinearAttention`` makes."""
    names: list[str] = []
    inside = ""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            inside = f"{name}."
            if can_split(layer):
                names += [f"{name}.in_proj", f"{name}.out_proj"]
        elif isinstance(layer, nn.Linear) and not (inside and name.startswith(inside)):
            names.append(name)
    return names


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
    """Refuse numbers out of range."""
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
