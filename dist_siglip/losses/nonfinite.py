"""Which row is not a number, or is the scale not above 0: found on all ranks, without a wait.

One row that is nan or infinite makes the loss and all gradients nan, on every rank. The error
should name the row, and no rank should go on alone and wait for the others. So what a rank finds
goes into the small message with which the ranks agree before each trip (``purpose``), and all
raise together.

On a CPU a call looks at its own features: one pass over them. On a GPU reading a result would make
the host wait, so a ``FiniteCheck`` reads what earlier calls found, once the device has come to it:
the error arrives a step or two late, on all ranks, and names the row of the first bad step. Cost
on a GPU: one pass over the features and a dozen small kernels; no wait.

Where a step that is not finite will be skipped, nothing is looked for: ``let_pass``.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# Findings that the device may fall behind by before the host waits for the oldest.
_MOST_PENDING = 8
_NOT_POSITIVE = -2
_LETS_PASS = ContextVar("lets_pass", default=False)


@contextmanager
def let_pass() -> Iterator[None]:
    """Let losses called in the block take what is not finite, and return it.

    For a training that skips such steps. Every rank must enter it alike.

    Example:
        >>> with let_pass():
        ...     refuse_not_finite({"text_features": torch.tensor([[torch.nan]])})
        ''
    """
    token = _LETS_PASS.set(True)
    try:
        yield
    finally:
        _LETS_PASS.reset(token)


def refuse_not_finite(named: Mapping[str, Tensor]) -> str:
    """Return what is not finite among tensors on a CPU; "" if nothing is or on another device."""
    if _LETS_PASS.get() or any(tensor.device.type != "cpu" for tensor in named.values()):
        return ""
    return _describe(named, _first_bad_rows(named).tolist())


class FiniteCheck:
    """Remembers, for one loss, what was not finite in its inputs and its value.

    Example:
        >>> check = FiniteCheck()
        >>> check.look({"text_features": torch.tensor([[1.0], [torch.nan]])})
        'text_features row 1 is not finite'
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[tuple[str, ...], Tensor, torch.cuda.Event | None]] = deque()
        self._last_value: Tensor | None = None

    def look(self, named: Mapping[str, Tensor]) -> str:
        """Return what is not finite: now on a CPU, in earlier calls on a GPU; "" if nothing."""
        if _LETS_PASS.get():
            self._last_value = None
            return ""
        if all(tensor.device.type == "cpu" for tensor in named.values()):
            found = refuse_not_finite(named)
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
