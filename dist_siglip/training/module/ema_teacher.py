"""The teacher of self-distillation: an average over steps of image tower and heads.

It is a part of the module, so that checkpoints hold it and strategies shard it as the towers. It
has no gradient: optimizers, clipping and DDP pass it over, and exports take the towers alone.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.samples.transforms import ViewRule
from dist_siglip.distributed import max_over_ranks, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.models import DualEncoder
from dist_siglip.models.image_tokens import pool_view
from dist_siglip.objectives import Objective, Targets, TeacherObjective
from dist_siglip.objectives.prototypes import choice_sums, choices_, teacher_logits

TEACHER_MOMENTUM = 0.996
_ROUNDS = 3  # of Sinkhorn


def with_teacher(objectives: Mapping[str, Objective]) -> dict[str, TeacherObjective]:
    """Return those that learn of a teacher, by name."""
    return {name: each for name, each in objectives.items() if isinstance(each, TeacherObjective)}


def view_rule_of(objectives: Mapping[str, Objective]) -> ViewRule | None:
    """Return the views that serve all objectives; None if none needs any.

    Raises:
        UserError: if they want different global views.
    """
    rule: ViewRule | None = None
    for each in with_teacher(objectives).values():
        rule = each.views if rule is None else _joined(rule, each.views)
    return rule


def _joined(rule: ViewRule, other: ViewRule) -> ViewRule:
    if rule.global_scale != other.global_scale:
        raise UserError(
            f"global_scale ({list(rule.global_scale)} and {list(other.global_scale)}) of "
            "objectives must be equal: one global view serves them all"
        )
    return rule if rule.local_views else other


def refuse_sinkhorn(objectives: Mapping[str, Objective], micro_batch_size: int | None) -> None:
    """Refuse an assignment over the whole batch where it is encoded in parts.

    Raises:
        UserError: naming the objective.
    """
    for each in with_teacher(objectives).values():
        if each.assignment == "sinkhorn" and micro_batch_size is not None:
            raise UserError(
                f"assignment (sinkhorn) of {type(each).__name__} needs the whole batch at once, "
                f"and micro_batch_size is {micro_batch_size}; set it to null, or take centre"
            )


def student_views(objectives: Mapping[str, Objective], batch: ImageTextBatch) -> dict[str, Tensor]:
    """Return the fields of a batch with the views that its student sees.

    Raises:
        UserError: if an objective needs views that the batch does not bring.
    """
    found: dict[str, Tensor] = {}
    for need, name in (("local views", "local_views"), ("masked view", "views")):
        users = [each for each in objectives.values() if need in each.needs]
        column: Tensor | None = getattr(batch, name)
        if users and column is None:
            raise missing_views(users[0])
        if users and column is not None:
            found[name] = column
    return found


def missing_views(objective: Objective) -> UserError:
    """The error of a batch without the views that an objective needs."""
    return UserError(
        f"objectives ({type(objective).__name__}) need views of the pictures in every batch; give "
        "the data set a ViewTransform of module.inputs.views, as ImageTextDataModule does"
    )


class EmaTeacher(nn.Module):
    """An average of the image tower and of the heads of objectives, in float32 at least.

        teacher <- m teacher + (1 - m) student         after each optimizer step that is taken

    Until the first objective that learns of it begins it is not used; then it is set to the
    student. It is always in evaluation mode.

    Args:
        towers: of the student.
        objectives: that learn of it, by name, built.
        momentum: m, in [0, 1).

    Attributes:
        centres: (K,) of each objective, as buffers by its name.
        has_begun: (), bool; whether it was set to the student.

    Raises:
        UserError: if the momentum is out of range.

    Source:
        Caron et al. 2021 (DINO), arXiv:2104.14294. A fixed momentum: Naeem et al. 2023 (SILC),
        arXiv:2310.13355; the value is ours.
    """

    def __init__(
        self, towers: DualEncoder, objectives: Mapping[str, TeacherObjective], momentum: float
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise UserError(f"teacher_momentum ({momentum}) must be in [0, 1), e.g. 0.996")
        self.momentum = momentum
        self.visual: nn.Module = copy.deepcopy(towers.clip.visual)
        self.heads = nn.ModuleDict(
            {name: copy.deepcopy(each.head) for name, each in objectives.items()}
        )
        self.centres = nn.Module()
        for name, each in objectives.items():
            self.centres.register_buffer(name, torch.zeros(len(each.head.directions)))
        self.register_buffer("has_begun", torch.zeros((), dtype=torch.bool))
        self._means: dict[str, tuple[Tensor, float]] = {}
        self._pool_view = pool_view
        self.requires_grad_(False)
        self.eval()

    has_begun: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "EmaTeacher":
        """An average of the module shares it: it is an average already."""
        return self

    def train(self, mode: bool = True) -> "EmaTeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "EmaTeacher":
        """Move, but keep float32 where the module is brought to half precision."""

        def wide(tensor: Tensor) -> Tensor:
            found: Tensor = fn(tensor)
            if not found.is_floating_point():
                return found
            return found.to(torch.promote_types(found.dtype, torch.float32))

        return super()._apply(wide, recurse)

    def compile_tower(self, backend: str) -> None:
        """Let ``torch.compile`` translate the tower."""
        self._pool_view = torch.compile(pool_view, backend=backend, dynamic=False)

    @torch.no_grad()
    def begin(self, towers: DualEncoder, objectives: Mapping[str, TeacherObjective]) -> None:
        """Set it to the student, unless that was done before."""
        if not self.has_begun:
            for module in (towers, *objectives.values()):
                if isinstance(module, FSDPModule):
                    module.reshard()  # an evaluation may have left it whole
            ours, theirs = self._pairs(towers, objectives)
            torch._foreach_copy_(ours, theirs)
            self.has_begun.fill_(True)

    @torch.no_grad()
    def forward(
        self, pixels: Tensor, draws: Tensor, objectives: Mapping[str, TeacherObjective]
    ) -> list[Tensor]:
        """Return the (b, R, D) vectors of some pictures for each objective.

        Args:
            pixels: (b, 3, H, W), normalised, of the global view.
            draws: (b,).
            objectives: by name, in the order of the result.
        """
        if not torch.is_autocast_enabled(pixels.device.type):
            pixels = pixels.to(next(self.visual.parameters()).dtype)
        pooled, tokens = self._pool_view(self.visual, pixels)
        return [
            self.heads[name](each.chosen(pooled, tokens, draws))
            for name, each in objectives.items()
        ]

    @torch.no_grad()
    def prototypes(self, names: Sequence[str]) -> list[Tensor]:
        """Return the (K, D) prototypes of each objective, whole on every rank."""
        heads: Any = self.heads
        return [heads[name].prototypes() for name in names]

    @torch.no_grad()
    def targets(
        self,
        towers: DualEncoder,
        objectives: Mapping[str, TeacherObjective],
        views: Tensor,
        draws: Tensor,
        micro_batch_size: int,
        temperatures: Mapping[str, float],
    ) -> dict[str, Targets]:
        """Look at the global views of this rank's pairs; note the centres of the next step.

        Distributed contract: every rank calls it; one all-reduce, and six for each objective with
        "sinkhorn".

        Args:
            towers: of the student, which normalise pixels.
            objectives: that count in the step, by name.
            views: (B, 3, H, W).
            draws: (B,).
            micro_batch_size: pictures that are encoded together.
            temperatures: of the step, by name.

        Returns:
            By name, for all of this rank's pairs.
        """
        parts = [
            self(towers.pixels(part), own, objectives)
            for part, own in zip(
                views.split(micro_batch_size), draws.split(micro_batch_size), strict=True
            )
        ]
        rows = [torch.cat(each) for each in zip(*parts, strict=True)]
        found: dict[str, Targets] = {}
        means = _means_over_ranks(rows)
        self._means = {}
        every = zip(objectives.items(), rows, self.prototypes(list(objectives)), means, strict=True)
        for (name, each), own, prototypes, mean in every:
            temperature = temperatures[name]
            if each.assignment == "sinkhorn":
                centre = sinkhorn_centre(own.flatten(0, 1), prototypes, temperature)
            else:
                # Logits are linear in the vectors, so their mean is that of the mean vector.
                with torch.autocast(own.device.type, enabled=False):
                    self._means[name] = (prototypes @ mean, each.centre_momentum)
                centre = self.centres.get_buffer(name).clone()
            found[name] = Targets(own, prototypes, centre, temperature)
        return found

    @torch.no_grad()
    def follow(
        self,
        towers: DualEncoder,
        objectives: Mapping[str, TeacherObjective],
        is_skipped: Tensor | None,
    ) -> None:
        """Take in the step that the optimizer has taken; waits for nothing.

        Args:
            towers: of the student.
            objectives: that learn of it, by name.
            is_skipped: (), bool, on the device: the step was not taken. None: it was.
        """
        ours, theirs = self._pairs(towers, objectives)
        weight = 1 - self.momentum
        if is_skipped is None:
            torch._foreach_lerp_(ours, theirs, weight)
        else:
            shares = {each.dtype: _unless(is_skipped, weight, each.dtype) for each in ours}
            torch._foreach_lerp_(ours, theirs, [shares[each.dtype] for each in ours])
        for name, (mean, momentum) in self._means.items():
            centre = self.centres.get_buffer(name)
            share = 1 - momentum
            if is_skipped is None:
                centre.lerp_(mean.to(centre.dtype), share)
            else:
                centre.lerp_(mean.to(centre.dtype), _unless(is_skipped, share, centre.dtype))
        self._means = {}

    def gauges(
        self, targets: Mapping[str, Targets], losses: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Return what tells whether the teacher still says something, over all ranks.

        Distributed contract: every rank calls it; one all-reduce of K + 2 numbers for each.

        Args:
            targets: of this step.
            losses: (), of all ranks, by name.

        Returns:
            For each: ``_entropy``, of the teacher's choice, and ``_mean_entropy``, of the mean of
            all choices, both as shares of ln K; ``_kl``, loss less entropy, in nats;
            ``_centre_norm``, of the centre that was used.
        """
        found: dict[str, Any] = {}
        for name, each in targets.items():
            rows = each.rows.flatten(0, 1)
            total, choices = choice_sums(rows, each.prototypes, each.centre, each.temperature)
            number = total.new_tensor([float(len(rows))])
            sums = sum_over_ranks(torch.cat([total[None], number, choices]))
            entropy = sums[0] / sums[1]
            mean = sums[2:] / sums[1]
            most = torch.tensor(float(len(mean)), device=mean.device).log()
            found |= {
                f"{name}_entropy": entropy / most,
                f"{name}_mean_entropy": torch.special.entr(mean).sum() / most,
                f"{name}_kl": losses[name] - entropy,
                f"{name}_centre_norm": each.centre.norm(),
            }
        return found

    def _pairs(
        self, towers: DualEncoder, objectives: Mapping[str, TeacherObjective]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors of floats, ours and the student's; of sharded ones what this rank holds."""
        students = [towers.clip.visual, *(objectives[name].head for name in self.heads)]
        ours, theirs = [], []
        for own, student in zip([self.visual, *self.heads.values()], students, strict=True):
            for mine, other in zip(_tensors(own), _tensors(student), strict=True):
                if mine.is_floating_point():
                    ours.append(mine)
                    theirs.append(other.to(mine.dtype))
        return ours, theirs


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for each in (*module.parameters(), *module.buffers()):
        yield each.to_local() if isinstance(each, DTensor) else each.detach()


def _unless(is_skipped: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    return torch.where(is_skipped, 0.0, share).to(dtype)


def _means_over_ranks(rows: Sequence[Tensor]) -> list[Tensor]:
    """Means of (b, R, D) vectors over the first two axes, and over ranks; one all-reduce."""
    sums = [part for each in rows for part in (each.sum(dim=(0, 1)), _count(each))]
    sizes = [len(part) for part in sums]
    parts = sum_over_ranks(torch.cat(sums)).split(sizes)
    return [total / number for total, number in zip(parts[::2], parts[1::2], strict=True)]


def _count(rows: Tensor) -> Tensor:
    return rows.new_tensor([float(rows.shape[0] * rows.shape[1])])


@torch.no_grad()
def sinkhorn_centre(rows: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Find the centre that gives every prototype nearly the same share of the global batch.

        Q = exp(g / tau);  three times: columns of Q to sums 1/K, rows to sums 1/N;  p = N Q

    over all rows of all ranks. Scaling rows and columns leaves p = softmax((g - c) / tau) with
    c = -tau b, b the logarithm of what columns were multiplied by; so no Q is kept.

    Distributed contract: every rank passes its rows; an all-reduce of K numbers for each round, and
    one more for the first.

    Args:
        rows: (n, D).
        prototypes: (K, D).
        temperature: tau.

    Returns:
        (K,), the same on every rank, up to a constant, which does not matter.

    Source:
        The rounds of DINOv2's public code, arXiv:2304.07193.
    """
    zero = rows.new_zeros(len(prototypes))

    def sums_of(centre: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        sums = torch.zeros_like(zero)
        for logits in teacher_logits(rows, prototypes, centre, temperature):
            sums += change(logits).sum(dim=0)
        return sum_over_ranks(sums)

    top = torch.full_like(zero, -torch.inf)
    for logits in teacher_logits(rows, prototypes, zero, temperature):
        top = torch.maximum(top, logits.amax(dim=0))
        del logits  # before the first ones of the next pass are made
    top = max_over_ranks(top)
    shift = -(top + sums_of(zero, lambda logits: logits.sub_(top).exp_()).log())
    for _ in range(_ROUNDS - 1):
        shift = shift - sums_of(-temperature * shift, choices_).log()
    return -temperature * shift
