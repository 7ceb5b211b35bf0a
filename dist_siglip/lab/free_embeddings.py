"""Training of free embeddings: unit rows that are parameters themselves, without an encoder.

The rows are put back on the sphere after every step. As in the
authors' code the loss usually sees normalised rows, so that gradients are tangent to the sphere.
Where a loss extends rows and normalises what is extended (their adapter), it gets them as they are:
gradients then keep a part along the row, which the projection undoes but Adam's moments see.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RECORDS = 200  # points of the loss curve
_FIRST_RECORDS = (1, 2, 5, 10, 20)  # for logarithmic axes


class Training(NamedTuple):
    """Result of a training.

    Attributes:
        rows: unit rows after the last step, one (N, D) tensor for each matrix, without gradients.
        loss: that of the last step, before its update.
        steps: how many were made.
        recorded_steps: steps, counted from 1, at which the loss was recorded.
        recorded_losses: losses of these steps.
    """

    rows: list[Tensor]
    loss: float
    steps: int
    recorded_steps: list[int]
    recorded_losses: list[float]


def random_rows(
    num_rows: int, dimension: int, generator: torch.Generator, *, trainable: bool = True
) -> nn.Parameter:
    """Return rows that are uniform on the unit sphere, (num_rows, dimension), float32.

    Args:
        num_rows: how many.
        dimension: of the space.
        generator: a generator seeded with s draws what ``torch.manual_seed(s)`` would.
        trainable: whether training moves them; a locked encoder's do not move.

    Example:
        >>> rows = random_rows(4, 3, torch.Generator().manual_seed(0))
        >>> torch.allclose(rows.norm(dim=-1), torch.ones(4))
        True
    """
    rows = torch.randn(num_rows, dimension, generator=generator)
    return nn.Parameter(F.normalize(rows, dim=-1), requires_grad=trainable)


def train_free_embeddings(
    rows: Sequence[nn.Parameter],
    loss: Callable[[list[Tensor]], Tensor],
    scalars: Iterable[nn.Parameter] = (),
    *,
    steps: int,
    normalize: bool = True,
    learning_rate: float = 1e-2,
    schedule: Callable[[float], float] | None = None,
    watch: Callable[[int, float, list[Tensor]], bool] | None = None,
    watch_steps: int = 50,
    progress: Callable[[float], None] | None = None,
) -> Training:
    """Minimise a loss of unit rows and scalars with Adam, in one process.

    Give losses of this library ``nonfinite="propagate"``: looking for rows that are not finite
    would be a tenth of the time.

    Args:
        rows: (N, D) matrices; those that need no gradient are locked. Changed in place.
        loss: of the (unit) rows, in the order of ``rows``; full batch, in the reduction of the
            experiment (Adam's epsilon makes late steps depend on it).
        scalars: the other parameters, such as those of ``LogitScaleBias``; locked ones are left
            alone. Changed in place.
        steps: most steps to make, at least 1.
        normalize: whether the loss gets normalised rows; False leaves that to the loss.
        learning_rate: of rows and scalars, before the schedule.
        schedule: from the share of the steps that are done, 0 to below 1, to a factor of the
            learning rate; None keeps it constant. See ``warm_up_and_cosine``.
        watch: called every ``watch_steps`` steps and after the last one with the steps made, the
            last loss and the unit rows; True ends the training.
        watch_steps: see ``watch``.
        progress: called with the share of the steps that are done.

    Example:
        >>> pair = [random_rows(2, 2, torch.Generator().manual_seed(s)) for s in (0, 1)]
        >>> trained = train_free_embeddings(pair, lambda uv: (uv[0] - uv[1]).square().sum(),
        ...                                 steps=500)
        >>> torch.allclose(*trained.rows, atol=1e-4)
        True

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, section 3.5 and the authors' code (Adam, learning
        rate 0.01 for rows and scalars, full batch).
    """
    trained = [parameter for parameter in (*rows, *scalars) if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    every = max(1, steps // _RECORDS)
    recorded_steps: list[int] = []
    recorded_losses: list[float] = []
    step, value = 0, torch.tensor(math.nan)
    for step in range(1, steps + 1):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = learning_rate * schedule((step - 1) / steps)
        optimizer.zero_grad()
        value = loss([F.normalize(matrix, dim=-1) if normalize else matrix for matrix in rows])
        value.backward()
        optimizer.step()
        with torch.no_grad():
            for matrix in rows:
                if matrix.requires_grad:
                    matrix.div_(matrix.norm(dim=-1, keepdim=True))
        if step % every == 0 or step in _FIRST_RECORDS or step == steps:
            recorded_steps.append(step)
            recorded_losses.append(value.item())
            if progress is not None:
                progress(step / steps)
        is_watched = watch is not None and (step % watch_steps == 0 or step == steps)
        if is_watched and watch is not None and watch(step, value.item(), _unit(rows)):
            break
    if progress is not None:
        progress(1.0)
    return Training(_unit(rows), value.item(), step, recorded_steps, recorded_losses)


def warm_up_and_cosine(
    warm_up_share: float = 0.05, *, start: float = 0.1, end: float = 0.01
) -> Callable[[float], float]:
    """Linear warm-up from ``start`` to 1, then half a cosine down to ``end``.

    Example:
        >>> factor = warm_up_and_cosine(0.05)
        >>> [round(factor(share), 3) for share in (0.0, 0.05, 0.525, 1.0)]
        [0.1, 1.0, 0.505, 0.01]
    """

    def factor(share_done: float) -> float:
        if share_done < warm_up_share:
            return start + (1 - start) * share_done / warm_up_share
        left = (share_done - warm_up_share) / (1 - warm_up_share)
        return end + (1 - end) * (1 + math.cos(math.pi * left)) / 2

    return factor


def _unit(rows: Sequence[nn.Parameter]) -> list[Tensor]:
    return [F.normalize(matrix.detach(), dim=-1) for matrix in rows]
