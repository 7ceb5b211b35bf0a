"""Arguments and value of a loss: how its module is called, and what is checked before a pass.

One row that is nan or infinite makes the loss and all gradients nan, on every rank. The error
should name the row, and no rank should go on alone and wait for the others. So what a rank finds
goes into the small message with which the ranks agree before each pass (``purpose``), and all
raise together.

On a CPU a call looks at its own features: one pass over them. On a GPU reading a result would make
the host wait, so a ``FiniteCheck`` reads what earlier calls found, once the device has come to it:
the error arrives a step or two late, on all ranks, and names the row of the first bad step. Cost
on a GPU: one pass over the features and a dozen small kernels; no wait.

``nonfinite="propagate"`` looks for nothing: for a training that skips such steps.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from inspect import signature
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from dist_siglip.errors import UserError
from dist_siglip.losses.kernels.pair_terms import Duplicates

Nonfinite = Literal["raise", "propagate"]

# Findings that the device may fall behind by before the host waits for the oldest.
_MOST_PENDING = 8
_NOT_POSITIVE = -2


def find_nonfinite(
    named: Mapping[str, Tensor],
    nonfinite: Nonfinite = "raise",
    check: "FiniteCheck | None" = None,
) -> str:
    """Describe what is not finite in the inputs of a loss; "" if nothing is.

    Args:
        named: rows of features, (B, D), and scalars, ().
        nonfinite: "propagate" looks for nothing; the same on every rank.
        check: remembers earlier calls; None looks at tensors on a CPU only.

    Raises:
        UserError: if ``nonfinite`` is unknown.

    Example:
        >>> find_nonfinite({"text_features": torch.tensor([[1.0], [torch.nan]])})
        'text_features row 1 is not finite'
    """
    if nonfinite not in get_args(Nonfinite):
        raise UserError(
            f"nonfinite ({nonfinite!r}) must be one of {', '.join(get_args(Nonfinite))}"
        )
    if check is not None:
        return check.look(named, nonfinite)
    if nonfinite == "propagate" or any(tensor.device.type != "cpu" for tensor in named.values()):
        return ""
    return _describe(named, _first_bad_rows(named).tolist())


class FiniteCheck:
    """Memory of one loss: what was not finite in its inputs and its value.

    Example:
        >>> check = FiniteCheck()
        >>> check.look({"text_features": torch.tensor([[1.0], [torch.nan]])})
        'text_features row 1 is not finite'
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[tuple[str, ...], Tensor, torch.cuda.Event | None]] = deque()
        self._last_value: Tensor | None = None

    def look(self, named: Mapping[str, Tensor], nonfinite: Nonfinite = "raise") -> str:
        """Return what is not finite: now on a CPU, in earlier calls on a GPU; "" if nothing."""
        if nonfinite == "propagate":
            self._last_value = None
            return ""
        if all(tensor.device.type == "cpu" for tensor in named.values()):
            found = find_nonfinite(named)
            if not found and self._last_value is not None and not self._last_value.isfinite():
                found = f"the loss of the step before was {self._last_value.item()}"
            self._last_value = None
            return found
        if self._last_value is not None:
            named = {**named, "the loss of the step before": self._last_value}
        self._last_value = None
        self._pending.append((tuple(named), *_send_to_host(_first_bad_rows(named))))
        while self._pending:
            names, rows, event = self._pending[0]
            if event is not None and not event.query():
                if len(self._pending) <= _MOST_PENDING:
                    break
                event.synchronize()
            self._pending.popleft()
            found = _describe(names, rows.tolist())
            if found:
                self._pending.clear()
                return found
        return ""

    def remember(self, value: Tensor) -> None:
        """Keep the value of a loss for the next look."""
        self._last_value = value.detach()


def _first_bad_rows(named: Mapping[str, Tensor]) -> Tensor:
    """For each tensor its first row that is not finite, -1 for none; int64, on their device.

    ``_NOT_POSITIVE`` for a finite scale that is 0 or below.
    """
    rows = []
    for name, tensor in named.items():
        # The sum of a row is finite exactly if the row is: float32 holds any sum of features.
        wide = torch.promote_types(tensor.dtype, torch.float32)
        table = tensor.reshape(1, 1) if tensor.ndim == 0 else tensor
        bad = ~table.sum(dim=1, dtype=wide).isfinite()
        if not bad.numel():
            rows.append(bad.new_full((), -1, dtype=torch.int64))
            continue
        fine: Tensor | int = -1
        if name == "logit_scale":
            fine = torch.where(tensor > 0, -1, _NOT_POSITIVE)
        rows.append(torch.where(bad.any(), bad.int().argmax(), fine))
    return torch.stack(rows)


def _describe(named: Iterable[str], rows: list[int]) -> str:
    return ", ".join(
        _describe_one(name, row) for name, row in zip(named, rows, strict=True) if row != -1
    )


def _describe_one(name: str, row: int) -> str:
    if row == _NOT_POSITIVE:
        return f"{name} is not above 0; it is the multiplier exp(log_scale), not its logarithm"
    return (
        f"{name} row {row} is not finite" if name.endswith("features") else f"{name} is not finite"
    )


def _send_to_host(found: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
    """Start the copy of a few numbers; the event tells when they have arrived."""
    if found.device.type != "cuda":
        return found.cpu(), None
    pinned = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    pinned.copy_(found, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return pinned, event


class LossOutput(NamedTuple):
    """A loss and what was counted on the way.

    Attributes:
        loss: (), this rank's share, with its graph.
        duplicate_pairs: (), int64, on the features' device: pairs of an image of this rank and a
            text of any other pair that share an id. The sum over ranks counts every two
            duplicates twice, once from each side. None without ids.
        terms: what is logged beside the loss, by name: (), without a graph, this rank's shares
            whose mean over ranks is the value.
    """

    loss: Tensor
    duplicate_pairs: Tensor | None = None
    terms: Mapping[str, Tensor] = MappingProxyType({})


class TeacherFeatures(NamedTuple):
    """Features of K teachers for the pairs of this rank, and how they make logits.

    Attributes:
        image: (B, d_1 + ... + d_K), the teachers side by side, each L2-normalised by itself.
        text: likewise, row i of pair i.
        dims: d_k of each teacher.
        scales: logit scale of each teacher, > 0.
        biases: added to the logits of each teacher; None for a teacher that has none.
    """

    image: Tensor
    text: Tensor
    dims: tuple[int, ...]
    scales: tuple[float, ...]
    biases: tuple[float | None, ...]


@runtime_checkable
class _SaysCaptionIds(Protocol):
    uses_caption_ids: bool


@runtime_checkable
class _SaysPictureIds(Protocol):
    uses_picture_ids: bool


@runtime_checkable
class _SaysTeachers(Protocol):
    uses_teachers: bool


@runtime_checkable
class _SaysNegativeTexts(Protocol):
    uses_negative_texts: bool


@runtime_checkable
class _SaysLogitBias(Protocol):
    uses_logit_bias: bool


@runtime_checkable
class _SaysPrefixDims(Protocol):
    prefix_dims: tuple[int, ...]


@runtime_checkable
class _SaysDuplicates(Protocol):
    duplicates: Duplicates | None


@runtime_checkable
class _SaysMined(Protocol):
    mined_negatives: int
    mined_weight: float


def uses_caption_ids(loss: nn.Module) -> bool:
    """Whether the module takes ``caption_ids``: if it says so by ``uses_caption_ids``."""
    return isinstance(loss, _SaysCaptionIds) and bool(loss.uses_caption_ids)


def uses_picture_ids(loss: nn.Module) -> bool:
    """Whether the module takes ``picture_ids``: if it says so by ``uses_picture_ids``."""
    return isinstance(loss, _SaysPictureIds) and bool(loss.uses_picture_ids)


def uses_teachers(loss: nn.Module) -> bool:
    """Whether the module takes ``teachers``: if it says so by ``uses_teachers``."""
    return isinstance(loss, _SaysTeachers) and bool(loss.uses_teachers)


def uses_negative_texts(loss: nn.Module) -> bool:
    """Whether the module takes ``negative_text_features``, by ``uses_negative_texts``."""
    return isinstance(loss, _SaysNegativeTexts) and bool(loss.uses_negative_texts)


def uses_logit_bias(loss: nn.Module) -> bool:
    """Whether the module depends on the bias: unless its ``uses_logit_bias`` is False."""
    return not isinstance(loss, _SaysLogitBias) or bool(loss.uses_logit_bias)


def duplicates_of(loss: nn.Module) -> Duplicates | None:
    """Return what the module makes of duplicates, by its ``duplicates``; None if it has none."""
    return loss.duplicates if isinstance(loss, _SaysDuplicates) else None


def mined_of(loss: nn.Module) -> tuple[int, float]:
    """Return how many negatives the module mines for a picture, and their weight; (0, 0) if none.

    By its ``mined_negatives`` and ``mined_weight``.
    """
    if not isinstance(loss, _SaysMined) or not loss.mined_negatives:
        return 0, 0.0
    return loss.mined_negatives, loss.mined_weight


class LossOverBase(nn.Module):
    """A loss around another one, ``base``, whose wishes about its arguments it passes on."""

    base: nn.Module

    @property
    def uses_caption_ids(self) -> bool:
        """Whether the base takes caption ids."""
        return uses_caption_ids(self.base)

    @property
    def uses_picture_ids(self) -> bool:
        """Whether the base takes picture ids."""
        return uses_picture_ids(self.base)

    @property
    def uses_teachers(self) -> bool:
        """Whether the base takes the features of teachers."""
        return uses_teachers(self.base)

    @property
    def uses_logit_bias(self) -> bool:
        """Whether the base depends on logit_bias."""
        return uses_logit_bias(self.base)

    @property
    def duplicates(self) -> Duplicates | None:
        """How the base treats duplicates."""
        return duplicates_of(self.base)

    @property
    def mined_negatives(self) -> int:
        """How many negatives the base mines for a picture."""
        return mined_of(self.base)[0]

    @property
    def mined_weight(self) -> float:
        """How much more they count."""
        return mined_of(self.base)[1]

    @property
    def prefix_dims(self) -> tuple[int, ...]:
        """Prefixes that the base is computed at."""
        return prefix_dims_of(self.base)


def prefix_dims_of(loss: nn.Module) -> tuple[int, ...]:
    """Return the prefixes that the module is computed at, by its ``prefix_dims``; none if none."""
    return loss.prefix_dims if isinstance(loss, _SaysPrefixDims) else ()


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
    teachers: TeacherFeatures | None = None,
    negative_text_features: Tensor | None = None,
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
        teachers: handed to a module with ``uses_teachers``.
        negative_text_features: (m, D), for a module with ``uses_negative_texts``.
    """
    options: dict[str, Any] = dict(ids)
    taken = signature(loss.forward).parameters
    if "nonfinite" in taken:
        options["nonfinite"] = nonfinite
    if "return_statistics" in taken:
        options["return_statistics"] = True
    if uses_teachers(loss):
        options["teachers"] = teachers
    if negative_text_features is not None:
        options["negative_text_features"] = negative_text_features
    result = loss(image_features, text_features, logit_scale, logit_bias, **options)
    return result if isinstance(result, LossOutput) else LossOutput(result)


DEFAULT_CHUNK_ROWS = 1024
# Wide enough for whole waves of thread blocks in all three products.
_GPU_TILE = (8192, 4096)
_FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tile_shape_of(chunk_rows: int | None, device: torch.device) -> tuple[int, int]:
    """Return rows and columns of the largest tile: what keeps a device busy and its caches warm.

    Args:
        chunk_rows: side of a tile; None for the usual one, which is not square on a GPU.
        device: of the features.

    Raises:
        UserError: if a tile would have no row.

    Example:
        >>> tile_shape_of(None, torch.device("cuda")), tile_shape_of(7, torch.device("cpu"))
        ((8192, 4096), (7, 7))
    """
    if chunk_rows is None:
        return (DEFAULT_CHUNK_ROWS, DEFAULT_CHUNK_ROWS) if device.type == "cpu" else _GPU_TILE
    if chunk_rows < 1:
        raise UserError(f"chunk_rows ({chunk_rows}) must be at least 1")
    return chunk_rows, chunk_rows


def check_rows(**features: Tensor) -> None:
    """Raise ``UserError`` unless each named tensor is (B, D), real and with at least one column.

    Example:
        >>> check_rows(image_features=torch.eye(2))
    """
    for name, rows in features.items():
        if not isinstance(rows, Tensor):
            raise UserError(
                f"{name} is a {type(rows).__module__}.{type(rows).__name__} and must be a tensor; "
                "torch.as_tensor makes one of an array"
            )
        if rows.dtype not in _FEATURE_DTYPES:
            raise UserError(
                f"{name} ({rows.dtype}) must be float32, float64, bfloat16 or float16; "
                "L2-normalised features are"
            )
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise UserError(f"{name} {tuple(rows.shape)} must be (B, D) with D of at least 1")


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Raise ``UserError`` unless both sides are (B, D) of one dtype."""
    check_rows(image_features=image_features, text_features=text_features)
    if image_features.shape != text_features.shape:
        raise UserError(
            f"image_features {tuple(image_features.shape)} and text_features "
            f"{tuple(text_features.shape)} must both be (B, D), row i of one belonging to row i "
            "of the other"
        )
    if image_features.dtype != text_features.dtype:
        raise UserError(
            f"image_features ({image_features.dtype}) and text_features ({text_features.dtype}) "
            "must have one dtype; cast one of them"
        )


def check_negatives(negative_text_features: Tensor | None, text_features: Tensor) -> None:
    """Raise ``UserError`` unless further texts have the width and dtype of the others, or None."""
    if negative_text_features is None:
        return
    check_rows(negative_text_features=negative_text_features)
    ours, theirs = ((each.shape[1], each.dtype) for each in (negative_text_features, text_features))
    if ours != theirs:
        raise UserError(
            f"negative_text_features (*, {ours[0]}) ({ours[1]}) must be (*, {theirs[0]}) "
            f"({theirs[1]}) as text_features; encode them with the same tower"
        )


def check_scalar(name: str, value: Tensor | None) -> None:
    """Raise ``UserError`` unless ``value`` is None or a tensor with one real element."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise UserError(f"{name} ({value!r}) must be a tensor with one element: torch.tensor(10.0)")
    if value.numel() != 1:
        raise UserError(f"{name} {tuple(value.shape)} must have one element")
    if value.is_complex() or value.dtype == torch.bool:
        raise UserError(f"{name} ({value.dtype}) must be a real number")


def refuse_second_order(name: str) -> None:
    """Raise in a backward under create_graph=True.

    The saved gradients are constants to autograd: a second derivative would be zero.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has first-order gradients only; call backward or "
            "torch.autograd.grad without create_graph=True"
        )


def describe_wanted(wanted: Mapping[str, bool]) -> str:
    """Name the gradients that are wanted, for the ranks to agree on.

    Example:
        >>> describe_wanted({"image": True, "text": False, "scale": True})
        'image, scale'
    """
    return ", ".join(name for name, is_wanted in wanted.items() if is_wanted) or "none"
