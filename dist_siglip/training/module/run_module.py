"""Base of the Lightning modules: logged values, step counts, optimizer and clipping."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_siglip.data import ImageTextBatch, Preprocessing
from dist_siglip.data.samples.batch import ImageNormalizer
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.distributed import connect_ranks, sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.health.step_timing import StepTimer
from dist_siglip.metrics import Evaluation
from dist_siglip.models import BuiltModel
from dist_siglip.models.tuning import lies_in_block
from dist_siglip.models.weights_file import refuse_not_finite
from dist_siglip.runs.checkpoints.sharded import by_name, by_number, has_numbers
from dist_siglip.system.lightning_compat import count_logged_steps
from dist_siglip.training.module.from_run import (
    Differences,
    adopt_optimizer,
    adopt_weights,
    convert_optimizer,
)
from dist_siglip.training.module.locked_features import check_features
from dist_siglip.training.optim import OptimConfig, ParameterRule, StepCheck, build_optimizer
from dist_siglip.training.optim.evaluation_weights import (
    UNAVERAGED,
    EvaluationWeights,
    averaging_parts,
    take_training_weights,
)

logger = logging.getLogger(__name__)


def configure(
    module: "RunModule",
    config: OptimConfig,
    rules: Mapping[str, ParameterRule],
    *,
    is_sharded: bool,
) -> OptimizerLRSchedulerConfig:
    """Build what ``configure_optimizers`` returns, for the precision of the Trainer.

    Raises:
        UserError: as ``build_optimizer``, or if gradients would be both scaled and sharded.
    """
    trainer = module.trainer
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and is_sharded:
        raise UserError(
            "trainer.precision (16-mixed) scales gradients, which sharded ones do not take; use "
            "bf16-mixed"
        )
    optimizer, schedule = build_optimizer(
        module,
        config,
        config.total_steps(trainer.max_steps),
        rules,
        scales_gradients=scaler is not None,
        is_sharded=is_sharded,
        in_block=lies_in_block,
    )
    if averaging_parts([optimizer]):
        _check_averaging(trainer, config, is_sharded=is_sharded)
    if module.other_checkpoint is not None and not is_sharded:
        optimizer.register_load_state_dict_pre_hook(partial(_take_by_name, module))
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }


def _take_by_name(
    module: "RunModule", optimizer: Optimizer, state: dict[str, Any]
) -> dict[str, Any] | None:
    """Number the state of another run as this optimizer does; that of this run has numbers."""
    if has_numbers(state):
        return None
    current = by_name(optimizer.state_dict(), optimizer, module)
    return by_number(adopt_optimizer(state, current, module.resampled_names))


def _check_averaging(trainer: Any, config: OptimConfig, *, is_sharded: bool) -> None:
    """Refuse what an optimizer with an average of its own does not go with."""
    others = (
        ("FullyShardedStrategy", is_sharded),
        (
            "the callback WeightAverage",
            any(isinstance(each, WeightAveraging) for each in trainer.callbacks),
        ),
    )
    for other, is_there in others:
        if is_there:
            raise UserError(
                f"optimizer (with train() and eval()) keeps a second set of weights, which does "
                f"not go with {other}; leave one of them out"
            )
    if config.schedule != "constant":
        logger.warning(
            "schedule (%s) with an optimizer that averages its weights: it wants constant",
            config.schedule,
        )


def clip(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None,
    algorithm: str | None,
    is_wanted: bool,
) -> Tensor | None:
    """Clip gradients by their global norm, in place.

    Args:
        parameters: whose gradients; sharded or not.
        max_norm: Null or 0 does not clip.
        algorithm: must be "norm" or None.
        is_wanted: whether the norm is asked for where nothing is clipped.

    Returns:
        The norm before clipping, whole on every rank; None if it was not computed.

    Raises:
        UserError: if the algorithm is another.
    """
    if algorithm not in (None, "norm"):
        given = getattr(algorithm, "value", algorithm)
        raise UserError(f"trainer.gradient_clip_algorithm ({given}) must be norm")
    norm: Tensor | None = None
    if max_norm:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    elif is_wanted:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def log_training(
    module: LightningModule,
    loss: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    duplicates: Tensor | None,
    num_substituted: Tensor | int,
    timer: StepTimer,
) -> None:
    """Log global values; one small all-reduce, on logged steps only.

    Args:
        module: under training.
        loss: this rank's share, whose mean over ranks is the loss.
        logit_scale: of the step.
        logit_bias: of the step.
        duplicates: of this rank's batch with those of all, as the loss counted them; or None.
        num_substituted: samples of this rank so far that stood in for bad ones.
        timer: of this rank; keeps that of all ranks.
    """
    zero = loss.new_zeros(())
    counts = (zero + num_substituted, zero if duplicates is None else zero + duplicates)
    row = timer.take_row(module.trainer.global_rank, module.trainer.world_size)
    if loss.device.type == "cuda":
        row = row.pin_memory()
    row = row.to(loss, non_blocking=True)
    sums = sum_over_ranks(torch.cat([torch.stack([loss.detach(), *counts]), row]))
    loss_sum, all_substituted, num_duplicates = sums[:3].unbind()
    timer.keep_sum(sums[3:])
    if duplicates is not None:
        module.log("train/duplicate_captions", num_duplicates)
    groups = module.trainer.optimizers[0].param_groups
    module.log_dict(
        {
            "train/loss": loss_sum / module.trainer.world_size,
            "train/logit_scale": logit_scale.detach(),
            "train/logit_bias": logit_bias.detach(),
            "train/relative_bias": (-logit_bias / logit_scale).detach(),
            "train/learning_rate": max(group["lr"] for group in groups),
            "train/substituted_samples": all_substituted,
        }
    )


class RunModule(LightningModule):
    """Counts steps, logs and judges them, and writes optimizer states under names of parameters.

    Attributes:
        built: what the towers were built as.
        inputs: what they want to be fed.
        last_evaluation: newest evaluation of this process.
        last_evaluated_step: optimizer steps behind it.
        timer: how this rank spends its time.
        written: what a decoder wrote of some pictures of that evaluation, by sample id; empty
            without one.
        step_check: of the callback SkipBadSteps: skips a step that is not finite, which else is an
            error.
        other_checkpoint: of another run, from which this one goes on: what it lacks stays as it was
            built, see ``from_run``. Set it before ``Trainer.fit`` is given that path.
        fresh_names: parameters and buffers that it lacked, once it is loaded.
        resampled_names: positions that it had on another grid.
        lineage: runs that this one goes on from, earliest first, as checkpoints keep them.
        is_step_skipped: (), bool, whether the optimizer leaves out the step under way; None where
            none is left out.
        normalizes_pictures: whether batches hold pixels as uint8, which the towers normalise
            micro-batch by micro-batch; a subclass that needs floats in ``batch.images`` sets it to
            False.
    """

    built: BuiltModel
    inputs: Preprocessing
    towers: Any
    normalizes_pictures = True

    def __init__(self) -> None:
        super().__init__()
        self.last_evaluation: Evaluation | None = None
        self.last_evaluated_step: int | None = None
        self.written: dict[int, Any] = {}
        self.step_timer = StepTimer()
        self.step_check: StepCheck | None = None
        self.other_checkpoint: Path | None = None
        self.fresh_names: frozenset[str] = frozenset()
        self.resampled_names: frozenset[str] = frozenset()
        self.lineage: list[dict[str, Any]] = []
        self.is_step_skipped: Tensor | None = None
        self._loaded_steps = 0
        self._evaluation_weights = EvaluationWeights()
        # Stays on the device of the batches: reading it each step would wait for the GPU.
        self._num_substituted: Tensor | int = 0

    @property
    def steps_done(self) -> int:
        """Optimizer steps behind the present weights, those of a loaded checkpoint included."""
        return max(self.global_step, self._loaded_steps)

    def goes_on_from(self, path: object) -> bool:
        """Whether a path is that of the checkpoint of another run to go on from."""
        return self.other_checkpoint is not None and Path(str(path)) == self.other_checkpoint

    def setup(self, stage: str) -> None:
        """Connect the ranks, while nothing is under way; see pictures as the data module does."""
        trainer = self.trainer
        connect_ranks(trainer.strategy.root_device, across_nodes=trainer.num_nodes > 1)
        data = getattr(trainer, "datamodule", None)
        pictures, inputs = getattr(data, "pictures", None), getattr(data, "inputs", None)
        if pictures is not None:
            self.use_pictures(pictures)
        if isinstance(inputs, Preprocessing):
            self.towers.normalizer = ImageNormalizer(inputs.mean, inputs.std)

    def check_ranks(self, world_size: int) -> None:
        """Check that so many ranks can share a step; any can, where a module says nothing else."""

    def check_data(self, data: object) -> None:
        """Check that the features a data module reads are those of towers that are locked whole.

        Raises:
            UserError: as ``check_features``.
        """
        check_features(data, self.built, self.towers)

    def use_pictures(self, policy: PicturePolicy) -> None:
        """Take over what decides the pixels of pictures, which benchmarks and digests ask for."""
        self.built = replace(self.built, pictures=policy)
        self.inputs = replace(self.inputs, pictures=policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the optimizer's parameters, and the runs before this one."""
        if self.lineage:
            checkpoint["lineage"] = self.lineage
        self._evaluation_weights.write(checkpoint, self, self.trainer.optimizers)
        if "optimizer_states" in checkpoint:
            pairs = zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [
                by_name(state, optimizer, self) if state else state for state, optimizer in pairs
            ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the step: Lightning's evaluation loop restores weights only.

        Raises:
            UserError: if a parameter is not finite; of another run, as ``adopt_weights``.
        """
        is_of_other = self.goes_on_from(self.trainer.ckpt_path)
        if is_of_other:
            self._adopt(checkpoint)
        self.lineage = self.lineage or checkpoint.get("lineage", [])
        names = {name for name, _ in self.named_parameters()}
        for state in ("state_dict", "current_model_state"):  # the second beside an average
            weights = {
                name: value
                for name, value in checkpoint.get(state, {}).items()
                if name in names and not isinstance(value, DTensor)
            }
            refuse_not_finite(weights, f"checkpoint ({self.trainer.ckpt_path})")
        self._loaded_steps = int(checkpoint["global_step"])
        if self.trainer.state.fn == TrainerFn.FITTING:
            take_training_weights(checkpoint)
        if "optimizer_states" in checkpoint and not is_of_other:
            states = checkpoint["optimizer_states"]
            checkpoint["optimizer_states"] = [by_number(state) for state in states]

    def note_differences(self, found: Differences) -> None:
        """Remember what the checkpoint of another run lacked, and what it had on another grid."""
        self.fresh_names = frozenset(found.fresh)
        self.resampled_names = frozenset(found.resampled)

    def _adopt(self, checkpoint: dict[str, Any]) -> None:
        """Complete the weights of another run by those there are; shards are loaded by now."""
        if "state_dict" not in checkpoint:
            return
        stored = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        checkpoint["optimizer_states"] = [
            convert_optimizer(self, state, stored) for state in checkpoint["optimizer_states"]
        ]
        for key in ("state_dict", UNAVERAGED):
            if key in checkpoint:
                path = Path(str(self.trainer.ckpt_path))
                weights, found = adopt_weights(self, checkpoint[key], path)
                self.note_differences(found)
                checkpoint[key] = {**self.state_dict(), **weights}
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning's
        averages = any(isinstance(each, WeightAveraging) for each in callbacks)
        is_fit = self.trainer.state.fn == TrainerFn.FITTING
        if UNAVERAGED in checkpoint and is_fit and not averages:
            checkpoint["state_dict"] = checkpoint[UNAVERAGED]

    def on_train_start(self) -> None:
        """Let optimizers that ask for it know that training begins."""
        for part in averaging_parts(self.trainer.optimizers):
            part.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Have loggers write on the steps whose figures are logged."""
        count_logged_steps(self.trainer)

    def on_fit_end(self) -> None:
        """Leave the weights that were evaluated, not those of training."""
        self._evaluation_weights.enter(self.trainer.optimizers)

    def on_validation_model_eval(self) -> None:
        """Evaluate with the weights that the optimizer wants evaluated."""
        super().on_validation_model_eval()
        self._evaluation_weights.enter(self.trainer.optimizers)

    def on_validation_model_train(self) -> None:
        """Go on with the weights of training."""
        super().on_validation_model_train()
        self._evaluation_weights.leave(self.trainer.optimizers)

    def available_pairs(self) -> dict[str, float]:
        """Count the pairs of ``val_shards``, as a metric: what an evaluation could have seen."""
        data = getattr(self.trainer, "datamodule", None)
        dataset = getattr(data, "val_dataset", None)
        return {} if dataset is None else {"available_pairs": float(len(dataset))}

    def log_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Log what a loss says beside its value, if it is due; one small all-reduce."""
        if terms and self._is_logged_step():
            sums = sum_over_ranks(torch.stack(list(terms.values())))
            means = (sums / self.trainer.world_size).unbind()
            self.log_dict({f"train/{name}": mean for name, mean in zip(terms, means, strict=True)})

    def finish_step(
        self,
        batch: ImageTextBatch,
        loss: Tensor,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        *,
        duplicate_pairs: Tensor | None = None,
    ) -> Tensor:
        """Log a training step if it is due, and return the loss as the step check wants it.

        Args:
            batch: of the step.
            loss: this rank's share, whose mean over ranks is the loss.
            image_features: (B, D), of the batch.
            text_features: (K * B, D), of the batch, see ``ImageTextBatch.all_texts``.
            logit_scale: of the step.
            logit_bias: of the step.
            duplicate_pairs: of this rank, as the loss counted them; None if it did not.
        """
        self._num_substituted = self._num_substituted + batch.substituted.sum()
        if self._is_logged_step():
            log_training(
                self,
                loss,
                logit_scale,
                logit_bias,
                duplicate_pairs,
                self._num_substituted,
                self.step_timer,
            )
        if self.step_check is None:
            return loss
        return self.step_check.look(loss, image_features, text_features, batch.sample_ids)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, log the norm before clipping, and judge the step by it.

        Lightning's own clipping refuses fused AdamW under mixed precision.
        """
        is_logged, check = self._is_logged_step(), self.step_check
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        is_wanted = is_logged or check is not None or is_scaled
        norm = clip(self.parameters(), gradient_clip_val, gradient_clip_algorithm, is_wanted)
        if norm is not None and is_logged:
            self.log("train/grad_norm", norm)
        self.is_step_skipped = None
        if norm is not None and check is not None:
            self.is_step_skipped = check.decide(optimizer, norm)
        elif norm is not None and is_scaled:
            self.is_step_skipped = ~norm.isfinite()

    def _is_logged_step(self) -> bool:
        """Whether the step under way is one Lightning writes to its loggers."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning
        return bool(every) and (self.global_step + 1) % every == 0
