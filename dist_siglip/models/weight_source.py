"""The source of a model's architecture, preprocessing, weights and tokenizer.

    ViT-B-16-SigLIP            a model built into open_clip; weights by tag or by file
    configs/tiny.json          an open_clip model config in a file; weights by file
    local-dir:exports/mine     a folder with open_clip_config.json and its weights
    hf-hub:timm/ViT-B-16-SigLIP    the same folder on the Hugging Face hub

A folder may also be one of transformers (``config.json``). Nothing is registered in open_clip, so
two files of the same name never meet.
"""

import difflib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from dist_siglip.errors import UserError
from dist_siglip.models.architecture import refuse_captioning
from dist_siglip.models.interop.transformers_format import CONFIG_NAME as HUGGING_FACE_CONFIG
from dist_siglip.models.interop.transformers_format import (
    complete_preprocessing,
    fetch_folder,
    read_folder,
    weights_in_folder,
)
from dist_siglip.models.text_tower import is_whole_tokenizer, with_places
from dist_siglip.runs import RunFolder, newest_sound_checkpoint
from dist_siglip.system.regular_file import read_json

logger = logging.getLogger(__name__)

LOCAL_DIR = "local-dir:"
HF_HUB = "hf-hub:"
CONFIG_NAME = "open_clip_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# open_clip's order of preference inside a folder.
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from.

    Args:
        name: the value of ``model``, as the user wrote it.
        architecture: open_clip's model config: embed_dim, vision_cfg, text_cfg, ...; a copy.
        preprocessing: open_clip's preprocessing config: mean, std, interpolation, resize_mode, ...
        weights: file to load, or None to start from random weights.
        tokenizer_folder: folder that must hold the Hugging Face tokenizer, if the model needs
            one and came from ``local-dir:``; otherwise None.
        logit_bias: bias of weights that have none of their own, if the config names one.
    """

    name: str
    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    weights: Path | None
    tokenizer_folder: Path | None
    logit_bias: float | None = None


def resolve_model(
    model: str, pretrained: str | None = None, *, with_weights: bool = True
) -> ModelSource:
    """Find out what ``model`` and ``pretrained`` mean, and fetch what is not on this machine.

    A built-in model without a tag is preprocessed the way all its published weights agree on
    (SigLIP: mean and std 0.5, squashed), else the way open_clip does by default.

    Args:
        model: built-in name, path of a ``.json`` config, ``local-dir:PATH`` or ``hf-hub:ORG/REPO``.
        pretrained: an open_clip tag of a built-in model, the path of a local weights file, or the
            folder of a run, whose newest sound checkpoint is taken.
            Must be None for ``local-dir:`` and ``hf-hub:``, which bring their own weights.
        with_weights: False neither looks for the weights nor fetches them; ``weights`` is None.

    Raises:
        UserError: If a name, tag or file does not exist or cannot be fetched, if a config cannot
            be read, or if ``pretrained`` is given where the model brings its own weights.
    """
    for schema, resolve in ((LOCAL_DIR, _resolve_folder), (HF_HUB, _resolve_hub)):
        if model.startswith(schema):
            if pretrained is not None:
                raise UserError(
                    f"pretrained ({pretrained}) cannot be combined with model ({model}), which "
                    "brings its own weights; remove one of them"
                )
            return resolve(model, model.removeprefix(schema), with_weights)
    if model.endswith(".json"):
        return _resolve_config_file(model, pretrained if with_weights else None)
    return _resolve_built_in(model, pretrained, with_weights)


def _resolve_built_in(model: str, pretrained: str | None, with_weights: bool) -> ModelSource:
    name = model.replace("/", "-")
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise UserError(_unknown_model(model))
    refuse_captioning(architecture, model)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and open_clip.is_pretrained_cfg(name, pretrained):
        published = open_clip.get_pretrained_cfg(name, pretrained)
        if bool(published.get("quick_gelu")) != bool(architecture.get("quick_gelu")):
            logger.warning(
                "weights %r were trained with another activation than model %s (QuickGELU); "
                "choose the model whose name differs by -quickgelu",
                pretrained,
                name,
            )
        weights = _download_tag(name, pretrained, published) if with_weights else None
        overlay = published
    else:
        is_file = pretrained is not None and with_weights
        weights = _weights_file(str(pretrained), name, tags) if is_file else None
        overlay = _agreed_preprocessing(open_clip.get_pretrained_cfg(name, tag) for tag in tags)
    return ModelSource(
        name=model,
        architecture=architecture,
        preprocessing=merge_preprocess_dict(PreprocessCfg(), overlay),
        weights=weights,
        tokenizer_folder=None,
    )


def _resolve_config_file(model: str, pretrained: str | None) -> ModelSource:
    path = Path(model).expanduser()
    if not path.is_file():
        raise UserError(f"model ({model}) is not a file; give the path of a JSON model config")
    architecture, preprocessing = read_config(path)
    return ModelSource(
        name=model,
        architecture=with_places(architecture, path.parent, is_export=False),
        preprocessing=preprocessing,
        weights=None if pretrained is None else _weights_file(pretrained, model, ()),
        tokenizer_folder=None,
    )


def _resolve_folder(model: str, path: str, with_weights: bool) -> ModelSource:
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        raise UserError(f"model ({model}) names no folder; give local-dir:PATH of an existing one")
    weights: Path | None = None
    logit_bias: float | None = None
    if not (folder / CONFIG_NAME).exists() and (folder / HUGGING_FACE_CONFIG).exists():
        architecture, preprocessing = read_folder(folder)
        if is_whole_tokenizer(folder):  # it cleans captions itself
            architecture["text_cfg"]["tokenizer_kwargs"] = {"clean": "whitespace"}
        if not architecture.get("custom_text"):  # CLIPModel, which has no tensor for it
            logit_bias = architecture.get("init_logit_bias")
        if with_weights:
            weights = weights_in_folder(folder)
    else:
        architecture, preprocessing = read_config(folder / CONFIG_NAME)
        architecture = with_places(architecture, folder, is_export=True)
        if with_weights:
            weights = _weights_in_folder(folder)
    return ModelSource(
        name=model,
        architecture=architecture,
        preprocessing=preprocessing,
        weights=weights,
        tokenizer_folder=folder,
        logit_bias=logit_bias,
    )


def _resolve_hub(model: str, repository: str, with_weights: bool) -> ModelSource:
    if repository.count("/") != 1:
        raise UserError(f"model ({model}) must look like hf-hub:ORGANISATION/REPOSITORY")
    try:
        try:
            config = download_pretrained_from_hf(repository, filename=CONFIG_NAME)
        except FileNotFoundError:  # a repository of transformers has another config
            return _resolve_folder(model, fetch_folder(repository, with_weights), with_weights)
        architecture, preprocessing = read_config(Path(config))
        weights = download_pretrained_from_hf(repository) if with_weights else None
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model ({model}) cannot be fetched ({_one_line(error)}); check the name and the "
            "network, or use local-dir:PATH"
        ) from error
    return ModelSource(
        name=model,
        architecture=with_places(architecture, Path(config).parent, is_export=False),
        preprocessing=preprocessing,
        weights=None if weights is None else Path(weights),
        tokenizer_folder=None,
    )


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read an open_clip model config, bare or inside an ``open_clip_config.json``.

    Returns:
        The architecture and the complete preprocessing (open_clip's defaults filled in).

    Raises:
        UserError: If the file is missing, is not JSON, or lacks embed_dim, vision_cfg or text_cfg.
    """
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"model config {path} does not exist; export the model again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model config {path} cannot be read: {_one_line(error)}") from error
    architecture = config.get("model_cfg", config) if isinstance(config, dict) else None
    needed = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(architecture, dict) or not all(key in architecture for key in needed):
        raise UserError(f"model config {path} must be an object with {', '.join(needed)}")
    refuse_captioning(architecture, str(path))
    preprocessing = config.get("preprocess_cfg") or {}
    for name, least in (("mean", -math.inf), ("std", 0)):
        values = preprocessing.get(name, [1.0] * 3) if isinstance(preprocessing, dict) else None
        if not _are_channels(values, above=least):
            raise UserError(
                f"preprocess_cfg of model config {path} must be an object whose {name} is three "
                f"finite numbers{' above 0' if name == 'std' else ''}; export the model again"
            )
    return architecture, complete_preprocessing(preprocessing)


def _are_channels(values: object, *, above: float) -> bool:
    """Whether values are three finite numbers above a bound, one for each colour."""
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(v, int | float) and above < v < math.inf for v in values)
    )


def _weights_file(pretrained: str, model: str, tags: Iterable[str]) -> Path:
    """The local file ``pretrained`` names; it is known not to be a tag of the model."""
    path = Path(pretrained).expanduser()
    if path.is_file():
        return path
    if (path / "checkpoints").is_dir():
        newest = newest_sound_checkpoint(RunFolder(path))
        if newest is None:
            raise UserError(f"pretrained ({pretrained}) is a run without a checkpoint; train it")
        logger.info("weights are those of %s", newest)
        return newest
    if path.suffix in WEIGHT_SUFFIXES or "/" in pretrained:
        raise UserError(
            f"pretrained ({pretrained}) is not a file, nor the folder of a run; give the path of a "
            "weights file"
        )
    known = ", ".join(tags)
    remedy = f"give one of {known}, or" if known else "the model has no tags; give"
    raise UserError(f"pretrained ({pretrained}) is unknown for model {model}; {remedy} a file path")


def _weights_in_folder(folder: Path) -> Path:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found) or "none"
    raise UserError(
        f"folder {folder} must hold one weights file (found {names}); name it {WEIGHT_NAMES[0]}, "
        f"or give {folder / CONFIG_NAME} as model to start from random weights"
    )


def _download_tag(name: str, tag: str, published: dict[str, Any]) -> Path:
    try:
        return Path(open_clip.download_pretrained(published))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"pretrained ({tag}) of model {name} cannot be fetched ({_one_line(error)}); check the "
            "network, or download the file elsewhere and give its path"
        ) from error


def _agreed_preprocessing(published: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The preprocessing every published set of weights uses, or nothing if they differ."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    settings = [{key: entry[key] for key in keys} for entry in published]
    return settings[0] if settings and all(entry == settings[0] for entry in settings) else {}


def _unknown_model(model: str) -> str:
    names = {name.lower(): name for name in open_clip.list_models()}
    close = difflib.get_close_matches(model.replace("/", "-").lower(), names, n=4, cutoff=0.6)
    if Path(model).expanduser().is_dir():
        remedy = f"to load a folder write local-dir:{model}"
    elif close:
        remedy = f"did you mean {' or '.join(names[name] for name in close)}?"
    else:
        remedy = "give a built-in open_clip name, a .json file, local-dir:PATH or hf-hub:ORG/REPO"
    return f"model ({model}) is unknown; {remedy}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
