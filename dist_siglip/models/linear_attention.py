"""How can self-attention of torch be made of layers that an adapter can take?

``nn.MultiheadAttention`` keeps its input projection as a bare parameter and never calls its
output layer, so nothing can be put around them. ``LinearAttention`` is the same function of the
same parameters, made of two linear layers.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


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
