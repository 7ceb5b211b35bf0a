"""Tensor names of transformers checkpoints and of open_clip networks, in both directions.

``SiglipModel``, ``Siglip2Model`` and ``CLIPModel`` store the same towers as open_clip, under other
names and in other pieces: query, key and value apart or as one, projections transposed, patches
flattened.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Family = Literal["siglip", "clip"]
_PATCHES = "vision_model.embeddings.patch_embedding.weight"


class Piece(NamedTuple):
    """Tensors that hold the same numbers.

    Attributes:
        own: open_clip's names, stacked along the first dimension.
        foreign: the names of transformers, stacked likewise.
        shares: how the rows are divided among the several names of either side.
        form: how a single tensor differs: not at all, transposed, or by a leading 1.
    """

    own: tuple[str, ...]
    foreign: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    form: Literal["same", "transposed", "row"] = "same"


def is_foreign(names: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of a dual encoder of transformers."""
    return all(
        any(name.startswith(tower) for name in names) for tower in ("vision_model.", "text_model.")
    )


def has_flat_patches(tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is a ``Siglip2Model``, whose patches are rows of numbers (NaFlex)."""
    return _PATCHES in tensors and tensors[_PATCHES].ndim == 2


def to_own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the towers of transformers; what is unknown keeps its name, to be reported later.

    Args:
        tensors: a state dict for which ``is_foreign`` holds, without logit scale and bias.
    """
    left = {name: value for name, value in tensors.items() if not name.endswith(".position_ids")}
    family: Family = "clip" if "vision_model.embeddings.class_embedding" in left else "siglip"
    if has_flat_patches(left):
        patches = left[_PATCHES]
        # Siglip2Model flattens a patch row by row, its three colours last.
        side = math.isqrt(patches.shape[1] // 3)
        square = patches.reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
        left[_PATCHES] = square
    own: dict[str, Tensor] = {}
    for piece in _pieces(family, *_depths(left, "vision_model.", "text_model.", "encoder.layers.")):
        if all(name in left for name in piece.foreign):
            values = [left.pop(name) for name in piece.foreign]
            own.update(_divide(values, piece.own, piece))
    return {**own, **left}


def to_foreign_names(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the towers of an open_clip network the names of transformers.

    Args:
        family: "siglip" for ``SiglipModel``, "clip" for ``CLIPModel``.
        tensors: the whole state of the network, without logit scale and bias.

    Raises:
        KeyError: If a tensor is missing, or has no counterpart.
    """
    left = dict(tensors)
    if family == "clip":
        left = {name.removeprefix("text."): value for name, value in left.items()}
        depths = _depths(left, "visual.transformer.", "transformer.", "resblocks.")
    else:
        depths = (
            _depth(left, "visual.trunk.blocks."),
            _depth(left, "text.transformer.resblocks."),
        )
    foreign: dict[str, Tensor] = {}
    for piece in _pieces(family, *depths):
        values = [left.pop(name) for name in piece.own]
        foreign.update(_divide(values, piece.foreign, piece))
    if left:
        raise KeyError(next(iter(left)))
    return foreign


def _divide(values: list[Tensor], names: tuple[str, ...], piece: Piece) -> dict[str, Tensor]:
    whole = values[0] if len(values) == 1 else torch.cat(values)
    if piece.form == "transposed":
        whole = whole.T
    elif piece.form == "row":
        whole = whole[0] if whole.ndim == 3 else whole[None]
    if len(names) == 1:
        return {names[0]: whole.contiguous()}
    unit = whole.shape[0] // sum(piece.shares)
    parts = whole.split([unit * share for share in piece.shares])
    return {name: part.contiguous() for name, part in zip(names, parts, strict=True)}


def _pieces(family: Family, image_depth: int, text_depth: int) -> Iterator[Piece]:
    if family == "clip":
        yield from _clip_stem_and_head()
        for number in range(image_depth):
            yield from _block(f"visual.transformer.resblocks.{number}.", "vision_model.", number)
        for number in range(text_depth):
            yield from _block(f"transformer.resblocks.{number}.", "text_model.", number)
        return
    yield from _siglip_stem_and_head()
    for number in range(image_depth):
        yield from _timm_block(number)
    for number in range(text_depth):
        yield from _block(f"text.transformer.resblocks.{number}.", "text_model.", number)


def _layer(own: str, foreign: str) -> Iterator[Piece]:
    for kind in ("weight", "bias"):
        yield Piece((f"{own}.{kind}",), (f"{foreign}.{kind}",))


def _clip_stem_and_head() -> Iterator[Piece]:
    image, text = "vision_model.", "text_model."
    for own, foreign in (
        ("visual.class_embedding", f"{image}embeddings.class_embedding"),
        ("visual.conv1.weight", f"{image}embeddings.patch_embedding.weight"),
        ("visual.positional_embedding", f"{image}embeddings.position_embedding.weight"),
        ("token_embedding.weight", f"{text}embeddings.token_embedding.weight"),
        ("positional_embedding", f"{text}embeddings.position_embedding.weight"),
    ):
        yield Piece((own,), (foreign,))
    # The spelling is that of transformers.
    yield from _layer("visual.ln_pre", f"{image}pre_layrnorm")
    yield from _layer("visual.ln_post", f"{image}post_layernorm")
    yield from _layer("ln_final", f"{text}final_layer_norm")
    yield Piece(("visual.proj",), ("visual_projection.weight",), form="transposed")
    yield Piece(("text_projection",), ("text_projection.weight",), form="transposed")


def _siglip_stem_and_head() -> Iterator[Piece]:
    image, text, trunk = "vision_model.", "text_model.", "visual.trunk."
    yield from _layer(f"{trunk}patch_embed.proj", f"{image}embeddings.patch_embedding")
    position = f"{image}embeddings.position_embedding.weight"
    yield Piece((f"{trunk}pos_embed",), (position,), form="row")
    yield from _layer(f"{trunk}norm", f"{image}post_layernorm")
    pool, head = f"{trunk}attn_pool.", f"{image}head."
    yield Piece((f"{pool}latent",), (f"{head}probe",))
    for kind in ("weight", "bias"):
        halves = (f"{pool}q.{kind}", f"{pool}kv.{kind}")
        yield Piece(halves, (f"{head}attention.in_proj_{kind}",), shares=(1, 2))
    yield from _layer(f"{pool}proj", f"{head}attention.out_proj")
    yield from _layer(f"{pool}norm", f"{head}layernorm")
    yield from _layer(f"{pool}mlp.fc1", f"{head}mlp.fc1")
    yield from _layer(f"{pool}mlp.fc2", f"{head}mlp.fc2")
    for own, foreign in (
        ("text.token_embedding.weight", f"{text}embeddings.token_embedding.weight"),
        ("text.positional_embedding", f"{text}embeddings.position_embedding.weight"),
    ):
        yield Piece((own,), (foreign,))
    yield from _layer("text.ln_final", f"{text}final_layer_norm")
    yield from _layer("text.text_projection", f"{text}head")


def _block(own: str, tower: str, number: int) -> Iterator[Piece]:
    """One block of open_clip's own transformer."""
    foreign = f"{tower}encoder.layers.{number}."
    yield from _attention((f"{own}attn.in_proj_weight", f"{own}attn.in_proj_bias"), foreign)
    for mine, theirs in (
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ):
        yield from _layer(own + mine, foreign + theirs)


def _timm_block(number: int) -> Iterator[Piece]:
    own, foreign = f"visual.trunk.blocks.{number}.", f"vision_model.encoder.layers.{number}."
    yield from _attention((f"{own}attn.qkv.weight", f"{own}attn.qkv.bias"), foreign)
    for mine, theirs in (
        ("attn.proj", "self_attn.out_proj"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ):
        yield from _layer(own + mine, foreign + theirs)


def _attention(own: tuple[str, str], foreign: str) -> Iterator[Piece]:
    for name, kind in zip(own, ("weight", "bias"), strict=True):
        parts = tuple(f"{foreign}self_attn.{part}_proj.{kind}" for part in "qkv")
        yield Piece((name,), parts, shares=(1, 1, 1))


def _depths(names: Mapping[str, Tensor], image: str, text: str, blocks: str) -> tuple[int, int]:
    return _depth(names, image + blocks), _depth(names, text + blocks)


def _depth(names: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbered blocks under a prefix.

    Example:
        >>> _depth({"a.0.w": torch.ones(1), "a.1.w": torch.ones(1), "b": torch.ones(1)}, "a.")
        2
    """
    return len({n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)})
