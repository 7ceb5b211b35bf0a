"""The decoder of captions and boxes, and how a tokenizer writes captions into rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.models.attention import Attention

_STD = 0.02


@dataclass(frozen=True)
class CaptionWriting:
    """How a tokenizer writes a caption into a row of token ids.

    Attributes:
        prefix: tokens before the text, the same in every row.
        end_id: the token behind the text.
        pad_id: what fills a row up; it may be ``end_id``.
    """

    prefix: tuple[int, ...]
    end_id: int
    pad_id: int

    @classmethod
    def of(cls, tokenizer: Callable[[list[str]], Tensor]) -> "CaptionWriting":
        """Find out by writing an empty caption: prefix, end, padding.

        A row that repeats one token has no prefix, and ends with its padding.

        Raises:
            UserError: if padding stands on the left.

        Example:
            >>> CaptionWriting.of(lambda texts: torch.tensor([[7, 8, 0, 0, 0]]))
            CaptionWriting(prefix=(7,), end_id=8, pad_id=0)
            >>> CaptionWriting.of(lambda texts: torch.tensor([[1, 1, 1, 1]]))
            CaptionWriting(prefix=(), end_id=1, pad_id=1)
        """
        with torch.device("cpu"):  # a module may be under construction without values
            row: list[int] = tokenizer([""])[0].tolist()
        pad = row[-1]
        own = [place for place, token in enumerate(row) if token != pad]
        if not own:
            return cls((), pad, pad)
        if own[-1] >= 3:
            raise UserError(
                "the tokenizer of the model pads captions on the left, or begins them with "
                "several tokens; Captioning needs padding on the right and at most two"
            )
        return cls(tuple(row[: own[-1]]), row[own[-1]], pad)

    def is_target(self, texts: Tensor) -> Tensor:
        """Mark what a decoder must write: behind the prefix, up to and with the end.

        Args:
            texts: (b, L) token ids. A row without an end counts up to its padding.

        Returns:
            (b, L) bool.
        """
        places = torch.arange(texts.shape[1], device=texts.device)
        behind = places >= len(self.prefix)
        is_end = (texts == self.end_id) & behind
        ends_before = is_end.cumsum(dim=1) - is_end.long() > 0
        found = behind & ~ends_before
        if self.pad_id != self.end_id:
            found = found & ((texts != self.pad_id) | is_end)
        return found


class _Block(nn.Module):
    """Self-attention, attention to the patches, MLP; each on the normalised stream, added to it."""

    def __init__(self, width: int, heads: int, mlp_width: int, token_width: int) -> None:
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, token_width=token_width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width)
        )

    def forward(
        self, stream: Tensor, tokens: Tensor, mask: Tensor, token_mask: Tensor | None
    ) -> Tensor:
        normed = self.self_norm(stream)
        stream = stream + self.self_attention(normed, normed, mask)
        stream = stream + self.cross_attention(self.cross_norm(stream), tokens, token_mask)
        found: Tensor = stream + self.mlp(stream)
        return found


class CaptionDecoder(nn.Module):
    """A transformer that reads patch tokens and turns input ids into one vector per position.

    Args:
        vocab_size: V, ids that rows may hold; the id V is that of a masked input, and those above
            stand where a row begins.
        num_starts: of the latter.
        length: most positions of a row.
        width: channels.
        heads: of every attention.
        layers: blocks.
        mlp_width: channels inside of the MLPs.
        token_width: channels of the patch tokens.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_starts: int,
        length: int,
        width: int,
        heads: int,
        layers: int,
        mlp_width: int,
        token_width: int,
    ) -> None:
        super().__init__()
        self.mask_id = vocab_size
        self.embedding = nn.Embedding(vocab_size + 1 + num_starts, width)
        self.positions = nn.Parameter(torch.randn(length, width) * _STD)
        self.blocks = nn.ModuleList(
            _Block(width, heads, mlp_width, token_width) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=_STD)

    def forward(
        self,
        rows: Sequence[Tensor],
        starts: Sequence[int],
        tokens: Tensor,
        is_parallel: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Return (b, sum of L, width); vector l of a row is what its id l is predicted from.

        Rows of one picture go through together, each seeing itself alone, so that keys and values
        of the patches are made once.

        Args:
            rows: (b, L) ids each; position l sees those before it.
            starts: id that stands before the first of each.
            tokens: (b, T, C) patches.
            is_parallel: (b,) bool; True where all inputs of the first row are masked and each of
                its positions sees all. None: nowhere.
            token_mask: (b, T) bool; False at patches of padding, which are not seen. None: none is.
        """
        inputs = [
            F.pad(ids[:, :-1], (1, 0), value=start) for ids, start in zip(rows, starts, strict=True)
        ]
        row = torch.cat([torch.full_like(ids[0], number) for number, ids in enumerate(rows)])
        places = torch.arange(len(row), device=row.device)
        is_own = row[:, None] == row
        mask = is_own & (places[:, None] >= places)
        if is_parallel is not None:
            inputs[0] = torch.where(is_parallel[:, None], self.mask_id, inputs[0])
            mask = mask | (is_own & (row == 0) & is_parallel[:, None, None, None])
        positions = torch.cat([self.positions[: ids.shape[1]] for ids in rows])
        stream = self.embedding(torch.cat(inputs, dim=1)) + positions
        tokens = tokens.to(self.positions.dtype)
        seen = None if token_mask is None else token_mask[:, None, None]
        for block in self.blocks:
            stream = block(stream, tokens, mask, seen)
        found: Tensor = self.norm(stream)
        return found
