"""Do this picture and this text belong together, looked at side by side?

A dual encoder must put all it will ever be asked into one vector per side, before it has seen the
other side. A fusion head sees both: the un-pooled tokens of one tower (``tokens``) query those of
the other by cross-attention. It costs one pass per pair, so it judges candidates: the top-k of a
dual encoder, and in training positives and hard negatives, never all pairs of a batch.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.models.tokens import Encoded, TokenShape

Direction = Literal["image_to_text", "text_to_image", "both"]


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Sizes of a fusion head.

    Args:
        direction: who queries whom: "image_to_text" lets image tokens look at text tokens,
            "text_to_image" the other way round, "both" has a stream for each.
        width: channels of a stream, a multiple of heads.
        heads: heads of every attention.
        layers: blocks of a stream.
        dropout: share of attention weights and MLP channels dropped in training, in [0, 1).
    """

    direction: Direction = "both"
    width: int = 256
    heads: int = 4
    layers: int = 2
    dropout: float = 0.0

    def check(self) -> None:
        """Check the values.

        Raises:
            UserError: if one is out of its range.
        """
        if self.direction not in get_args(Direction):
            allowed = ", ".join(get_args(Direction))
            raise UserError(f"direction ({self.direction!r}) must be one of {allowed}")
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise UserError(
                f"width ({self.width}) must be a positive multiple of heads ({self.heads}); use "
                "256 and 4"
            )
        if self.layers < 1:
            raise UserError(f"layers ({self.layers}) of a fusion head must be at least 1; use 2")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout ({self.dropout}) must be in [0, 1); 0 turns it off")


class Fused(NamedTuple):
    """What a head says of P pairs.

    Attributes:
        logits: (P,) float32; those of the dual encoder before any training.
        features: (P, S * width), the fused embedding: what each of the S streams has pooled.
    """

    logits: Tensor
    features: Tensor


class FusionHead(nn.Module):
    """Cross-attention between the tokens of two towers, and a match logit for each pair.

    For each direction a stream of blocks, each with three pre-norm residual parts: self-attention
    on the stream, cross-attention to the other side, MLP. "image_to_text": image tokens are the
    stream and query text tokens; "text_to_image": the other way round; "both": two streams. A
    learned query pools each stream. With u and v the features of the dual encoder,

        logit = exp(log_scale) * <u, v> + logit_bias + match(pooled)

    where ``match`` is linear and starts at 0: an untrained head ranks as the dual encoder does.

    No ranks and no loss: rows are pairs, each on its own.

    Args:
        image: tokens of the image tower.
        text: tokens of the text tower.
        config: sizes; checked here.
        start_scale: first multiplier of the similarity, that of the dual encoder.
        start_bias: first number added to the logits, that of the dual encoder.

    Raises:
        UserError: if a size is out of its range.

    Example:
        >>> head = FusionHead(TokenShape(4, 8), TokenShape(3, 6), FusionConfig(width=16))
        >>> image = Encoded(torch.eye(2), torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool))
        >>> text = Encoded(torch.eye(2), torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
        >>> fused = head(image, text)
        >>> fused.logits.tolist(), fused.features.shape
        ([0.0, 0.0], torch.Size([2, 32]))

    Source:
        Visual queries on text tokens by cross-attention, and a pooler with learned queries: Yu et
        al. 2022 (CoCa), arXiv:2205.01917. A head that judges positives and hard negatives of the
        contrastive similarities: Li et al. 2021 (ALBEF), arXiv:2107.07651, with a two-way
        classifier; here a sigmoid.
    """

    def __init__(
        self,
        image: TokenShape,
        text: TokenShape,
        config: FusionConfig,
        *,
        start_scale: float = 10.0,
        start_bias: float = -10.0,
    ) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.image_input = _Input(image, config.width)
        self.text_input = _Input(text, config.width)
        both = config.direction == "both"
        queries = ("image", "text") if both else (config.direction.split("_")[0],)
        self.streams = nn.ModuleDict({query: _Stream(config) for query in queries})
        self.match = nn.Linear(len(queries) * config.width, 1)
        nn.init.zeros_(self.match.weight)
        nn.init.zeros_(self.match.bias)
        self.log_scale = nn.Parameter(torch.tensor([math.log(start_scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([start_bias]))

    def forward(self, image: Encoded, text: Encoded) -> Fused:
        """Judge P pairs.

        Args:
            image: P rows of the image tower, tokens in any float dtype.
            text: P rows of the text tower; row i is the text that image i is shown with. Every row
                has at least one token.
        """
        sides = {
            "image": (self.image_input(image.tokens), image.is_token),
            "text": (self.text_input(text.tokens), text.is_token),
        }
        pooled = []
        for query, stream in self.streams.items():
            other = "text" if query == "image" else "image"
            pooled.append(stream(*sides[query], *sides[other]))
        features = torch.cat(pooled, dim=1)
        similarities = (image.features * text.features).sum(dim=1)
        alone = self.log_scale.exp() * similarities + self.logit_bias
        found = self.match(features).sum(dim=1)
        return Fused(alone + found.to(alone.dtype), features)


class _Input(nn.Module):
    """Tokens of a tower, whatever their size, as the head takes them, with their positions."""

    def __init__(self, shape: TokenShape, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width)
        self.proj = nn.Linear(shape.width, width)
        self.positions = nn.Parameter(torch.randn(shape.num_tokens, width) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(self.norm(tokens.to(self.proj.weight.dtype))) + self.positions


class _Stream(nn.Module):
    """One side's tokens, which look at the other's and are pooled in the end."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.pool = _Attention(config)

    def forward(
        self, own: Tensor, own_is_token: Tensor, other: Tensor, other_is_token: Tensor
    ) -> Tensor:
        for block in self.blocks:
            own = block(own, own_is_token, other, other_is_token)
        query = self.query.expand(len(own), -1, -1)
        pooled: Tensor = self.pool(query, self.norm(own), own_is_token)
        return pooled.flatten(1)


class _Block(nn.Module):
    """Self-attention, cross-attention, MLP; each on the normalised stream and added to it."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.self_norm, self.self_attention = nn.LayerNorm(width), _Attention(config)
        self.cross_norm, self.cross_attention = nn.LayerNorm(width), _Attention(config)
        self.other_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, width),
        )

    def forward(
        self, own: Tensor, own_is_token: Tensor, other: Tensor, other_is_token: Tensor
    ) -> Tensor:
        normed = self.self_norm(own)
        own = own + self.self_attention(normed, normed, own_is_token)
        own = own + self.cross_attention(
            self.cross_norm(own), self.other_norm(other), other_is_token
        )
        found: Tensor = own + self.mlp(own)
        return found


class _Attention(nn.Module):
    """Queries of one side look at tokens of the same side or the other."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, queries: Tensor, tokens: Tensor, is_token: Tensor) -> Tensor:
        """Return (P, Q, width); queries (P, Q, width) look at tokens (P, T, width)."""
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(
            self._by_head(self.query(queries)),
            self._by_head(key),
            self._by_head(value),
            attn_mask=is_token[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found

    def _by_head(self, rows: Tensor) -> Tensor:
        """(P, T, width) to (P, heads, T, width / heads)."""
        num_pairs, num_tokens, width = rows.shape
        parted = rows.reshape(num_pairs, num_tokens, self.heads, width // self.heads)
        return parted.transpose(1, 2)
