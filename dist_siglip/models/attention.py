"""Attention of one sequence to itself or to another, as heads beside the towers use it."""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention: queries look at tokens of the same sequence or of another.

    Args:
        width: channels of queries and of the result, a multiple of ``heads``.
        heads: number of heads.
        token_width: channels of the tokens; None is ``width``.
        dropout: share of attention weights dropped in training, in [0, 1).

    Example:
        >>> import torch
        >>> look = Attention(8, 2, token_width=6)
        >>> look(torch.randn(3, 4, 8), torch.randn(3, 5, 6), None).shape
        torch.Size([3, 4, 8])
    """

    def __init__(
        self, width: int, heads: int, *, token_width: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(token_width or width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return (P, Q, width); queries (P, Q, width) look at tokens (P, T, token_width).

        Args:
            queries: sequence that looks.
            tokens: sequence that is looked at.
            mask: bool, broadcastable to (P, heads, Q, T); True where a query may look. None lets
                all look at all.
        """
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(
            self._by_head(self.query(queries)),
            self._by_head(key),
            self._by_head(value),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found

    def _by_head(self, rows: Tensor) -> Tensor:
        """(P, T, width) to (P, heads, T, width / heads)."""
        num_pairs, num_tokens, width = rows.shape
        parted = rows.reshape(num_pairs, num_tokens, self.heads, width // self.heads)
        return parted.transpose(1, 2)
