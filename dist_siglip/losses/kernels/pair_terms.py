"""Value and derivative of a tile from its logits, in few passes over memory, and who computes them.

With the logit of every positive negated, value and derivative are softplus and sigmoid of the same
number; the derivative of a positive changes sign afterwards. Neither cancels for large logits.

Three ways to the same numbers, because the devices ask for different ones:

- ``pair_terms_in_place`` for a CPU, where a branch on the data costs nothing. softplus is the
  dearest pass, so positives are set aside and the value of the negatives comes from what the
  derivative needs anyway, s = sigmoid(z):

      largest z          value of the negatives             relative error left out
      below -7.8         sum s + sum s^2 / 2                s^2 / 3, at most 6e-8
      -7.8 to 0          -sum log1p(-s)                     none
      above 0            sum softplus(z)                    none

- ``triton_terms`` for a GPU: one kernel that reads the tile once.
- ``pair_terms``: no branch, hence no wait for the device, and nothing but elementwise operations
  and sums, which torch.compile fuses into a few passes.

A row may have two ids, of its caption and of its picture. Two rows are duplicates if they share
either: the same caption under two pictures, or two captions of one picture.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_siglip.errors import UserError

logger = logging.getLogger(__name__)

Kernel = Literal["auto", "triton", "compiled", "eager"]
ChosenKernel = Literal["triton", "compiled", "eager"]


def choose_kernel(kernel: Kernel, features: Tensor) -> ChosenKernel:
    """Return what computes the terms of the tiles of these features.

    Args:
        kernel: "triton", one kernel that reads a tile once; "compiled", PyTorch's operations
            through torch.compile; "eager", these as they are; "auto": eager on a CPU, else triton,
            or compiled, with one line in the log, where triton is missing or its kernels do not
            build.
        features: give device and dtype.

    Raises:
        UserError: if the name is unknown, or "triton" cannot be had.

    Example:
        >>> choose_kernel("auto", torch.ones(1))
        'eager'
    """
    check_kernel(kernel)
    if kernel == "compiled" or kernel == "eager":
        return kernel
    if kernel == "auto" and features.device.type == "cpu":
        return "eager"
    obstacle = _triton_obstacle(features.device, features.dtype)
    if not obstacle:
        return "triton"
    if kernel == "triton":
        raise UserError(
            f"kernel ('triton') cannot be used: {obstacle}; use 'auto', 'compiled' or 'eager'"
        )
    _log_once(f"kernel auto -> compiled: {obstacle}")
    return "compiled"


def check_kernel(kernel: str) -> None:
    """Raise ``UserError`` unless the name is that of a kernel."""
    if kernel not in get_args(Kernel):
        raise UserError(f"kernel ({kernel!r}) must be one of {', '.join(get_args(Kernel))}")


@lru_cache
def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Say what stands against Triton's kernels for such features; "" if nothing does."""
    if dtype == torch.float64:
        return "its logits are float32, and float64 features have float64 ones"
    if find_spec("triton") is None:
        return "triton is not installed"
    from dist_siglip.losses.kernels import triton_terms

    if device.type != "cuda" and not (device.type == "cpu" and triton_terms.is_interpreted()):
        return f"the features are on a {device.type}, and it is for GPUs"
    try:
        triton_terms.try_kernels(device, dtype)
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise errors of many kinds
        reason = (str(error).strip().splitlines() or [""])[-1]
        return f"its kernels do not build ({type(error).__name__}: {reason[:200]})"
    return ""


@lru_cache(maxsize=64)
def _log_once(line: str) -> None:
    logger.warning("%s", line)


@lru_cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function through torch.compile; as it is, with one line in the log, if that fails.

    Args:
        function: of tensors, without a read by the host.
    """
    translated = torch.compile(function, dynamic=True)
    failed = False

    @wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return translated(*arguments)
            except Exception as error:
                if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    raise
                failed = True
                _log_once(
                    f"torch.compile fails ({type(error).__name__}): the loss takes several passes "
                    "over its tiles"
                )
        return function(*arguments)

    return call


def join_ids(caption_ids: Tensor | None, picture_ids: Tensor | None) -> Tensor | None:
    """Put the ids of rows side by side, so that they travel as one.

    Args:
        caption_ids: (B,), integers; None for none.
        picture_ids: (B,), likewise.

    Returns:
        (B, 2) of captions and pictures; (B,) if one is None; None if both are.

    Example:
        >>> join_ids(torch.tensor([4, 5]), torch.tensor([7, 7]))
        tensor([[4, 7],
                [5, 7]])
    """
    if caption_ids is None or picture_ids is None:
        return picture_ids if caption_ids is None else caption_ids
    return torch.stack([caption_ids, picture_ids], dim=1)


def share_an_id(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """Tell which rows and columns have an id of the same kind in common.

    Args:
        row_ids: (R,), or (R, K) with K kinds of ids.
        column_ids: (C,), or (C, K).

    Returns:
        (R, C) bool.

    Example:
        >>> ids = join_ids(torch.tensor([4, 5, 4]), torch.tensor([7, 7, 8]))
        >>> share_an_id(ids[:1], ids)
        tensor([[True, True, True]])
        >>> share_an_id(ids[1:2], ids)
        tensor([[ True,  True, False]])
    """
    if row_ids.ndim == 1:
        return row_ids[:, None] == column_ids[None, :]
    rows, columns = row_ids.T.contiguous(), column_ids.T.contiguous()
    same = rows[0, :, None] == columns[0, None, :]
    for kind in range(1, len(rows)):
        same = same | (rows[kind, :, None] == columns[kind, None, :])
    return same


Duplicates = Literal["positive", "masked", "negative"]

# Largest logit for which two terms of -log(1 - s) = s + s^2/2 + s^3/3 + ... do.
_SERIES_BELOW = {torch.float32: -7.8, torch.float64: -18.2}
# Above this softplus(z) is z in float64 too (the default, 20, is not enough there).
_SOFTPLUS_IS_LINEAR = 40.0


class Terms(NamedTuple):
    """What the logits of a tile give.

    Attributes:
        value: (), sum of softplus(-y * logit).
        derivative: (rows, columns), d value / d logit; None if not asked for.
        derivative_sum: (), the sum of it; None if not asked for.
        duplicate_pairs: (), int64, pairs that share an id off the diagonal; None without ids.
    """

    value: Tensor
    derivative: Tensor | None
    derivative_sum: Tensor | None
    duplicate_pairs: Tensor | None


def pair_terms_in_place(
    logits: Tensor,
    scratch: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    *,
    diagonal: int | None,
    duplicates: Duplicates,
    with_derivative: bool,
) -> Terms:
    """Turn a tile of logits into its terms; ``logits`` becomes the derivative.

    Args:
        logits: (rows, columns), contiguous; overwritten.
        scratch: like ``logits``; overwritten.
        row_ids: (rows,), or (rows, kinds), see ``pair_ids``; None for none.
        column_ids: likewise of the columns.
        diagonal: pairs (i, i + diagonal) are positives; None for none.
        duplicates: what pairs that share an id off the diagonal are.
        with_derivative: whether the derivative is wanted.
    """
    equal, num_equal = None, None
    if row_ids is not None and column_ids is not None:
        equal = share_an_id(row_ids, column_ids)
        if diagonal is not None:
            equal.diagonal(diagonal).fill_(False)
        num_equal = equal.sum()
        if duplicates == "negative" or not num_equal:
            equal = None
    apart: list[Tensor] = []  # logits of the positives, which the passes below do not see
    if diagonal is not None:
        apart.append(logits.diagonal(diagonal).clone())
        logits.diagonal(diagonal).fill_(-torch.inf)
    if equal is not None:
        if duplicates == "positive":
            apart.append(logits[equal])
        logits.masked_fill_(equal, -torch.inf)
    value, derivative_sum = _sum_negatives_(logits, scratch)
    pulls = [-torch.sigmoid(-positives) for positives in apart]
    for positives, pull in zip(apart, pulls, strict=True):
        value = value.double() + _softplus(-positives).sum(dtype=torch.float64)
        derivative_sum = derivative_sum.double() + pull.sum(dtype=torch.float64)
    if not with_derivative:
        return Terms(value, None, None, num_equal)
    if diagonal is not None:
        logits.diagonal(diagonal).copy_(pulls[0])
    if equal is not None and duplicates == "positive":
        logits.masked_scatter_(equal, pulls[-1])
    return Terms(value, logits, derivative_sum, num_equal)


def _sum_negatives_(logits: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of softplus and of sigmoid; ``logits`` becomes the sigmoid."""
    if not logits.numel():
        return logits.new_zeros(()), logits.new_zeros(())
    largest = logits.max().item()
    # Comparisons with nan are false: the last branch passes it on.
    if largest <= _SERIES_BELOW[logits.dtype]:
        flat = logits.sigmoid_().view(-1)
        total = flat.sum()
        return total.double().add_(flat.dot(flat), alpha=0.5), total
    if largest <= 0:
        torch.neg(logits.sigmoid_(), out=scratch)
        value = -scratch.log1p_().sum()
    else:
        # The overload by its name: to choose it costs more than a small tile.
        value = torch.ops.aten.softplus.out(logits, 1, _SOFTPLUS_IS_LINEAR, out=scratch).sum()
        logits.sigmoid_()
    return value, logits.sum()


def pair_terms(
    similarity: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    duplicates: Duplicates,
    derivative_dtype: torch.dtype | None,
    relevant: Tensor | None = None,
) -> Terms:
    """Return the terms of a tile of similarities without looking at a number on the host.

    Args:
        similarity: (rows, columns) in the logits' dtype; left as it is.
        logit_scale: (), the multiplier.
        logit_bias: (), added.
        row_ids: (rows,), or (rows, kinds), see ``pair_ids``; None for none.
        column_ids: likewise of the columns.
        diagonal: pairs (i, i + diagonal) are positives; None for none.
        duplicates: what pairs that share an id off the diagonal are.
        derivative_dtype: dtype of the derivative; None leaves it out.
        relevant: (rows, columns), bool, further positives; or None.
    """
    logits = similarity * logit_scale + logit_bias
    positive, num_equal = None, None
    if diagonal is not None:
        rows, columns = similarity.shape
        positive = (
            torch.arange(diagonal, diagonal + rows, device=similarity.device)[:, None]
            == torch.arange(columns, device=similarity.device)[None, :]
        )
    if row_ids is not None and column_ids is not None:
        equal = share_an_id(row_ids, column_ids)
        if positive is not None:
            equal = equal & ~positive
        num_equal = equal.sum()
        if duplicates == "masked":
            logits = torch.where(equal, -torch.inf, logits)
        elif duplicates == "positive":
            positive = equal if positive is None else equal | positive
    if relevant is not None:
        positive = relevant if positive is None else relevant | positive
    if positive is not None:
        logits = torch.where(positive, -logits, logits)
    value = _softplus(logits).sum()
    if derivative_dtype is None:
        return Terms(value, None, None, num_equal)
    derivative = torch.sigmoid(logits)
    if positive is not None:
        derivative = torch.where(positive, -derivative, derivative)
    return Terms(value, derivative.to(derivative_dtype), derivative.sum(), num_equal)


def _softplus(logits: Tensor) -> Tensor:
    return F.softplus(logits, threshold=_SOFTPLUS_IS_LINEAR)
