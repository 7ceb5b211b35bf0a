"""Objectives beside the pairwise loss, joined to a training step and to an evaluation.

One pass of the image tower gives features and tokens to all of them. Tokens stay in the micro-batch
that made them: of each term a sum and a count come out, and are weighed by the counts of all ranks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.samples.cached_features import CachedFeatures
from dist_siglip.data.samples.regions import RegionRule
from dist_siglip.distributed import agree_once, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.models import (
    BuiltModel,
    TokenShape,
)
from dist_siglip.models.tuning import layer_groups
from dist_siglip.objectives import (
    Objective,
    Targets,
    Term,
)
from dist_siglip.training.module.ema_teacher import (
    EmaTeacher,
    missing_views,
    with_teacher,
)
from dist_siglip.training.module.objective_measures import ObjectiveMeasures
from dist_siglip.training.module.run_module import RunModule
from dist_siglip.training.optim import OptimConfig

Terms = dict[str, dict[str, Term]]


def build_objectives(asked: Sequence[Objective], built: BuiltModel) -> nn.ModuleDict:
    """Build the heads of objectives, without moving the random generator of what follows.

    Args:
        asked: as configured.
        built: towers as they will train.

    Returns:
        Objectives by name, in their order.

    Raises:
        UserError: if an objective is named twice or takes pictures of one size alone, the image
            tower gives no tokens or is locked as a whole, or as the objectives say.
    """
    found = nn.ModuleDict()
    shape = _image_tokens(built) if asked else TokenShape(0, 0)
    with torch.random.fork_rng(devices=[]):
        for objective in asked:
            if objective.name in found:
                raise UserError(
                    f"objectives name {type(objective).__name__} twice; leave one of them out"
                )
            objective.check_pictures(built)
            objective.build(built, shape)
            found[objective.name] = objective
    return found


def _image_tokens(built: BuiltModel) -> TokenShape:
    towers = built.encoder
    groups = layer_groups(towers)
    if not any(
        parameter.requires_grad and groups[name].tower == "image"
        for name, parameter in towers.named_parameters()
    ):
        raise UserError(
            "objectives train the image tower, which is locked whole: they would train heads that "
            "nothing keeps; unlock some of it (image_tower.unlocked_groups or lora), or leave "
            "objectives out"
        )
    return towers.image_token_shape(built.image_size)


def refuse_cached(data: object, objectives: Iterable[Objective]) -> None:
    """Refuse stored features of a side that an objective reads.

    Raises:
        UserError: naming the objective.
    """
    features: CachedFeatures | None = getattr(data, "features", None)
    for objective in objectives:
        needed = [("image tokens", "image"), ("global view", "image"), ("captions", "text")]
        for need, tower in needed:
            if features is not None and need in objective.needs and tower in features.towers:
                raise UserError(
                    f"objectives ({type(objective).__name__}) need {need}, and train_features "
                    f"stand in for the {tower} tower; leave one of the two out"
                )


def refuse_other_heads(module: nn.Module, stored: Iterable[str], path: object) -> None:
    """Refuse a checkpoint whose objectives are not those of a module, by names of parameters.

    Raises:
        UserError: naming both.
    """
    ours, theirs = (
        sorted({name.split(".")[1] for name in names if name.startswith("objectives.")})
        for names in (module.state_dict(), stored)
    )
    if ours != theirs:
        raise UserError(
            f"checkpoint ({path}) has heads of objectives ({', '.join(theirs) or 'none'}), and "
            f"model.objectives has ({', '.join(ours) or 'none'}); have the same ones, go on in "
            "another run by from_run, or begin another with the checkpoint as model.pretrained, "
            "which takes its towers alone"
        )


def require_regions(data: object, objectives: Iterable[Objective]) -> None:
    """Refuse a data module that reads no regions where an objective needs them.

    Raises:
        UserError: naming the objective.
    """
    rule: RegionRule | None = getattr(data, "regions", None)
    for objective in objectives:
        if rule is not None and rule.json_field is None and "regions" in objective.needs:
            raise UserError(
                f"objectives ({type(objective).__name__}) need regions of pictures; name their "
                "field of the .json as data.regions.json_field, or ask for tasks without boxes"
            )


def draws_of(batch: ImageTextBatch, step: int) -> Tensor:
    """Return the random numbers of a batch; without any, those of sample and step."""
    if batch.draws is not None:
        return batch.draws
    return batch.sample_ids + (step << 40)


def weigh_terms(
    terms: Terms, weights: Mapping[str, float], world_size: int
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Weigh the terms of this rank so that the mean over ranks is that of the global batch.

        share = sum over terms of  weight * W * sum / (count of all ranks)

    Distributed contract: every rank calls it with the same names; one all-reduce of two numbers
    for each term, without gradient. A term that counts nothing anywhere is 0.

    Args:
        terms: by objective and name.
        weights: by objective.
        world_size: W.

    Returns:
        The share, with its gradient; means of all ranks and weights, by their names in the log.

    Raises:
        UserError: if ranks have different terms.
    """
    listed = [(name, term, each) for name, found in terms.items() for term, each in found.items()]
    agree_once(f"objectives; terms {', '.join(f'{name} {term}' for name, term, _ in listed)}")
    sums = torch.stack([each.total for _, _, each in listed])
    counts = torch.stack([each.number for _, _, each in listed]).to(sums)
    all_sums, all_counts = sum_over_ranks(torch.stack([sums.detach(), counts])).unbind()
    all_counts = all_counts.clamp(min=1)
    factors = sums.new_tensor([weights[name] for name, _, _ in listed])
    share = (factors * world_size * sums / all_counts).sum()
    means = (all_sums / all_counts).unbind()
    logged: dict[str, Tensor | float] = {
        f"train/{term}": mean for (_, term, _), mean in zip(listed, means, strict=True)
    }
    return share, logged | {f"train/{name}_weight": weight for name, weight in weights.items()}


def touch(objectives: Iterable[nn.Module]) -> Tensor | float:
    """Return a zero that depends on parameters no term uses, for DDP waits for every one."""
    parameters = [each for module in objectives for each in module.parameters()]
    return sum(0.0 * parameter.sum() for parameter in parameters)


class TermCheck:
    """Finds terms that are not finite, alike on every rank; on a GPU nothing waits for it.

    Example:
        >>> check = TermCheck()
        >>> check.look({"caption_loss": torch.tensor(torch.inf)}, 3)
        >>> check.refuse()
        Traceback (most recent call last):
        dist_siglip.errors.UserError: caption_loss of objectives is not finite at step 3; lower \
model.optim.learning_rate or the weight of the objective, or set step_guard.action to skip
    """

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def look(self, means: Mapping[str, Tensor], step: int) -> None:
        """Remember the first step of each mean over all ranks, (), that is not finite."""
        for name, mean in means.items():
            first = self._first.get(name, torch.full_like(mean, torch.inf))
            self._first[name] = torch.where(mean.isfinite(), first, first.clamp(max=step))

    def refuse(self) -> None:
        """Read what was found.

        Raises:
            UserError: naming the term that was the first, and its step.
        """
        found = {name: float(step) for name, step in self._first.items()}
        name = min(found, key=found.__getitem__, default="")
        if name and found[name] < math.inf:
            raise UserError(
                f"{name} of objectives is not finite at step {found[name]:.0f}; lower "
                "model.optim.learning_rate or the weight of the objective, or set "
                "step_guard.action to skip"
            )


def naming_terms(training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a training step say so if what its loss refuses comes of a term of steps before."""

    @wraps(training_step)
    def step(self: "ObjectiveModule", *arguments: Any) -> Tensor:
        try:
            return training_step(self, *arguments)
        except UserError as error:
            try:
                self.term_check.refuse()
            except UserError as earlier:
                raise earlier from error
            raise

    return step


class ObjectiveModule(RunModule):
    """A module whose steps and evaluations have objectives beside their loss.

    Attributes:
        objectives: by name; empty for the loss alone.
        teacher: of those that learn of an average of the student; None without any.
        term_check: of terms that are not finite.
    """

    objectives: nn.ModuleDict
    optim: OptimConfig
    teacher: EmaTeacher | None

    def __init__(self) -> None:
        super().__init__()
        self.teacher = None
        self._targets: dict[str, Targets] = {}
        self._has_teacher_begun = False
        self._measures = ObjectiveMeasures()
        self._weights: dict[str, float] = {}
        self._idle_heads: list[nn.Module] = []
        self.term_check = TermCheck()

    @property
    def by_name(self) -> dict[str, Objective]:
        """The objectives."""
        return cast("dict[str, Objective]", dict(self.objectives.items()))

    def check_data(self, data: object) -> None:
        """Check what a data module reads against the towers, and against the objectives.

        Raises:
            UserError: as ``check_features``, ``refuse_cached`` and ``require_regions``.
        """
        super().check_data(data)
        refuse_cached(data, self.by_name.values())
        require_regions(data, self.by_name.values())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the objectives, too; shards have been loaded by now."""
        if "state_dict" in checkpoint and not self.goes_on_from(self.trainer.ckpt_path):
            refuse_other_heads(self, checkpoint["state_dict"], self.trainer.ckpt_path)
        super().on_load_checkpoint(checkpoint)

    def begin_objectives(self) -> dict[str, Objective]:
        """Weigh the objectives for the step under way; return those that count in it."""
        total_steps = self.optim.total_steps(self.trainer.max_steps)
        self._weights = {
            name: objective.weight_at(self.global_step, total_steps)
            for name, objective in self.by_name.items()
        }
        return {name: each for name, each in self.by_name.items() if self._weights[name]}

    def look_at_teacher(
        self, counted: Mapping[str, Objective], batch: ImageTextBatch, micro_batch_size: int
    ) -> dict[str, Targets]:
        """Let the teacher see the views of a batch, for the objectives that learn of it.

        Raises:
            UserError: if the batch has no views.
        """
        self._targets = {}
        asking = with_teacher(counted)
        if not asking or self.teacher is None:
            return {}
        if batch.views is None:
            raise missing_views(next(iter(asking.values())))
        if not self._has_teacher_begun:
            self.teacher.begin(self.towers, with_teacher(self.by_name))
            self._has_teacher_begun = True
        total_steps = self.optim.total_steps(self.trainer.max_steps)
        temperatures = {
            name: each.temperature_at(self.global_step - each.first_step(total_steps))
            for name, each in asking.items()
        }
        self._targets = self.teacher.targets(
            self.towers,
            asking,
            batch.views,
            draws_of(batch, self.global_step),
            micro_batch_size,
            temperatures,
        )
        return self._targets

    def on_train_start(self) -> None:
        """Look whether the teacher of a checkpoint had begun; what another run left is past."""
        super().on_train_start()
        self._has_teacher_begun = self.teacher is not None and bool(self.teacher.has_begun)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, and let the teacher follow it."""
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None and self._has_teacher_begun:
            self.teacher.follow(self.towers, with_teacher(self.by_name), self.is_step_skipped)

    def add_objectives(self, loss: Tensor, terms: Terms, *, is_sharded: bool) -> Tensor:
        """Add the terms of the step to this rank's share of the loss, and log them if it is due."""
        world_size = self.trainer.world_size
        logged: dict[str, Any] = {
            f"train/{name}_weight": weight for name, weight in self._weights.items()
        }
        if self._is_logged_step():
            logged["train/pair_loss"] = sum_over_ranks(loss.detach()) / world_size
        self._idle_heads = [each for name, each in self.objectives.items() if name not in terms]
        if terms:
            share, means = weigh_terms(terms, self._weights, world_size)
            loss, logged = loss + share, logged | means
            self._look_at(means)
        if not is_sharded:
            loss = loss + touch(self._idle_heads)
        if self._is_logged_step():
            if self.teacher is not None and self._targets:
                losses = {name: logged[f"train/{name}_loss"] for name in self._targets}
                gauges = self.teacher.gauges(self._targets, losses)
                logged |= {f"train/{name}": value for name, value in gauges.items()}
            self.log_dict(logged)
        self._targets = {}
        return loss

    def _look_at(self, means: Mapping[str, Tensor | float]) -> None:
        """Let the step check know terms that are not finite; without one they end the run."""
        terms = {
            name.removeprefix("train/"): mean
            for name, mean in means.items()
            if isinstance(mean, Tensor)
        }
        if self.step_check is not None:
            self.step_check.note(terms)
            return
        self.term_check.look(terms, self.global_step + 1)
        if self.device.type == "cpu":
            self.term_check.refuse()

    def on_after_backward(self) -> None:
        """Leave heads that did not count in this step as they are, decay included."""
        for objective in self._idle_heads:
            for parameter in objective.parameters():
                parameter.grad = None

    def forget_measures(self) -> None:
        """Begin an evaluation."""
        self._measures = ObjectiveMeasures()

    def encode_and_measure(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """Encode a batch of an evaluation once, and measure the objectives on its tokens."""
        measured = self._measured
        if not measured:
            return self.towers(batch.images, batch.texts)
        image_features, tokens = self.towers.encode_image_tokens(batch.images)
        num_pictures = int(self.available_pairs().get("available_pairs", 0))
        self._measures.update(measured, batch, tokens, num_pictures)
        return image_features, self.towers.encode_text(batch.texts)

    def compute_measures(self) -> dict[str, float]:
        """Return what objectives measured over all ranks, and keep the captions they wrote."""
        found, self.written = self._measures.compute(self._measured, self.built)
        return found

    @property
    def _measured(self) -> dict[str, Objective]:
        """Objectives that have a weight at all."""
        return {name: each for name, each in self.by_name.items() if each.weight}
