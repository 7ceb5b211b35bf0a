"""How does an optimizer leave a step out, as if it had never been asked?

Parameters, moments and step counts stay as they are, to the bit.
"""

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer


def carry_not_finite(loss: Tensor) -> Tensor:
    """Return the loss such that, if it is not finite, none of its gradients is.

    loss * (1 + 0 * constant), the constant being the loss: 1 is multiplied with where it is
    finite, so value and gradients are the same to the bit; nan where it is not. An infinite loss
    can have finite gradients (softplus does), which a reduction over ranks would not tell.

    Args:
        loss: ().

    Example:
        >>> for start in (1.0, torch.inf):
        ...     x = torch.tensor(start, requires_grad=True)
        ...     carry_not_finite(3 * x).backward()
        ...     x.grad
        tensor(3.)
        tensor(nan)
    """
    return loss * (1 + 0 * loss.detach())


def skip_where(optimizer: Optimizer, is_skipped: Tensor) -> None:
    """Make the next step of an optimizer do nothing if a flag on the device says so.

    Fused Adam and AdamW read the flag on the device, and the host waits for nothing. Every other
    optimizer has its gradients taken away, which it must pass over like parameters without one,
    as those of torch do; the host then waits for the flag, once a step.

    Args:
        optimizer: about to be stepped, gradients in place.
        is_skipped: (), bool.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.full((2,), torch.nan)
        >>> optimizer = torch.optim.AdamW([weight], fused=True)
        >>> skip_where(optimizer, torch.tensor(True))
        >>> optimizer.step()
        >>> weight.data, optimizer.state[weight]["step"]
        (tensor([1., 1.]), tensor(0.))

    Source:
        torch's fused kernels read ``found_inf`` for ``torch.amp.GradScaler``. Fused SGD would
        leave its momentum unset where its first step is skipped, so Adam and AdamW alone use it.
    """
    if isinstance(optimizer, Adam) and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = is_skipped.float()  # type: ignore[attr-defined]  # read by its step
    elif is_skipped.item():
        optimizer.zero_grad(set_to_none=True)


def restore_where(is_skipped: Tensor, values: list[Tensor], before: list[Tensor]) -> None:
    """Put values back to what they were, in place, if a flag on the device says so.

    Args:
        is_skipped: (), bool.
        values: such as the running statistics of BatchNorm, which a forward pass has moved.
        before: copies, in the same order.

    Example:
        >>> value = torch.tensor([torch.nan])
        >>> restore_where(torch.tensor(True), [value], [torch.tensor([1.0])])
        >>> value
        tensor([1.])
    """
    for value, old in zip(values, before, strict=True):
        value.copy_(torch.where(is_skipped, old, value))
