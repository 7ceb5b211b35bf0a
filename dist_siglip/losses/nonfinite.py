"""Search for values that are not finite, and for a scale that is not above 0.

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
from typing import Literal, get_args

import torch
from torch import Tensor

from dist_siglip.errors import UserError

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
