"""Low-rank adapters (LoRA): added to a tower, and merged into its weights again.

W + (alpha / rank) * B A, where only A (rank, in) and B (out, rank) learn (Hu et al. 2021,
arXiv:2106.09685, section 4.1). B starts at zero, so the model starts as it was. The adapters are
those of peft.

``nn.MultiheadAttention`` keeps its input projection as a bare parameter and never calls its
output layer, so no adapter can be put around them. ``LinearAttention`` is the same function of the
same parameters, made of two linear layers.
"""

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.errors import UserError
from dist_siglip.models.dual_encoder import DualEncoder
from dist_siglip.models.tuning.layer_groups import block_names


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

        Args:
            query: (B, L, C), or (L, B, C) unless ``batch_first``.
            key: ``query``.
            value: ``query``.
            need_weights: must be False.
            attn_mask: added to the logits, (L, L) or (B * heads, L, L).

        Returns:
            Output of the shape of ``query``, and None.
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


_IS_ADAPTER = re.compile(r"(?:^|\.)lora_(?:A|B)\.")


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
        """Refuse numbers out of range, and an installation without peft.

        Raises:
            UserError: naming the setting.
        """
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
    """Whether a parameter, by its name, belongs to an adapter.

    Example:
        >>> is_adapter("clip.visual.trunk.blocks.0.attn.qkv.lora_A.default.weight")
        True
    """
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
