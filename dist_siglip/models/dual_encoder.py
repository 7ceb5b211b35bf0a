"""Two towers with L2-normalised features; no loss, no ranks, no logit scale.

The towers are those of an open_clip network. Its own logit scale and bias are taken out: they
belong to the loss, and a parameter without a gradient would stop DDP.

Micro-batches: a contrastive loss needs the features of the whole batch at once, but not the
activations that made them. Each tower encodes one micro-batch after the other and keeps nothing of
it but its features; backward encodes one micro-batch at a time again, with the random numbers and
the autocast of the first time. Parameters collect the sum over micro-batches before anything else
(DDP's exchange, clipping) sees it. Cost: one more forward pass. Memory: activations of one
micro-batch of one tower, features of all.

Sharded towers would keep the gradients of all parameters whole until the last micro-batch. For them
``CachedEncoding`` goes backward through one micro-batch after the other, each reduced to shards
before the next.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from dist_siglip.data.samples.batch import ImageNormalizer
from dist_siglip.data.samples.patches import PatchBudget
from dist_siglip.errors import UserError
from dist_siglip.models.image_tokens import (
    patch_size_of,
    pool_and_tokens,
    pool_view,
    project_tokens,
    require_image_tokens,
)


class TokenShape(NamedTuple):
    """Tokens of one tower: T of them, C numbers each."""

    num_tokens: int
    width: int


class PatchTokens(NamedTuple):
    """Patches of B pictures, T of each, row by row.

    Attributes:
        tokens: (B, T, C) behind the last norm of the tower, without class and register tokens.
        features: (B, T, D) float32 of length 1, comparable with those of texts.
        patch_size: (height, width) in pixels; what is left of a picture at the right and below
            belongs to no patch. Of packed patches those that ``patch_mask`` calls padding have
            tokens without meaning.
    """

    tokens: Tensor
    features: Tensor
    patch_size: tuple[int, int]


class DualEncoder(nn.Module):
    """The image and the text tower of an open_clip network.

    ``state_dict()`` holds open_clip's names under the prefix ``clip.``.

    Args:
        clip: ``open_clip.CLIP`` or ``open_clip.CustomTextCLIP``. It is taken over: its
            ``logit_scale`` and ``logit_bias`` become None.
        normalizer: for pixels that come as bytes; None takes normalised ones alone.
    """

    def __init__(self, clip: nn.Module, normalizer: ImageNormalizer | None = None) -> None:
        super().__init__()
        for parameter in ("logit_scale", "logit_bias"):
            setattr(clip, parameter, None)
        self.clip: Any = clip
        self.normalizer = normalizer
        self._kept_in_evaluation: tuple[nn.Module, ...] = ()
        self._pool_and_tokens: Callable[[Any, Tensor], tuple[Tensor, Tensor]] = pool_and_tokens
        self._pool_view: Callable[..., tuple[Tensor, Tensor]] = pool_view

    @property
    def is_kept_in_evaluation(self) -> bool:
        """Whether any part stays in evaluation mode."""
        return bool(self._kept_in_evaluation)

    def keep_in_evaluation(self, modules: Iterable[nn.Module]) -> None:
        """Keep parts without gradients as an evaluation has them, whatever ``train`` says."""
        self._kept_in_evaluation = tuple(modules)
        self.train(self.training)

    def train(self, mode: bool = True) -> "DualEncoder":
        """Switch to training or evaluation, but for what is kept in evaluation."""
        super().train(mode)
        for module in self._kept_in_evaluation:
            module.eval()
        return self

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) pixels, normalised or uint8, to (B, D) fp32 features of length 1.

        A NaFlex tower takes packed patches as well, see ``data.samples.patches``.
        """
        return unit_rows(self.clip.encode_image(self.pixels(images)))

    def encode_image_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels, in one pass, to the features of ``encode_image`` and to patch tokens.

        The features are those of ``encode_image`` to the last bit.

        Args:
            images: as ``encode_image`` takes them.

        Returns:
            (B, D) fp32 features of length 1; (B, T, C) tokens behind the last norm of the tower,
            without class and register tokens, as long as T patches are not dropped.

        Raises:
            UserError: as ``require_image_tokens``.
        """
        require_image_tokens(self.clip.visual)
        pooled, tokens = self._pool_and_tokens(self.clip.visual, self.pixels(images))
        return unit_rows(pooled), tokens

    def encode_patches(self, images: Tensor) -> PatchTokens:
        """Encode pixels to patch tokens, and each of these to a feature as the picture has one.

        The feature of a patch is what the pooling and the projection of the tower make of its token
        alone: with attention pooling (SigLIP) that of a picture of this one token, with a class
        token (CLIP) the projection of the patch in its place.

        Args:
            images: as ``encode_image`` takes them.

        Raises:
            UserError: as ``require_image_tokens``.
        """
        visual = self.clip.visual
        require_image_tokens(visual)
        _, tokens = self._pool_and_tokens(visual, self.pixels(images))
        return PatchTokens(tokens, unit_rows(project_tokens(visual, tokens)), patch_size_of(visual))

    def encode_view(
        self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode pictures of any size, perhaps with hidden patches, before any projection.

        Args:
            images: (B, 3, h, w), as ``encode_image`` takes them; patches divide both sides, and
                positions are resampled to them.
            mask: (B, T) bool; True where ``mask_token`` stands in for what a patch embeds to.
            mask_token: (C,).

        Returns:
            (B, C) pooled vectors; (B, T, C) tokens as of ``encode_image_tokens``.
        """
        return self._pool_view(self.clip.visual, self.pixels(images), mask, mask_token)

    @torch.no_grad()
    def image_token_shape(self, image_size: int | tuple[int, int]) -> TokenShape:
        """Find the tokens of ``encode_image_tokens``, by an empty picture; needs no values.

        Raises:
            UserError: as ``require_image_tokens``.
        """
        visual = self.clip.visual
        require_image_tokens(visual)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        empty = next(visual.parameters()).new_zeros(1, 3, height, width)
        with evaluation_mode(visual):
            _, tokens = pool_and_tokens(visual, empty)
        return TokenShape(*tokens.shape[1:])

    def pixels(self, images: Tensor) -> Tensor:
        """Bring (B, 3, H, W) pixels to the precision of the image tower, normalised if uint8.

        Raises:
            UserError: for uint8 without a normalizer.
        """
        dtype = next(self.clip.visual.parameters()).dtype
        if images.is_floating_point():
            return images.to(dtype)
        if self.normalizer is None:
            raise UserError(
                f"images ({images.dtype}) must be normalised floats; give DualEncoder a normalizer "
                "to pass pixels as they are"
            )
        if torch.is_autocast_enabled(images.device.type):
            dtype = torch.get_autocast_dtype(images.device.type)
        return self.normalizer.pixels(images, dtype)

    def encode_text(self, texts: Tensor) -> Tensor:
        """Encode (B, L) token ids to (B, D) fp32 features of length 1."""
        return unit_rows(self.clip.encode_text(texts))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Encode both: image features (B, D) and text features (B, D)."""
        return self.encode_image(images), self.encode_text(texts)


def unit_rows(features: Tensor) -> Tensor:
    """Divide each row of (B, D) by its length, in fp32 or better, whatever autocast says.

    A half-precision length would be off by up to 0.4 %, which multiplies every logit.

    Returns:
        (B, D), float64 for float64 input, else float32; a row of zeros stays zero.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
        tensor([[0.6000, 0.8000]])
    """
    with torch.autocast(features.device.type, enabled=False):
        precise = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(precise, dim=-1)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and afterwards back to what each layer had."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def compile_towers(encoder: DualEncoder, *, backend: str = "inductor") -> None:
    """Let ``torch.compile`` translate both towers, in place, at their first use.

    The names in ``state_dict()`` do not change. Of ``open_clip.CLIP``, whose text tower is no
    module of its own, the transformer is compiled.

    Args:
        encoder: changed in place.
        backend: of ``torch.compile``.
    """
    clip = encoder.clip
    for tower in (clip.visual, clip.text if hasattr(clip, "text") else clip.transformer):
        tower.compile(backend=backend)
    encoder._pool_and_tokens = torch.compile(pool_and_tokens, backend=backend)
    # A graph for each size of views, with and without hidden patches.
    encoder._pool_view = torch.compile(pool_view, backend=backend, dynamic=False)


def encode_in_micro_batches(
    encoder: DualEncoder, images: Tensor, texts: Tensor, micro_batch_size: int
) -> tuple[Tensor, Tensor]:
    """Encode like ``encoder(images, texts)``, with the activations of one micro-batch at a time.

    Features and gradients are those of the whole batch, up to the rounding of sums. Dropout and
    patch dropout draw micro-batch by micro-batch; the gradient belongs to the drawn values.

    Args:
        encoder: towers without BatchNorm, see ``refuse_batch_norm``.
        images: (B, 3, H, W), pixels as ``encode_image`` takes them.
        texts: (B, L), token ids.
        micro_batch_size: rows of a tower encoded together, at least 1.

    Returns:
        Image features (B, D) and text features (B, D), L2-normalised.
    """
    return (
        encode_tower_in_micro_batches(encoder.encode_image, images, micro_batch_size),
        encode_tower_in_micro_batches(encoder.encode_text, texts, micro_batch_size),
    )


def encode_tower_in_micro_batches(
    encode: Callable[[Tensor], Tensor], inputs: Tensor, micro_batch_size: int
) -> Tensor:
    """Encode one side; see ``encode_in_micro_batches``.

    Args:
        encode: ``encode_image`` or ``encode_text`` of an encoder.
        inputs: B rows of what it takes.
        micro_batch_size: rows encoded together, at least 1.
    """
    parts = inputs.split(micro_batch_size)
    if len(parts) <= 1 or not torch.is_grad_enabled():
        # A single part would be encoded again for nothing.
        return torch.cat([encode(part) for part in parts])
    return torch.cat(
        [checkpoint(encode, p, use_reentrant=False, preserve_rng_state=True) for p in parts]
    )


def check_micro_batch(
    patches: PatchBudget | None, micro_batch_patches: int | None, micro_batch_size: int | None
) -> None:
    """Check a budget of patches that are encoded together.

    Raises:
        UserError: if it is below one, not of a NaFlex tower, or stands beside a number of rows.
    """
    if micro_batch_patches is None:
        return
    name = f"micro_batch_patches ({micro_batch_patches})"
    if patches is None:
        raise UserError(
            f"{name} is of pictures of any shape (NaFlex), and the image tower sees one size; set "
            "micro_batch_size, or make it one of such pictures by num_patches"
        )
    if micro_batch_size is not None:
        raise UserError(
            f"{name} and micro_batch_size ({micro_batch_size}): set one of them to null"
        )
    if micro_batch_patches < 1:
        raise UserError(f"{name} must be at least 1, and at least the longest sequence length")


class CachedEncoding:
    """Features of one side now, the backward pass of its tower later, by micro-batches.

    Every micro-batch goes backward by itself, from the gradient of its features, so that whatever
    happens at the end of a backward pass (FSDP2 reduces and frees gradients) happens after each.
    Encoding again has the random numbers and the autocast of the first time.

    Args:
        encode: ``encode_image`` or ``encode_text`` of an encoder of which something trains; or what
            gives its features and then sums over the rows, of one shape for any rows.
        inputs: B rows of each of its arguments.
        micro_batch_size: rows encoded together, at least 1.

    Attributes:
        features: (B, D), a leaf that the loss is computed from.
        sums: over all rows; likewise leaves, unless they are integers.

    Source:
        Gao et al. 2021, arXiv:2101.06983, section 3.2.
    """

    def __init__(
        self,
        encode: Callable[..., Tensor | tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
        micro_batch_size: int,
    ) -> None:
        self._encode = encode
        self._parts = list(zip(*(each.split(micro_batch_size) for each in inputs), strict=True))
        device_type = inputs[0].device.type
        self._autocast = torch.autocast(
            device_type,
            dtype=torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
        )
        self._random_states = []
        found = []
        with torch.no_grad():
            for part in self._parts:
                self._random_states.append(_RandomState(part[0]))
                found.append(_as_tuple(encode(*part)))
        features, *sums = zip(*found, strict=True)
        self.features = torch.cat(features).requires_grad_()
        self.sums = [torch.stack(each).sum(dim=0) for each in sums]
        for each in self.sums:
            each.requires_grad_(each.is_floating_point())

    def backward(self, begin: Callable[[bool], None]) -> None:
        """Add the gradients of the tower to its parameters, once those of the features are there.

        Args:
            begin: called before each micro-batch with whether it is the last one.
        """
        assert self.features.grad is not None
        gradients = self.features.grad.split(len(self._parts[0][0]))
        random_state = _RandomState(self.features)
        for number, (part, gradient) in enumerate(zip(self._parts, gradients, strict=True), 1):
            begin(number == len(self._parts))
            self._random_states[number - 1].restore()
            with self._autocast:
                features, *sums = _as_tuple(self._encode(*part))
            outputs, slopes = [features], [gradient]
            for each, leaf in zip(sums, self.sums, strict=True):
                if leaf.grad is not None:
                    outputs.append(each)
                    slopes.append(leaf.grad)
            torch.autograd.backward(outputs, slopes)
        random_state.restore()


def _as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


class _RandomState:
    """State of the generators of the host and of the device of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._of_host = torch.get_rng_state()
        self._of_devices = get_device_states(tensor)

    def restore(self) -> None:
        torch.set_rng_state(self._of_host)
        set_device_states(*self._of_devices)


def refuse_batch_norm(encoder: nn.Module, micro_batch_size: int) -> None:
    """Refuse towers whose features of one row depend on the other rows of its micro-batch.

    BatchNorm would normalise by the micro-batch, which changes features and gradients, and would
    count each micro-batch twice in its running statistics, once for the second encoding.

    Raises:
        UserError: if micro_batch_size < 1, or a layer is a BatchNorm; names the first.
    """
    if micro_batch_size < 1:
        raise UserError(
            f"micro_batch_size ({micro_batch_size}) must be at least 1, or null for the whole "
            "local batch at once"
        )
    found = [name for name, layer in encoder.named_modules() if isinstance(layer, _BatchNorm)]
    if found:
        raise UserError(
            f"micro_batch_size ({micro_batch_size}) would change what this model computes: it has "
            f"BatchNorm ({found[0]}, {len(found)} in all), whose statistics are those of a whole "
            "batch; set it to null, or choose a model without BatchNorm, such as a ViT"
        )
