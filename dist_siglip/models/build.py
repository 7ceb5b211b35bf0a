"""A dual encoder and everything a run must know about it, built from two names.

Scale and bias start at 10 and -10 (Zhai et al. 2023, section 3.2) unless weights were loaded; then
they start where those weights ended. open_clip's own factory would start a SigLIP architecture at
14.3. Fingerprints are equal for towers that give equal features.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from open_clip import set_model_preprocess_cfg
from torch import Tensor, nn

from dist_siglip.data.samples.batch import ImageNormalizer
from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.data.samples.patches import PatchBudget
from dist_siglip.data.samples.picture_policy import BEFORE_THE_SETTINGS, PicturePolicy
from dist_siglip.errors import UserError
from dist_siglip.losses.logit_scale import START_BIAS, START_SCALE
from dist_siglip.models.architecture import (
    DEFAULT_CONTEXT_LENGTH,
    check_architecture,
    instantiate,
    is_resnet,
    override_architecture,
)
from dist_siglip.models.dual_encoder import DualEncoder
from dist_siglip.models.interop.transformers_format import MAX_NUM_PATCHES
from dist_siglip.models.naflex import budget_of
from dist_siglip.models.text_tower import (
    ModelTokenizer,
    check_tokens,
    describe_config,
    load_text_tower,
    recompute_blocks,
    wants_weights,
)
from dist_siglip.models.weight_source import ModelSource, resolve_model
from dist_siglip.models.weights import NETWORK_PREFIX, Weights, load_towers, read_weights
from dist_siglip.models.weights_file import refuse_not_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A dual encoder, its preprocessing, and where its logits start.

    Args:
        encoder: the towers, on the CPU, fp32, in training mode.
        embed_dim: D, the width of both features.
        image_size: pixels, one number for a square, else (height, width).
        mean: subtracted from pixels in [0, 1], per channel.
        std: divides what is left, per channel.
        interpolation: "bicubic", "bilinear" or "random".
        resize_mode: "shortest" (then centre crop), "longest" (then pad) or "squash".
        context_length: L, tokens in a text row.
        tokenizer: turns B captions into (B, L) int64; picklable.
        start_scale: first logit scale (the multiplier, not its logarithm).
        start_bias: first logit bias (added to the logits).
        random_parameters: parameters of the encoder, by name, that no weights were found for and
            that start at random.
        architecture: the open_clip model config the towers were built from, overrides included.
        trained_global_batch: pairs of the global batch the weights were trained with, or None if
            they do not say.
        trained_steps: of the run whose checkpoint the weights are, or None if they do not say.
        pictures: what decides the pixels of an encoded picture.
        prefix_dims: prefixes of the features that training made useful alone; () if it did not.
        own_scale: logit scale that the weights brought; None if they had none.
        own_bias: likewise.
        awaits_weights: nothing was read, and values are those of another process yet to come; start
            values and the trained global batch are not known.
        patches: what an image tower of pictures of any shape takes (NaFlex), whose ``image_size``
            is that of its grid of positions; None for pictures of ``image_size``.
    """

    encoder: DualEncoder
    embed_dim: int
    image_size: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    context_length: int
    tokenizer: Callable[[list[str]], Tensor]
    start_scale: float
    start_bias: float
    random_parameters: frozenset[str]
    architecture: dict[str, Any]
    trained_global_batch: int | None = None
    trained_steps: int | None = None
    prefix_dims: tuple[int, ...] = ()
    pictures: PicturePolicy = field(default_factory=PicturePolicy)
    awaits_weights: bool = False
    own_scale: float | None = None
    own_bias: float | None = None
    patches: PatchBudget | None = None

    @property
    def weights_loaded(self) -> bool:
        """Whether both towers start from weights, as a whole."""
        return not self.random_parameters


def build_dual_encoder(
    model: str,
    pretrained: str | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
    kept_positions: int = 0,
    weights_average: bool | None = None,
    patch_dropout: float | None = None,
    num_patches: int | None = None,
    gradient_checkpointing: bool = False,
    check_tokenizer: bool = True,
    with_weights: bool = True,
    warns_of_logits: bool = True,
) -> BuiltModel:
    """Build a dual encoder from an open_clip architecture, with or without weights.

    Under ``torch.device("meta")`` no weights are read and none have values: another process sends
    them. A tower that cannot be built there is built on the CPU, at random.

    Args:
        model: built-in open_clip name, path of a ``.json`` config, ``local-dir:PATH`` or
            ``hf-hub:ORG/REPO``; the last two bring their weights along.
        pretrained: an open_clip tag of the model, a local ``.safetensors``, ``.pt``, ``.bin`` or
            ``.ckpt`` file, or the folder of a run, whose newest sound checkpoint counts; None
            starts from random weights (seed torch before the call), but for towers whose own
            weights a config asks for: a text tower of Hugging Face unless it says
            ``hf_model_pretrained: false``, one of timm if it says ``timm_model_pretrained: true``.
        image_size: replaces the model's; position embeddings are resampled. None keeps it.
        context_length: replaces the model's, likewise.
        kept_positions: first text positions that stay as they are where ``context_length``
            stretches the others; 0 stretches all.
        weights_average: of weights that hold an average beside them: True takes the average, False
            the weights, None what the file puts first.
        patch_dropout: share of image patches left out in training, in [0, 1). None keeps the
            model's.
        num_patches: of a picture where a batch does not say otherwise, for an image tower that
            takes pictures of any shape (NaFlex); a ViT of timm with attention pooling becomes one.
            None keeps what the model is; ``image_size`` makes it one of pictures of that size.
        gradient_checkpointing: recompute the blocks of both towers in backward to save memory.
        check_tokenizer: load the tokenizer now, so that a missing one is noticed here rather
            than by a loader process.
        with_weights: False leaves the weights that the names stand for unread and unfetched.
        warns_of_logits: whether a training is to start from scale and bias of the weights, so that
            the log says what they lack.

    Raises:
        UserError: If a name, tag or file is unknown or missing, the weights do not fit the
            model, or the tokenizer cannot be loaded.
    """
    source = resolve_model(model, pretrained, with_weights=with_weights)
    _check_options(kept_positions, weights_average, needs_weights=source.weights is None)
    check_architecture(source.architecture, model)
    architecture = override_architecture(
        source.architecture,
        image_size=image_size,
        context_length=context_length,
        patch_dropout=patch_dropout,
        num_patches=num_patches,
        name=model,
    )
    text_config = architecture["text_cfg"]
    tokenizer = _tokenizer_of(model, text_config, source)
    if check_tokenizer:
        tokenizer.load()

    takes_towers = with_weights and source.weights is None
    takes_trunk = takes_towers and bool(architecture["vision_cfg"].get("timm_model_pretrained"))
    takes_text = takes_towers and wants_weights(text_config)
    awaits_weights = torch.get_default_device().type == "meta"
    network: Any = (
        _instantiate_without_values(architecture, model)
        if awaits_weights
        else instantiate(architecture, name=model, with_image_weights=takes_trunk)
    )
    if text_config.get("hf_model_name") and check_tokenizer:
        check_tokens(network, tokenizer.loaded(), tokenizer.context_length, model)
    start_scale, start_bias = START_SCALE, START_BIAS
    own_scale: float | None = None
    own_bias: float | None = None
    trained_global_batch: int | None = None
    loaded: list[str] = []
    if source.weights is not None:
        if not awaits_weights:
            weights = read_weights(source.weights, average=weights_average)
            load_towers(network, weights, source.weights, kept_positions=kept_positions)
            start_scale, start_bias = _start_values(
                weights, source.weights, source.logit_bias, warns=warns_of_logits
            )
            trained_global_batch = weights.global_batch_size
            own_scale = weights.logit_scale
            own_bias = source.logit_bias if weights.logit_bias is None else weights.logit_bias
        loaded.append("")
    if takes_trunk:
        if not awaits_weights:
            refuse_not_finite(network.visual.trunk.state_dict(), f"timm's weights of {model}")
        loaded.append("visual.trunk.")
    if takes_text:
        if not awaits_weights:
            load_text_tower(network, text_config, model)
        loaded.append("text.transformer.")
    if gradient_checkpointing:
        if is_resnet(architecture):
            logger.warning("gradient_checkpointing has no effect on the ResNet tower of %s", model)
        if text_config.get("hf_model_name"):
            network.visual.set_grad_checkpointing(True)
            recompute_blocks(network.text)
        else:
            network.set_grad_checkpointing(True)

    preprocessing = {**source.preprocessing, "size": network.visual.image_size}
    said: int | None = preprocessing.pop(MAX_NUM_PATCHES, None)
    patches = budget_of(network, said if num_patches is None else num_patches)
    if patches is not None:
        preprocessing |= {"interpolation": "bilinear", "resize_mode": "squash"}
    set_model_preprocess_cfg(network, preprocessing)
    mean, std = (_per_channel(preprocessing[name]) for name in ("mean", "std"))
    encoder = DualEncoder(network, ImageNormalizer(mean, std))
    names = [name for name, _ in encoder.named_parameters()]
    given = tuple(NETWORK_PREFIX + prefix for prefix in loaded)
    return BuiltModel(
        encoder=encoder,
        embed_dim=architecture["embed_dim"],
        image_size=_square_as_int(network.visual.image_size),
        mean=mean,
        std=std,
        interpolation=preprocessing["interpolation"],
        resize_mode=preprocessing["resize_mode"],
        context_length=tokenizer.context_length,
        tokenizer=tokenizer,
        start_scale=start_scale,
        start_bias=start_bias,
        random_parameters=frozenset(name for name in names if not name.startswith(given)),
        architecture=architecture,
        trained_global_batch=trained_global_batch,
        pictures=PicturePolicy.of_preprocessing(source.preprocessing, model),
        awaits_weights=awaits_weights,
        own_scale=own_scale,
        own_bias=own_bias,
        patches=patches,
    )


def with_num_patches(built: BuiltModel, num_patches: int | None) -> BuiltModel:
    """Let a model see pictures with another budget of patches; None changes nothing.

    Raises:
        UserError: if its pictures have a fixed size.
    """
    if num_patches is None:
        return built
    if built.patches is None:
        raise UserError(
            f"num_patches ({num_patches}) is of pictures of any shape (NaFlex), and this model "
            f"sees one size, {built.image_size}; leave it out"
        )
    return replace(built, patches=built.patches._replace(num_patches=num_patches).check())


def _instantiate_without_values(architecture: dict[str, Any], name: str) -> nn.Module:
    """Build a network on torch's meta device; on the CPU, if it reads values while it is built."""
    try:
        network = instantiate(architecture, name=name)
        values = (each for module in network.modules() for each in vars(module).values())
        if not any(isinstance(each, Tensor) for each in values):
            return network
    except UserError:
        pass  # told of the one on the CPU, if it is one
    with torch.device("cpu"):
        return instantiate(architecture, name=name)


def load_tokenizer(model: str, *, context_length: int | None = None) -> ModelTokenizer:
    """Load the tokenizer of a model alone, without its towers.

    Args:
        model: as ``build_dual_encoder``.
        context_length: replaces the model's. None keeps it.

    Raises:
        UserError: as ``build_dual_encoder``.
    """
    source = resolve_model(model, None, with_weights=False)
    architecture = override_architecture(source.architecture, context_length=context_length)
    tokenizer = _tokenizer_of(model, architecture["text_cfg"], source)
    tokenizer.load()
    return tokenizer


def _tokenizer_of(model: str, text_config: dict[str, Any], source: ModelSource) -> ModelTokenizer:
    return ModelTokenizer(
        name=model,
        text_config=text_config,
        context_length=text_config.get("context_length", DEFAULT_CONTEXT_LENGTH),
        folder=source.tokenizer_folder,
    )


def _check_options(
    kept_positions: int, weights_average: bool | None, *, needs_weights: bool
) -> None:
    """Refuse settings of weights that are out of range, or without weights."""
    if kept_positions < 0:
        raise UserError(f"kept_positions ({kept_positions}) must be >= 0; Long-CLIP keeps 20")
    for name, value, is_off in (
        ("kept_positions", kept_positions, kept_positions == 0),
        ("weights_average", weights_average, weights_average is None),
    ):
        if needs_weights and not is_off:
            raise UserError(f"{name} ({value}) is of weights, and there are none; name pretrained")


def _start_values(
    weights: Weights, path: Path, stated_bias: float | None, *, warns: bool
) -> tuple[float, float]:
    """The file's own scale and bias; where it lacks one, ours, with a warning."""
    scale = weights.logit_scale
    bias = stated_bias if weights.logit_bias is None else weights.logit_bias
    if bias is not None and not math.isfinite(bias):
        raise UserError(f"logit_bias ({bias}) of the model of {path} must be a number; correct it")
    level = logging.WARNING if warns else logging.DEBUG
    if scale is None:
        logger.log(level, "weights %s have no logit scale; starting at %g", path, START_SCALE)
        scale = START_SCALE
    if bias is None:
        logger.log(
            level,
            "weights %s have no logit bias (trained with a softmax loss?): the sigmoid loss starts "
            "at scale %.4g and bias %g, may be very high unless calibrated; run dist-siglip "
            "calibrate, or set model.calibration_pairs",
            path,
            scale,
            START_BIAS,
        )
        bias = START_BIAS
    return scale, bias


def _per_channel(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _square_as_int(size: int | tuple[int, int]) -> int | tuple[int, int]:
    """Write (s, s) as s.

    Example:
        >>> _square_as_int((224, 224)), _square_as_int((224, 448)), _square_as_int(64)
        (224, (224, 448), 64)
    """
    if isinstance(size, int):
        return size
    height, width = size
    return height if height == width else (height, width)


# Of training only, or where a file lies.
_IRRELEVANT = frozenset(
    {
        "patch_dropout",
        "timm_model_pretrained",
        "hf_tokenizer_name",
        "hf_model_name",
        "hf_model_pretrained",
    }
)


def tower_fingerprint(built: BuiltModel, tower: Tower) -> str:
    """Hash the weights of one tower and everything else that decides its features.

    Towers with the same digest give the same features, but for rounding. Half precision, an
    adapter or a changed weight gives another one.
    """
    digest = hashlib.blake2b(digest_size=8)
    if tower == "image":
        architecture = built.architecture["vision_cfg"]
        inputs: list[Any] = [
            built.image_size,
            built.mean,
            built.std,
            built.interpolation,
            built.resize_mode,
        ]
        if built.patches is not None:
            inputs.append(list(built.patches))
        policy = built.pictures.of_model
        # Digests of before there was a choice stay valid.
        inputs += [[key, policy[key]] for key in policy if policy[key] != BEFORE_THE_SETTINGS[key]]
        if built.pictures.intensity_window is not None:
            inputs.append(["intensity_window", *built.pictures.intensity_window])
    else:
        architecture = built.architecture["text_cfg"]
        inputs = [built.context_length]
        if architecture.get("hf_model_name"):
            inputs.append(describe_config(built.encoder.clip.text))
    architecture = {key: architecture[key] for key in architecture if key not in _IRRELEVANT}
    settings = [architecture, built.embed_dim, built.architecture.get("quick_gelu"), inputs]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(built.encoder.state_dict().items()):
        if name.startswith("clip.visual.") != (tower == "image"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
