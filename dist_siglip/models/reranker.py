"""A fusion head: cross-attention between the tokens of two towers, and a match logit for each pair.

A dual encoder must put all it will ever be asked into one vector per side, before it has seen the
other side. A fusion head sees both: the un-pooled tokens of one tower, one for each patch or text
position, query those of the other. It costs one pass per pair, so it judges candidates: the top-k
of a dual encoder, and in training positives and hard negatives, never all pairs of a batch.

A head is written as one safetensors file with the fingerprints of the towers it was trained on;
another model is refused.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import safetensors
import safetensors.torch
import torch
from open_clip.hf_model import HFTextEncoder
from safetensors import SafetensorError
from torch import Tensor, nn

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.errors import UserError
from dist_siglip.losses.logit_scale import START_BIAS, START_SCALE
from dist_siglip.models.attention import Attention
from dist_siglip.models.build import BuiltModel, tower_fingerprint
from dist_siglip.models.dual_encoder import DualEncoder, TokenShape, evaluation_mode, unit_rows
from dist_siglip.models.text_tower import encode_with_tokens
from dist_siglip.models.weights_file import refuse_not_finite
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import check_regular

Direction = Literal["image_to_text", "text_to_image", "both"]
_FORMAT = "dist_siglip fusion head 1"


class Encoded(NamedTuple):
    """One side of B pairs, pooled and un-pooled; row i of every field belongs to pair i.

    Attributes:
        features: (B, D) float32, L2-normalised; what ``DualEncoder`` gives.
        tokens: (B, T, C), output of the last block of the tower, not normalised.
        is_token: (B, T) bool; False where a text has ended and the tower did not look.
    """

    features: Tensor
    tokens: Tensor
    is_token: Tensor


def encode_image_tokens(encoder: DualEncoder, images: Tensor) -> Encoded:
    """Encode (B, 3, H, W) pixels to features and one token per patch, row by row.

    A class token is left out: the features are made of it. Of a convolutional tower the cells of
    the last feature map are the tokens.

    Raises:
        UserError: if the tower gives no tokens.
    """
    visual = encoder.clip.visual
    _require_tokens(visual, "image")
    pixels = encoder.pixels(images)
    found = visual.forward_intermediates(pixels, indices=1, output_fmt="NCHW")
    tokens = found["image_intermediates"][-1].flatten(2).transpose(1, 2)
    is_token = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Encoded(unit_rows(found["image_features"]), tokens, is_token)


def encode_text_tokens(encoder: DualEncoder, texts: Tensor) -> Encoded:
    """Encode (B, L) token ids to features and one token per position.

    Positions behind the end of the text are marked where pooling takes the end of the text
    (CLIP), and padding where the tower leaves it out (Hugging Face). A tower that pools the last
    position (SigLIP) has looked at its padding, and all positions are tokens.

    Raises:
        UserError: if the tower gives no tokens.
    """
    clip = encoder.clip
    text = getattr(clip, "text", clip)
    if isinstance(text, HFTextEncoder):
        features, tokens, is_token = encode_with_tokens(text, texts)
        return Encoded(unit_rows(features), tokens, is_token)
    _require_tokens(text, "text")
    found = clip.forward_intermediates(text=texts, text_indices=1, normalize=False)
    tokens = found["text_intermediates"][-1]
    return Encoded(unit_rows(found["text_features"]), tokens, _is_token(text, texts))


def token_shapes(built: BuiltModel) -> dict[Tower, TokenShape]:
    """Find the tokens that both towers give, by encoding one empty pair.

    Raises:
        UserError: if a tower gives none.
    """
    if built.patches is not None:
        raise UserError(
            "a reranker reads one number of patches from each picture, and pictures of this model "
            "have any shape (NaFlex); choose a model of one size"
        )
    size = built.image_size
    height, width = (size, size) if isinstance(size, int) else size
    device = next(built.encoder.parameters()).device
    with torch.no_grad(), evaluation_mode(built.encoder):
        images = torch.zeros(1, 3, height, width, device=device)
        texts = built.tokenizer([""]).to(device)
        image = encode_image_tokens(built.encoder, images).tokens
        text = encode_text_tokens(built.encoder, texts).tokens
    return {"image": TokenShape(*image.shape[1:]), "text": TokenShape(*text.shape[1:])}


def _is_token(text: Any, ids: Tensor) -> Tensor:
    """Mark the positions of (B, L) ids that hold the text, its end included."""
    pool = getattr(text, "text_pool_type", None) or text.pool_type
    if getattr(text, "cls_emb", None) is not None:
        return ids != text.pad_id
    if pool == "argmax":
        end = ids.argmax(dim=1)
    elif pool == "eos":
        end = (ids == (getattr(text, "text_eos_id", None) or text.eos_id)).int().argmax(dim=1)
    else:
        return torch.ones_like(ids, dtype=torch.bool)
    return torch.arange(ids.shape[1], device=ids.device) <= end[:, None]


def _require_tokens(tower: Any, name: Tower) -> None:
    # A tower of timm is a trunk in a wrapper, which has the method whether or not the trunk has.
    giver = getattr(tower, "trunk", tower)
    if not hasattr(giver, "forward_intermediates"):
        raise UserError(
            f"the {name} tower ({type(giver).__name__}) gives no tokens before pooling; choose a "
            "model of open_clip's own towers, or a ViT of timm, such as ViT-B-16-SigLIP"
        )


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Sizes of a fusion head.

    Args:
        direction: who queries whom: "image_to_text" lets image tokens look at text tokens,
            "text_to_image" the other way round, "both" does both.
        width: channels inside of the head, a multiple of heads.
        heads: heads of every attention.
        layers: blocks of a side that queries.
        dropout: share of attention weights and MLP channels dropped in training, in [0, 1).
        rerank_weight: factor of the head's logits where they are added to those of the dual
            encoder, above 0; training does not see it. Both judge the same pictures and words, so
            that their plain sum, 1, counts most of the evidence twice.
    """

    direction: Direction = "both"
    width: int = 256
    heads: int = 4
    layers: int = 2
    dropout: float = 0.0
    rerank_weight: float = 0.3

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
        if not 0 < self.rerank_weight < math.inf:
            raise UserError(
                f"rerank_weight ({self.rerank_weight}) of a fusion head must be above 0; use 0.3"
            )


class Fused(NamedTuple):
    """What a head says of P pairs.

    Attributes:
        logits: (P,) float32 or wider; 0 before any training.
        features: (P, 3 * width), the fused embedding: what both sides have pooled, and its product.
    """

    logits: Tensor
    features: Tensor


class FusionHead(nn.Module):
    """Cross-attention between the tokens of two towers, and a match logit for each pair.

    The side that queries is a stream of blocks, each with three pre-norm residual parts:
    self-attention on the stream, cross-attention to the other side, MLP. "image_to_text": image
    tokens query text tokens; "text_to_image": the other way round; "both": both do, at once. A
    learned query pools each side, to p for the image and q for the text, and

        logit = match([p, q, p * q])

    where ``match`` is linear and starts at 0.

    No ranks and no loss: rows are pairs, each on its own.

    Args:
        image: tokens of the image tower.
        text: tokens of the text tower.
        config: sizes; checked here.
        dual_scale: multiplier of the similarity in the logits of the dual encoder; does not train.
        dual_bias: number added in the logits of the dual encoder; does not train.

    Raises:
        UserError: if a size is out of its range.

    Example:
        >>> head = FusionHead(TokenShape(4, 8), TokenShape(3, 6), FusionConfig(width=16))
        >>> image = Encoded(torch.eye(2), torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool))
        >>> text = Encoded(torch.eye(2), torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
        >>> fused = head(image, text)
        >>> fused.logits.tolist(), fused.features.shape
        ([0.0, 0.0], torch.Size([2, 48]))
        >>> head.scores(image, text).tolist()
        [0.0, 0.0]

    Source:
        Visual queries on text tokens by cross-attention, and a pooler with learned queries: Yu et
        al. 2022 (CoCa), arXiv:2205.01917. A head that judges positives and hard negatives of the
        contrastive similarities: Li et al. 2021 (ALBEF), arXiv:2107.07651, with a two-way
        classifier; here a sigmoid. The product of what was pooled is ours.
    """

    dual_scale: Tensor
    dual_bias: Tensor

    def __init__(
        self,
        image: TokenShape,
        text: TokenShape,
        config: FusionConfig,
        *,
        dual_scale: float = START_SCALE,
        dual_bias: float = START_BIAS,
    ) -> None:
        super().__init__()
        config.check()
        self.config = config
        image_layers = 0 if config.direction == "text_to_image" else config.layers
        text_layers = 0 if config.direction == "image_to_text" else config.layers
        self.image_input = _Input(image, config.width)
        self.text_input = _Input(text, config.width)
        self.image_stream = _Stream(config, image_layers)
        self.text_stream = _Stream(config, text_layers)
        self.match = nn.Linear(3 * config.width, 1)
        nn.init.zeros_(self.match.weight)
        nn.init.zeros_(self.match.bias)
        self.register_buffer("dual_scale", torch.tensor([dual_scale]))
        self.register_buffer("dual_bias", torch.tensor([dual_bias]))

    def forward(self, image: Encoded, text: Encoded) -> Fused:
        """Judge P pairs by their tokens alone; this is what trains.

        Args:
            image: P rows of the image tower, tokens in any float dtype.
            text: P rows of the text tower; row i is the text that image i is shown with. Every row
                has at least one token.
        """
        image_side = (self.image_input(image.tokens), image.is_token)
        text_side = (self.text_input(text.tokens), text.is_token)
        of_image = self.image_stream(*image_side, *text_side)
        of_text = self.text_stream(*text_side, *image_side)
        features = torch.cat([of_image, of_text, of_image * of_text], dim=1)
        logits = self.match(features).sum(dim=1)
        return Fused(logits.to(torch.promote_types(logits.dtype, torch.float32)), features)

    def scores(self, image: Encoded, text: Encoded) -> Tensor:
        """Score P pairs for re-ranking: logits of the dual encoder and a part of the head's.

        With u and v the features, dual_scale * <u, v> + dual_bias + rerank_weight * logit. An
        untrained head leaves every order as it was.

        Returns:
            (P,), larger is better.
        """
        similarities = (image.features * text.features).sum(dim=1)
        logits: Tensor = self(image, text).logits
        return self.dual_scale * similarities + self.dual_bias + self.config.rerank_weight * logits


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
    """One side's tokens, which look at the other's (not without layers), pooled in the end."""

    def __init__(self, config: FusionConfig, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.pool = _attention(config)

    def forward(
        self, own: Tensor, own_is_token: Tensor, other: Tensor, other_is_token: Tensor
    ) -> Tensor:
        for block in self.blocks:
            own = block(own, own_is_token, other, other_is_token)
        query = self.query.expand(len(own), -1, -1)
        pooled: Tensor = self.pool(query, self.norm(own), own_is_token[:, None, None, :])
        return pooled.flatten(1)


class _Block(nn.Module):
    """Self-attention, cross-attention, MLP; each on the normalised stream and added to it."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.width
        self.self_norm, self.self_attention = nn.LayerNorm(width), _attention(config)
        self.cross_norm, self.cross_attention = nn.LayerNorm(width), _attention(config)
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
        own = own + self.self_attention(normed, normed, own_is_token[:, None, None, :])
        own = own + self.cross_attention(
            self.cross_norm(own), self.other_norm(other), other_is_token[:, None, None, :]
        )
        found: Tensor = own + self.mlp(own)
        return found


def _attention(config: FusionConfig) -> Attention:
    return Attention(config.width, config.heads, dropout=config.dropout)


def tower_fingerprints(built: BuiltModel) -> dict[Tower, str]:
    """Hash both towers; see ``tower_fingerprint``."""
    return {"image": tower_fingerprint(built, "image"), "text": tower_fingerprint(built, "text")}


def write_head(path: Path, head: FusionHead, built: BuiltModel) -> None:
    """Write a head whole; nothing of the towers but their digests."""
    about = {
        "format": _FORMAT,
        "config": json.dumps(asdict(head.config)),
        "towers": json.dumps(tower_fingerprints(built)),
    }
    tensors = {name: value.contiguous().cpu() for name, value in head.state_dict().items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata=about))


def read_head(path: Path, built: BuiltModel) -> FusionHead:
    """Read a head for the model it was trained on; on the CPU, in evaluation mode.

    Raises:
        UserError: if the file is missing or damaged, is no head, has an entry that is not finite,
            or is of another model.
    """
    try:
        check_regular(path)
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"head ({path}) cannot be read ({' '.join(str(error).split())[:120]}); name the file "
            "that rerank wrote"
        ) from error
    if about.get("format") != _FORMAT:
        raise UserError(f"{path} is no fusion head; name the file that rerank wrote")
    refuse_not_finite(tensors, f"head ({path})")
    check_towers(json.loads(about["towers"]), tower_fingerprints(built), f"head ({path})")
    shapes = token_shapes(built)
    config = FusionConfig(**json.loads(about["config"]))
    head = FusionHead(shapes["image"], shapes["text"], config)
    head.load_state_dict(tensors)
    return head.eval()


def check_towers(recorded: Mapping[str, str], now: Mapping[Tower, str], what: str) -> None:
    """Check that tokens come from the towers they came from in training."""
    changed = [name for name, digest in now.items() if recorded.get(name) != digest]
    if changed:
        raise UserError(
            f"{what} reads the tokens of another {' and '.join(changed)} tower; name the model it "
            "was trained with"
        )
