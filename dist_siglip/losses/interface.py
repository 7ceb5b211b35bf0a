"""Call of a loss module: the arguments it takes, and the value it returns with its statistics."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from dist_siglip.losses.kernels.pair_terms import Duplicates
from dist_siglip.losses.nonfinite import Nonfinite


class LossOutput(NamedTuple):
    """A loss and what was counted on the way.

    Attributes:
        loss: (), this rank's share, with its graph.
        duplicate_pairs: (), int64, on the features' device: pairs of an image of this rank and a
            text of any other pair that share an id. The sum over ranks counts every two
            duplicates twice, once from each side. None without ids.
    """

    loss: Tensor
    duplicate_pairs: Tensor | None = None


@runtime_checkable
class _SaysCaptionIds(Protocol):
    uses_caption_ids: bool


@runtime_checkable
class _SaysPictureIds(Protocol):
    uses_picture_ids: bool


@runtime_checkable
class _SaysLogitBias(Protocol):
    uses_logit_bias: bool


@runtime_checkable
class _SaysDuplicates(Protocol):
    duplicates: Duplicates | None


def uses_caption_ids(loss: nn.Module) -> bool:
    """Whether the module takes ``caption_ids``: if it says so by ``uses_caption_ids``."""
    return isinstance(loss, _SaysCaptionIds) and bool(loss.uses_caption_ids)


def uses_picture_ids(loss: nn.Module) -> bool:
    """Whether the module takes ``picture_ids``: if it says so by ``uses_picture_ids``."""
    return isinstance(loss, _SaysPictureIds) and bool(loss.uses_picture_ids)


def uses_logit_bias(loss: nn.Module) -> bool:
    """Whether the module depends on the bias: unless its ``uses_logit_bias`` is False."""
    return not isinstance(loss, _SaysLogitBias) or bool(loss.uses_logit_bias)


def duplicates_of(loss: nn.Module) -> Duplicates | None:
    """Return what the module makes of duplicates, by its ``duplicates``; None if it has none."""
    return loss.duplicates if isinstance(loss, _SaysDuplicates) else None


def ids_for(
    loss: nn.Module, caption_ids: Tensor | None, picture_ids: Tensor | None
) -> dict[str, Tensor]:
    """Choose the ids that a module takes, as keywords of its call.

    Args:
        loss: a module without ``uses_caption_ids`` and ``uses_picture_ids`` takes none.
        caption_ids: (B,); None if they are not known.
        picture_ids: likewise.
    """
    ids = {}
    if caption_ids is not None and uses_caption_ids(loss):
        ids["caption_ids"] = caption_ids
    if picture_ids is not None and uses_picture_ids(loss):
        ids["picture_ids"] = picture_ids
    return ids


def call_loss(
    loss: nn.Module,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    ids: Mapping[str, Tensor],
    nonfinite: Nonfinite,
) -> LossOutput:
    """Call a loss module; ``nonfinite`` and statistics where ``forward`` has these parameters.

    Args:
        loss: returns a tensor, or a ``LossOutput`` (``return_statistics=True`` asks for it).
        image_features: (B, D).
        text_features: (B, D).
        logit_scale: one element.
        logit_bias: one element.
        ids: of ``ids_for``.
        nonfinite: what to do about values that are not finite.
    """
    options: dict[str, Any] = dict(ids)
    taken = signature(loss.forward).parameters
    if "nonfinite" in taken:
        options["nonfinite"] = nonfinite
    if "return_statistics" in taken:
        options["return_statistics"] = True
    result = loss(image_features, text_features, logit_scale, logit_bias, **options)
    return result if isinstance(result, LossOutput) else LossOutput(result)
