"""Un-pooled tokens of both towers: one for each patch of a picture and each position of a text.

Features and tokens come from one pass of the tower.
"""

from typing import Any, NamedTuple

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.dual_encoder import DualEncoder, evaluation_mode, unit_rows
from dist_siglip.models.text_tower import encode_with_tokens
from dist_siglip.models.tuning.layer_groups import Tower


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


class TokenShape(NamedTuple):
    """Tokens of one tower: T of them, C numbers each."""

    num_tokens: int
    width: int


def encode_image_tokens(encoder: DualEncoder, images: Tensor) -> Encoded:
    """Encode (B, 3, H, W) normalised pixels to features and one token per patch, row by row.

    A class token is left out: the features are made of it. Of a convolutional tower the cells of
    the last feature map are the tokens.

    Raises:
        UserError: if the tower gives no tokens.
    """
    visual = encoder.clip.visual
    dtype = next(visual.parameters()).dtype
    _require_tokens(visual, "image")
    found = visual.forward_intermediates(images.to(dtype), indices=1, output_fmt="NCHW")
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
