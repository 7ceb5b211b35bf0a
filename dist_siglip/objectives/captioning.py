"""Captioning: a decoder that writes the caption from the patch tokens, beside the pairwise loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.models import BuiltModel, TokenShape
from dist_siglip.models.attention import Attention
from dist_siglip.objectives.objective import Need, Objective, Rows, Term, uniform
from dist_siglip.objectives.token_loss import token_losses

_START_ID = 0
_PARALLEL_STREAM = 0  # of ``uniform``
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

    def forward(self, stream: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        normed = self.self_norm(stream)
        stream = stream + self.self_attention(normed, normed, mask)
        stream = stream + self.cross_attention(self.cross_norm(stream), tokens, None)
        found: Tensor = stream + self.mlp(stream)
        return found


class CaptionDecoder(nn.Module):
    """A transformer that reads patch tokens and turns input ids into one vector per position.

    Args:
        vocab_size: V; the id V is that of a masked input.
        length: L, positions.
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
        length: int,
        width: int,
        heads: int,
        layers: int,
        mlp_width: int,
        token_width: int,
    ) -> None:
        super().__init__()
        self.mask_id = vocab_size
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.positions = nn.Parameter(torch.randn(length, width) * _STD)
        self.blocks = nn.ModuleList(
            _Block(width, heads, mlp_width, token_width) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=_STD)

    def forward(self, texts: Tensor, tokens: Tensor, is_parallel: Tensor) -> Tensor:
        """Return (b, L, width); row l of a caption is what its token l is predicted from.

        Args:
            texts: (b, L) token ids; position l sees those before it.
            tokens: (b, T, C) patches.
            is_parallel: (b,) bool; True where all inputs are masked and every position sees all.
        """
        length = texts.shape[1]
        inputs = F.pad(texts[:, :-1], (1, 0), value=_START_ID)
        inputs = torch.where(is_parallel[:, None], self.mask_id, inputs)
        causal = torch.ones(length, length, dtype=torch.bool, device=texts.device).tril()
        mask = causal | is_parallel[:, None, None, None]
        stream = self.embedding(inputs) + self.positions[:length]
        tokens = tokens.to(self.positions.dtype)
        for block in self.blocks:
            stream = block(stream, tokens, mask)
        found: Tensor = self.norm(stream)
        return found


class Captioning(Objective):
    """Cross-entropy of the caption, written by a decoder that sees the patches.

        L = 1/N sum_i ( sum_l w_il CE(z_il, y_il) / sum_l w_il )

    with w_il = 1 from the first token of caption i to its end, and else 0. The decoder has width,
    heads and MLP of the text tower and half of its layers, with attention to the patches in each;
    inputs are shifted right behind the id 0; positions are learned; the output matrix is its own
    and starts at 0, so that the first loss is log V. No attention leaves out padding.

    A share of the examples is predicted in parallel: all inputs are one mask id, and every position
    sees all. An evaluation writes from left to right, and measures how much of the loss the picture
    takes away: the loss with the patches of another picture, less the loss.

    Args:
        weight: as ``Objective``.
        start: as ``Objective``.
        ramp_steps: as ``Objective``.
        parallel: share of the examples predicted in parallel, in [0, 1].
        layers: of the decoder; null is half of those of the text tower, rounded up.
        width: channels of the decoder; null is that of the text tower.
        heads: of its attention; null is those of the text tower.

    Raises:
        UserError: if a number is out of range; later, if tower or tokenizer do not fit.

    Source:
        Decoder and loss: Tschannen et al. 2023 (CapPa), arXiv:2306.07915, and its public code.
        Sizes, place beside the sigmoid loss, share in parallel: Tschannen et al. 2025 (SigLIP 2),
        arXiv:2502.14786, sections 2.1 and 2.2. Standard deviation .02 of the embeddings is ours.
    """

    name: ClassVar[str] = "captioning"
    needs: ClassVar[frozenset[Need]] = frozenset({"image tokens", "captions"})
    decoder: CaptionDecoder
    output: nn.Linear
    writing: CaptionWriting

    def __init__(
        self,
        weight: float = 1.0,
        start: float = 0.0,
        ramp_steps: int = 0,
        parallel: float = 0.5,
        layers: int | None = None,
        width: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__(weight, start, ramp_steps)
        if not 0 <= parallel <= 1:
            raise UserError(f"parallel ({parallel}) of Captioning must be in [0, 1]")
        for name, value in (("layers", layers), ("width", width), ("heads", heads)):
            if value is not None and value < 1:
                raise UserError(f"{name} ({value}) of Captioning must be at least 1")
        self.parallel = parallel
        self._sizes = {"layers": layers, "width": width, "heads": heads}

    def build(self, built: BuiltModel, image: TokenShape) -> None:
        """Make decoder and output matrix for a text tower and its tokenizer.

        Raises:
            UserError: if ``width`` is no multiple of ``heads``, or captions are padded on the left.
        """
        tower = _text_sizes(built)
        asked = {name: value for name, value in self._sizes.items() if value is not None}
        sizes = {**tower, "layers": (tower["layers"] + 1) // 2, **asked}
        width, heads = sizes["width"], sizes["heads"]
        if width % heads:
            raise UserError(f"width ({width}) of Captioning must be a multiple of heads ({heads})")
        self.writing = CaptionWriting.of(built.tokenizer)
        self.decoder = CaptionDecoder(
            vocab_size=sizes["vocab_size"],
            length=built.context_length,
            width=width,
            heads=heads,
            layers=sizes["layers"],
            mlp_width=width * tower["mlp_width"] // tower["width"],
            token_width=image.width,
        )
        self.output = nn.Linear(width, sizes["vocab_size"])
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, rows: Rows) -> dict[str, Term]:
        """Return ``caption_loss``, in nats per token, summed over the captions of the rows."""
        is_parallel = uniform(rows.draws, _PARALLEL_STREAM) < self.parallel
        losses, _ = self._losses(rows.texts, rows.tokens, is_parallel)
        return {"caption_loss": self._term(losses, rows)}

    def measure(self, rows: Rows) -> dict[str, Term]:
        """Measure the captions of some rows, written from left to right.

        Returns:
            ``caption_loss``; ``caption_token_accuracy``, share of tokens that are the likeliest;
            ``caption_picture_gain``, loss with the patches of the row before, less the loss.
        """
        causal = torch.zeros_like(rows.draws, dtype=torch.bool)
        losses, best = self._losses(rows.texts, rows.tokens, causal)
        found = {
            "caption_loss": self._term(losses, rows),
            "caption_token_accuracy": self._term((best == rows.texts).to(losses), rows),
        }
        other, _ = self._losses(rows.texts, rows.tokens.roll(1, dims=0), causal)
        gain = self._term(other - losses, rows)
        # One row has no other.
        number = gain.number if len(rows.texts) > 1 else torch.zeros_like(gain.number)
        return {**found, "caption_picture_gain": Term(gain.total, number)}

    def write(self, tokens: Tensor) -> Tensor:
        """Write captions greedily, token by token.

        Args:
            tokens: (b, T, C) patches.

        Returns:
            (b, L) token ids, which begin as the tokenizer's rows do; what stands behind the end of
            a caption has no meaning. The decoder is computed once for each position, whatever it
            writes, so that sharded ranks stay together.
        """
        length = len(self.decoder.positions)
        texts = torch.full(
            (len(tokens), length), self.writing.pad_id, dtype=torch.long, device=tokens.device
        )
        causal = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        prefix = self.writing.prefix
        texts[:, : len(prefix)] = torch.tensor(prefix, device=tokens.device)
        for place in range(len(prefix), length):
            hidden = self.decoder(texts, tokens, causal)
            texts[:, place] = self.output(hidden[:, place]).argmax(dim=1)
        return texts

    def compile_heads(self, backend: str) -> None:
        """Let ``torch.compile`` translate the decoder, without its output matrix."""
        self.decoder.compile(backend=backend)

    def _losses(self, texts: Tensor, tokens: Tensor, is_parallel: Tensor) -> tuple[Tensor, Tensor]:
        """(b, L) losses and likeliest ids."""
        hidden = self.decoder(texts, tokens, is_parallel).flatten(0, 1)
        found = token_losses(hidden, self.output.weight, self.output.bias, texts.flatten())
        losses, best = (each.unflatten(0, texts.shape) for each in found)
        return losses, best

    def _term(self, values: Tensor, rows: Rows) -> Term:
        """Sum, over the captions, the mean of (b, L) values over what is to be written."""
        is_target = self.writing.is_target(rows.texts)
        num_targets = is_target.sum(dim=1)
        counts = rows.valid & (num_targets > 0)
        means = (values * is_target).sum(dim=1) / num_targets.clamp(min=1)
        return Term((means * counts).sum(), counts.sum())


def _text_sizes(built: BuiltModel) -> dict[str, int]:
    """Width, heads, layers, MLP and vocabulary of a text tower."""
    text: Any = getattr(built.encoder.clip, "text", None)
    if isinstance(text, HFTextEncoder):
        names = arch_dict[text.config.model_type]["config_names"]
        sizes = ("width", "heads", "layers", "vocab_size")
        found = {size: int(getattr(text.config, names[size])) for size in sizes}
        inner = getattr(text.config, "intermediate_size", getattr(text.config, "d_ff", None))
        return {**found, "mlp_width": int(inner or 4 * found["width"])}
    config = CLIPTextCfg(**built.architecture["text_cfg"])
    return {
        "width": config.width,
        "heads": config.heads,
        "layers": config.layers,
        "vocab_size": config.vocab_size,
        "mlp_width": int(config.width * config.mlp_ratio),
    }
