"""Configs and tensor names of transformers, translated to open_clip's and back.

A folder with a ``config.json`` of model type siglip, siglip2 or clip describes towers that
open_clip and timm can build: a ViT of timm with attention pooling and open_clip's text
transformer, or open_clip's own CLIP. Sizes are read from the config, so no list of published
models is needed. Only files are read here; transformers itself is not imported.

``SiglipModel``, ``Siglip2Model`` and ``CLIPModel`` store the same towers as open_clip, under other
names and in other pieces: query, key and value apart or as one, projections transposed, patches
flattened.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from dist_siglip.data.samples.patches import kernel_of
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import read_json

Family = Literal["siglip", "siglip2", "clip"]
_PATCHES = "vision_model.embeddings.patch_embedding.weight"
CONFIG_NAME = "config.json"
WEIGHT_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
TOKENIZER_NAMES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
# What transformers leaves out of a config that has its default.
_SIGLIP_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_CLIP_TOWER = {**_SIGLIP_TOWER, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_CLIP_TEXT = {
    **_CLIP_TOWER,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_SIGLIP_TEXT = {**_SIGLIP_TOWER, "vocab_size": 32000, "max_position_embeddings": 64}
# timm's names of SigLIP's image towers, whose sizes a config states: of one size, of any shape.
FIXED_TOWER, NAFLEX_TOWER = "vit_base_patch16_siglip_224", "naflexvit_base_patch16_siglip"
MAX_NUM_PATCHES = "max_num_patches"  # of a picture, in a preprocessing config
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
}


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
        left[_PATCHES] = kernel_of(left[_PATCHES])
    own: dict[str, Tensor] = {}
    for piece in _pieces(family, *_depths(left, "vision_model.", "text_model.", "encoder.layers.")):
        if all(name in left for name in piece.foreign):
            values = [left.pop(name) for name in piece.foreign]
            own.update(_divide(values, piece.own, piece))
    return {**own, **left}


def to_foreign_names(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the towers of an open_clip network the names of transformers.

    Args:
        family: "siglip" for ``SiglipModel``, "siglip2" for ``Siglip2Model``, whose patches stay as
            they are, "clip" for ``CLIPModel``.
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


def activation_name(layer: nn.Module) -> str:
    """Return the name transformers has for an activation, found by what it computes.

    open_clip, timm and torch have several classes of the same function.

    Raises:
        UserError: If it is none of the three of dual encoders.

    Example:
        >>> activation_name(nn.GELU()), activation_name(nn.GELU(approximate="tanh"))
        ('gelu', 'gelu_pytorch_tanh')
    """
    probe = torch.linspace(-4, 4, 65)
    found = layer(probe.clone())
    for name, values in (
        ("gelu", F.gelu(probe)),
        ("gelu_pytorch_tanh", F.gelu(probe, approximate="tanh")),
        ("quick_gelu", probe * torch.sigmoid(1.702 * probe)),
    ):
        # The three differ by 4e-4 and more.
        if torch.allclose(found, values, rtol=0, atol=1e-5):
            return name
    raise UserError(f"activation {type(layer).__name__} is neither GELU nor QuickGELU")


def fetch_folder(repository: str, with_weights: bool) -> str:
    """Fetch a repository of transformers from the hub, once, and return its folder here.

    Only configs, tokenizer files and one kind of weights are taken: safetensors if there are any.
    """
    small = ["*config.json", "special_tokens_map.json", "merges.txt", *TOKENIZER_NAMES]
    if not with_weights:
        return snapshot_download(repository, allow_patterns=small)
    folder = snapshot_download(repository, allow_patterns=[*small, "model*.safetensors*"])
    if not any((Path(folder) / name).is_file() for name in WEIGHT_NAMES):
        folder = snapshot_download(repository, allow_patterns=["pytorch_model.bin"])
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what a folder that ``save_pretrained`` of transformers wrote says of its model.

    One of ``Siglip2Model`` whose processor cuts pictures of any shape into patches is of a NaFlex
    tower; without a word of that, of one that sees squares.

    Returns:
        open_clip's model config and its preprocessing config.

    Raises:
        UserError: If a file is missing or damaged, or the model is none of the three.
    """
    path = folder / CONFIG_NAME
    architecture = _architecture(_read(path), path)
    if not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        raise UserError(
            f"folder {folder} holds no tokenizer (none of {', '.join(TOKENIZER_NAMES)}); copy the "
            "tokenizer files of the model into it"
        )
    said = _processor(folder)
    preprocessing = _preprocessing(said, architecture)
    if _read(path).get("model_type") == "siglip2" and _cuts_patches(said):
        architecture["vision_cfg"]["timm_model_name"] = NAFLEX_TOWER
        preprocessing.setdefault(MAX_NUM_PATCHES, 256)
    return architecture, preprocessing


def weights_in_folder(folder: Path) -> Path:
    """Return the weights file of such a folder.

    Raises:
        UserError: If there is none.
    """
    weights = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"folder {folder} holds no weights; expected {' or '.join(WEIGHT_NAMES)}")
    return weights


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({text}); fetch the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be an object; fetch the model again")
    return content


def _architecture(config: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = config.get("model_type")
    image, text = config.get("vision_config") or {}, config.get("text_config") or {}
    try:
        if kind == "clip":
            return _clip(config, {**_CLIP_TOWER, **image}, {**_CLIP_TEXT, **text}, path)
        if kind in ("siglip", "siglip2"):
            return _siglip(kind, {**_SIGLIP_TOWER, **image}, {**_SIGLIP_TEXT, **text}, path)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"{path} has sizes that are no numbers ({error}); correct it") from error
    raise UserError(f"model_type ({kind}) of {path} must be siglip, siglip2 or clip")


def _siglip(kind: str, image: dict[str, Any], text: dict[str, Any], path: Path) -> dict[str, Any]:
    patch_size = image.get("patch_size", 16)
    size = image.get("image_size", 224)
    if kind == "siglip2" and "image_size" not in image:
        size = math.isqrt(image.get("num_patches", 256)) * patch_size
    if "quick_gelu" in (image["hidden_act"], text["hidden_act"]):
        raise UserError(f"hidden_act (quick_gelu) of {path} is of CLIP; SigLIP towers have gelu")
    if not image.get("vision_use_head", True):
        raise UserError(f"{path} has no pooling head (vision_use_head: false), so no features")
    vision = {
        "image_size": size,
        "timm_model_name": FIXED_TOWER,
        "timm_pool": "map",
        "timm_proj": "none",
        "patch_size": patch_size,
        "head_width": image["hidden_size"] // image["num_attention_heads"],
        **_sizes(image, path),
    }
    embed_dim = text.get("projection_size") or text["hidden_size"]
    if embed_dim != image["hidden_size"]:
        raise UserError(
            f"{path}: width of the image tower ({image['hidden_size']}) and projection_size "
            f"({embed_dim}) must be equal"
        )
    return {
        "embed_dim": embed_dim,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "hf_tokenizer_name": str(path.parent),
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "heads": text["num_attention_heads"],
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            **_sizes(text, path),
        },
    }


def _clip(
    config: dict[str, Any], image: dict[str, Any], text: dict[str, Any], path: Path
) -> dict[str, Any]:
    quick = {tower["hidden_act"] == "quick_gelu" for tower in (image, text)}
    if len(quick) > 1:
        raise UserError(f"{path}: hidden_act of both towers must be quick_gelu, or of none")
    end = text["eos_token_id"]
    # transformers reads 2 as "the highest id", as open_clip does by itself.
    is_highest = end in (2, text["vocab_size"] - 1)
    # CLIPModel has no bias; an export of ours leaves it in the config.
    bias = config.get("logit_bias")
    return {
        "embed_dim": config.get("projection_dim", 512),
        **({} if bias is None else {"init_logit_bias": float(bias)}),
        "quick_gelu": quick == {True},
        "vision_cfg": {
            "image_size": image.get("image_size", 224),
            "patch_size": image.get("patch_size", 32),
            "head_width": image["hidden_size"] // image["num_attention_heads"],
            **_sizes(image, path),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "hf_tokenizer_name": str(path.parent),
            "heads": text["num_attention_heads"],
            **({} if is_highest else {"pool_type": "eos", "eos_id": end}),
            **_sizes(text, path),
        },
    }


def _sizes(tower: dict[str, Any], path: Path) -> dict[str, Any]:
    """Depth, width, activation and norm, which all towers state alike."""
    activation = tower["hidden_act"]
    if activation != "quick_gelu" and activation not in _ACTIVATIONS:
        known = ", ".join((*_ACTIVATIONS, "quick_gelu"))
        raise UserError(f"hidden_act ({activation}) of {path} must be one of {known}")
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    ratio = inner / width
    return {
        "width": width,
        "layers": tower["num_hidden_layers"],
        # Towers round width * ratio down; the half keeps a product such as 4303.99 above.
        "mlp_ratio": ratio if int(width * ratio) == inner else (inner + 0.5) / width,
        "norm_kwargs": {"eps": tower["layer_norm_eps"]},
        **_ACTIVATIONS.get(activation, {}),
    }


def _processor(folder: Path) -> dict[str, Any]:
    """What a folder says of pictures."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        path = folder / "processor_config.json"
    said = _read(path) if path.is_file() else {}
    found: dict[str, Any] = said.get("image_processor", said)
    return found


def _cuts_patches(said: dict[str, Any]) -> bool:
    kind = said.get("image_processor_type") or said.get("feature_extractor_type") or ""
    return MAX_NUM_PATCHES in said or str(kind).startswith("Siglip2")


def _preprocessing(said: dict[str, Any], architecture: dict[str, Any]) -> dict[str, Any]:
    is_clip = not architecture.get("custom_text")
    size = said.get("size")
    is_shortest = "shortest_edge" in size if isinstance(size, dict) else is_clip
    overlay: dict[str, Any] = {
        "interpolation": _RESAMPLING.get(said.get("resample", 3 if is_clip else 2), "bicubic"),
        "resize_mode": "shortest" if is_shortest else "squash",
    }
    if not is_clip:
        overlay |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if said.get(theirs):
            overlay[ours] = tuple(said[theirs])
    overlay |= {
        key: said[key] for key in (*PicturePolicy().of_model, MAX_NUM_PATCHES) if key in said
    }
    return complete_preprocessing(overlay)


def complete_preprocessing(stated: dict[str, Any]) -> dict[str, Any]:
    """Fill in open_clip's defaults, and keep what an export of ours adds to its names."""
    own = (*PicturePolicy().of_model, MAX_NUM_PATCHES)
    added = {key: stated[key] for key in own if key in stated}
    return {**merge_preprocess_dict(PreprocessCfg(), stated), **added}
