"""Cross-entropy of a student against a teacher's soft choice among many prototypes, in chunks.

Logits of all prototypes exist for one chunk of rows at a time, in forward and again in backward,
as in ``token_losses``.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.objectives.token_loss import exponentials_

_CHUNK_LOGITS = 2**26  # 256 MB as float32


class PrototypeHead(nn.Module):
    """Three linear layers with GELU between them, then a vector of length 1, and K prototypes.

    Prototypes are a linear layer with weight norm whose gain is fixed at 1: rows of length 1.

    Args:
        width: channels of what it reads.
        prototypes: K.
        hidden: channels between the layers.
        bottleneck: D, channels of the vector.

    Source:
        The head of DINO (Caron et al. 2021, arXiv:2104.14294, and its public code).
    """

    def __init__(self, width: int, prototypes: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.directions = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.normal_(self.directions, std=0.02)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Return (..., D) vectors of length 1 of (..., C) rows, at least float32."""
        return _of_length_1(self.mlp(rows))

    def prototypes(self) -> Tensor:
        """Return the (K, D) prototypes, at least float32; a tensor of its own."""
        return _of_length_1(self.directions)


def _of_length_1(rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


def prototype_losses(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    centre: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of V student vectors of each row against the teacher's choice of prototypes.

        p_n  = softmax((P' y_n - c) / tau_t)                        without gradient
        L_nv = - sum_k p_nk log softmax(P x_nv / tau_s)_k

    Products are taken in the precision of autocast, or of ``student`` without it; logits,
    exponentials and losses in float32 at least. The centre is the teacher's alone.

    Args:
        student: (N, V, D), x.
        student_prototypes: (K, D), P.
        teacher: (N, D), y.
        teacher_prototypes: (K, D), P'.
        centre: (K,), c.
        student_temperature: tau_s, > 0.
        teacher_temperature: tau_t, > 0.
        chunk_rows: rows whose logits exist together; None is as many as 256 MB hold in float32.

    Returns:
        (N, V) in nats.

    Example:
        >>> eye, zeros = torch.eye(3), torch.zeros(3)
        >>> prototype_losses(
        ...     torch.zeros(1, 2, 3), eye, torch.zeros(1, 3), eye, zeros,
        ...     student_temperature=0.1, teacher_temperature=0.04,
        ... )
        tensor([[1.0986, 1.0986]])

    Source:
        Caron et al. 2021 (DINO), arXiv:2104.14294, equations 1 to 4.
    """
    device, dtype = student.device.type, student.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = chunk_rows or _rows_of_chunk(len(student_prototypes), student.shape[1] + 1)
    with torch.autocast(device, enabled=False):
        losses: Tensor = _PrototypeLosses.apply(
            student,
            student_prototypes,
            teacher.detach(),
            teacher_prototypes.detach(),
            centre.detach(),
            student_temperature,
            teacher_temperature,
            dtype,
            rows,
        )
    return losses


@torch.no_grad()
def choice_sums(
    teacher: Tensor, prototypes: Tensor, centre: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sum, over rows, the entropies of a teacher's choice and the choice itself.

    Args:
        teacher: (N, D).
        prototypes: (K, D).
        centre: (K,).
        temperature: > 0.

    Returns:
        (), sum of the entropies in nats; (K,), sum of the probabilities.
    """
    total, choices = centre.new_zeros(()), torch.zeros_like(centre)
    for shares in teacher_logits(teacher, prototypes, centre, temperature):
        logits = shares.clone()
        top, sums = exponentials_(shares)
        shares.div_(sums)
        meant = torch.bmm(shares[:, None], logits[:, :, None])
        del logits  # before the next ones are made
        total += sums.log_().add_(top).sum() - meant.sum()
        choices += shares.sum(dim=0)
    return total, choices


def teacher_logits(
    teacher: Tensor, prototypes: Tensor, centre: Tensor, temperature: float
) -> Iterator[Tensor]:
    """Yield the (n, K) logits of a teacher, centred and over its temperature, chunk by chunk.

    All are in one buffer, which the caller may overwrite, and the next chunk does.
    """
    every = teacher.split(_rows_of_chunk(len(prototypes), 2))
    buffer = teacher.new_empty(len(every[0]), len(prototypes))
    with torch.autocast(teacher.device.type, enabled=False):
        for rows in every:
            logits = torch.mm(rows, prototypes.T, out=buffer[: len(rows)])
            yield logits.sub_(centre).div_(temperature)


def _rows_of_chunk(num_prototypes: int, logits_per_row: int) -> int:
    return max(1, _CHUNK_LOGITS // (num_prototypes * logits_per_row))


class _PrototypeLosses(torch.autograd.Function):
    """Keeps of the student's logits their log-sum-exp alone."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        centre: Tensor,
        student_temperature: float,
        teacher_temperature: float,
        dtype: torch.dtype,
        chunk_rows: int,
    ) -> Tensor:
        ctx.settings = student_temperature, teacher_temperature, dtype, chunk_rows
        ours, theirs = weight.to(dtype), teacher_weight.to(dtype)
        losses, spreads = [], []
        for rows, seen in zip(student.split(chunk_rows), teacher.split(chunk_rows), strict=True):
            shares = _choices(seen.to(dtype), theirs, centre, teacher_temperature)
            logits = _wide(F.linear(rows.to(dtype), ours)).div_(student_temperature)
            meant = torch.bmm(logits, shares[:, :, None]).squeeze(2)
            top, sums = exponentials_(logits)
            spread = sums.log_().add_(top).squeeze(2)
            losses.append(spread - meant)
            spreads.append(spread)
            del shares, logits  # before the next ones are made
        ctx.save_for_backward(student, weight, teacher, teacher_weight, centre, torch.cat(spreads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student, weight, teacher, teacher_weight, centre, spreads = ctx.saved_tensors
        student_temperature, teacher_temperature, dtype, chunk_rows = ctx.settings
        ours, theirs = weight.to(dtype), teacher_weight.to(dtype)
        of_student = torch.empty_like(student)
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for first in range(0, len(student), chunk_rows):
            part = slice(first, first + chunk_rows)
            rows = student[part].to(dtype)
            slope = _wide(F.linear(rows, ours)).div_(student_temperature)
            slope.sub_(spreads[part, :, None]).exp_()
            slope.sub_(
                _choices(teacher[part].to(dtype), theirs, centre, teacher_temperature)[:, None]
            )
            slope.mul_((gradients[0][part] / student_temperature)[:, :, None])
            narrow = slope.to(dtype)
            of_student[part] = (narrow @ ours).to(of_student.dtype)
            of_weight += narrow.flatten(0, 1).T @ rows.flatten(0, 1)
            del slope, narrow
        return of_student, of_weight.to(weight.dtype), *([None] * 7)


def _choices(rows: Tensor, prototypes: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """(n, K) probabilities, at least float32."""
    return choices_(_wide(F.linear(rows, prototypes)).sub_(centre).div_(temperature))


def choices_(logits: Tensor) -> Tensor:
    """Return (n, K) logits, turned in place into probabilities."""
    _, sums = exponentials_(logits)
    return logits.div_(sums)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
