"""Lightning module of a dual encoder: towers, loss, scale and bias, metrics, optimizer."""

import logging
import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from dist_siglip.data import ImageTextBatch, Preprocessing
from dist_siglip.data.samples.patches import padding_of
from dist_siglip.distributed import copy_from_first_rank, max_over_ranks, resolve_group
from dist_siglip.errors import UserError
from dist_siglip.losses import LogitConfig, LogitScaleBias, SigLipLoss, TeacherFeatures
from dist_siglip.losses.arguments import (
    prefix_dims_of,
    uses_picture_ids,
)
from dist_siglip.losses.calibration import (
    describe_batch_change,
)
from dist_siglip.losses.prefixes import check_dims
from dist_siglip.metrics import Evaluation, PairEvaluation
from dist_siglip.models import (
    build_dual_encoder,
    evaluation_mode,
    recorded_global_batch,
    refuse_batch_norm,
)
from dist_siglip.models import compile_towers as translate_towers
from dist_siglip.models.dual_encoder import check_micro_batch
from dist_siglip.models.tuning import TowerConfig, tune_towers
from dist_siglip.objectives import Objective
from dist_siglip.training.module.calibration import (
    CalibratedModule,
    calibrate_to_training_pairs,
    warn_of_mining,
)
from dist_siglip.training.module.captions import loss_of_captions, part_negatives
from dist_siglip.training.module.curation import CurationConfig, curate
from dist_siglip.training.module.ema_teacher import (
    TEACHER_MOMENTUM,
    EmaTeacher,
    refuse_sinkhorn,
    view_rule_of,
    with_teacher,
)
from dist_siglip.training.module.locked_features import settle_identities
from dist_siglip.training.module.objectives import Terms, build_objectives, naming_terms
from dist_siglip.training.module.placement import receive_values, shard_module
from dist_siglip.training.module.run_module import configure
from dist_siglip.training.module.teachers import TeacherConfig, Teachers
from dist_siglip.training.optim import OptimConfig, ParameterRule

logger = logging.getLogger(__name__)


class SigLipModule(CalibratedModule):
    """Trains a dual encoder on image-text pairs.

    Args:
        model: an open_clip architecture: built-in name, path of a JSON config, ``local-dir:PATH``
            or ``hf-hub:ORG/REPO`` (the last two bring weights).
        pretrained: weights: an open_clip tag of the model, a local .safetensors, .pt, .bin or
            .ckpt file, or the folder of a run, of which the newest checkpoint counts. Null starts
            at random, but for a text tower of Hugging Face (hf_model_name in the model's config),
            whose own weights are taken, and an image tower of timm whose config says
            timm_model_pretrained: true.
        weights_average: of weights with an average beside them (state_dict_ema, checkpoints of
            Lightning's weight averaging and ours): true takes the average, false the weights. Null
            takes what the file puts first: the average in checkpoints of Lightning and ours.
        loss: module called with (image_features, text_features, logit_scale, logit_bias), given
            as a class path. Null is ``dist_siglip.losses.SigLipLoss``. If its ``uses_caption_ids``
            is True it also gets the keyword caption_ids, likewise with ``uses_picture_ids``; if its
            ``uses_logit_bias`` is False the bias is frozen.
        objectives: what trains beside the loss on patch tokens of the image tower, each by its
            class path, such as ``dist_siglip.objectives.Captioning``, with ``weight``, ``start``
            and ``ramp_steps``. Null is the loss alone.
        logits: start and training of scale and bias.
        optim: optimizer and learning rate.
        image_size: pixels, replaces the model's. Null keeps it.
        context_length: tokens of a text, replaces the model's. Null keeps it.
        kept_positions: first text positions that stay as they are where context_length stretches
            the others, so that short captions keep their features in towers that read from left to
            right (CLIP). Long-CLIP keeps 20 of 77; 0 stretches all.
        num_patches: most patches of a picture in evaluations, for an image tower of pictures of any
            shape (NaFlex); a SigLIP tower of timm becomes one. Null: what the model is. Lengths of
            training are those of ``data.sequence_lengths``.
        patch_dropout: share of image patches left out in training. Null keeps the model's.
        gradient_checkpointing: recompute the blocks of the towers in backward to save memory.
        compile_towers: translate both towers, or their blocks if they are sharded, with
            torch.compile at their first use in training or an evaluation.
        global_batch_size: pairs of a training batch over all ranks; the validation loss is that
            of a random batch of this size. The command line takes it from the data. With
            ``curation`` pairs that are loaded; the attribute is the number of those that train.
        micro_batch_size: pairs of a rank that a tower encodes together. The loss still sees the
            whole batch at once and the gradients are the same, for one more forward pass. Null
            encodes the local batch at once.
        micro_batch_patches: in place of ``micro_batch_size`` for a NaFlex tower: patches of a rank
            that it encodes together, padding included, so that a step of longer pictures takes more
            micro-batches.
        calibration_pairs: training pairs over all ranks, about 4096, to fit scale and bias to
            before the first step of a new run: for weights of another loss or global batch. Null
            leaves scale and bias as they are.
        image_tower: what of the image tower trains, and how fast.
        text_tower: what of the text tower trains, and how fast.
        prefix_dims: prefixes of the dimension whose recall, margin and gap an evaluation measures,
            as they are cut and after a rotation. Null: those of the loss, if it has any.
        teacher_momentum: of the average of image tower and heads that objectives such as
            ``dist_siglip.objectives.SelfDistillation`` learn of, in [0, 1). Its half-life is
            ln 2 / (1 - momentum) steps; a thousandth of the run is a start.
        teachers: whose logits a loss such as ``dist_siglip.losses.DistillationLoss`` learns, each
            live or from stored rows; several are averaged. Or the reference of ``curation``. Null:
            none.
        curation: pairs of each batch that train: those that the model has most to learn from,
            beside ``teachers``. The batch of the data is then the larger one they are chosen from.
            Null: all.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        weights_average: bool | None = None,
        loss: nn.Module | None = None,
        objectives: list[Objective] | None = None,
        logits: LogitConfig = LogitConfig(),  # noqa: B008 - frozen dataclass
        optim: OptimConfig = OptimConfig(),  # noqa: B008 - frozen dataclass
        image_size: int | None = None,
        context_length: int | None = None,
        kept_positions: int = 0,
        num_patches: int | None = None,
        patch_dropout: float | None = None,
        gradient_checkpointing: bool = False,
        compile_towers: bool = False,
        global_batch_size: int | None = None,
        micro_batch_size: int | None = None,
        micro_batch_patches: int | None = None,
        calibration_pairs: int | None = None,
        image_tower: TowerConfig = TowerConfig(),  # noqa: B008 - frozen dataclass
        text_tower: TowerConfig = TowerConfig(),  # noqa: B008 - frozen dataclass
        prefix_dims: list[int] | None = None,
        teachers: list[TeacherConfig] | None = None,
        teacher_momentum: float = TEACHER_MOMENTUM,
        curation: CurationConfig | None = None,
    ) -> None:
        super().__init__()
        built = build_dual_encoder(
            model,
            pretrained,
            image_size=image_size,
            context_length=context_length,
            kept_positions=kept_positions,
            weights_average=weights_average,
            num_patches=num_patches,
            patch_dropout=patch_dropout,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.built = built
        self.towers = built.encoder
        tuned = tune_towers(
            self.towers,
            image_tower=image_tower,
            text_tower=text_tower,
            never_loaded=built.random_parameters,
        )
        self._rules = {f"towers.{name}": ParameterRule(*how) for name, how in tuned.items()}
        self.loss: nn.Module = SigLipLoss() if loss is None else loss
        trained = prefix_dims_of(self.loss)
        if trained:
            check_dims(trained, built.embed_dim)
        self.prefix_dims = trained if prefix_dims is None else tuple(prefix_dims)
        if self.prefix_dims:
            check_dims(self.prefix_dims, built.embed_dim)
        self.logits = LogitScaleBias.from_config(
            logits, start_scale=built.start_scale, start_bias=built.start_bias
        )
        self.curation, self.loaded_batch_size = curation, global_batch_size
        if curation is not None:
            curation.check(self.loss)
            global_batch_size = global_batch_size and curation.size_of(global_batch_size)
        self.teachers = Teachers(
            teachers or [], built, self.loss, is_reference=curation is not None
        )
        self.inputs = replace(Preprocessing.of(built), teachers=self.teachers.inputs)
        self.optim = optim
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.micro_batch_patches = micro_batch_patches
        check_micro_batch(built.patches, micro_batch_patches, micro_batch_size)
        self.calibration_pairs = calibration_pairs
        if micro_batch_size is not None:
            refuse_batch_norm(self.towers, micro_batch_size)
        if not self._uses_bias:
            self._freeze_bias()
        if calibration_pairs is None and logits.start_bias is None:
            self._compare_global_batch(built.trained_global_batch, f"pretrained ({pretrained})")
        self.evaluation = PairEvaluation()
        self.objectives = build_objectives(objectives or [], built)
        if asking := with_teacher(self.by_name):
            refuse_sinkhorn(asking, micro_batch_size)
            self.inputs = replace(self.inputs, views=view_rule_of(asking))
            self.teacher = EmaTeacher(self.towers, asking, teacher_momentum)
        self._is_configured = False
        self._compiles = compile_towers

    def configure_model(self) -> None:
        """Compile towers if that is asked for; shard parameters if the strategy has a mesh.

        Ranks that were built without values get those of the first rank, on their device.
        """
        if self._is_configured:
            return
        self._is_configured = True
        awaits, some_await = self.built.awaits_weights, False
        if resolve_group(None) is not None:
            some_await = bool(max_over_ranks(torch.tensor(float(awaits), device=self.device)))
        elif awaits:
            raise UserError(
                "RANK or SLURM_PROCID of the environment says that this is not the first process, "
                "and the Trainer runs alone; unset it"
            )
        whole: dict[str, Any] = {}
        if self.device_mesh is not None:
            if some_await and not awaits:
                whole = self.state_dict()
            precision = str(self.trainer.precision)
            shard_module(self, self.device_mesh, precision=precision, compile_blocks=self._compiles)
            self._is_sharded = True
        elif self._compiles:
            translate_towers(self.towers)
            self.teachers.compile()
            if self.teacher is not None:
                self.teacher.compile_tower("inductor")
            for objective in self.by_name.values():
                objective.compile_heads("inductor")
        if some_await:
            values = self.built.start_scale, self.built.start_bias
            start = torch.tensor(values, dtype=torch.float64).to(self.device)
            receive_values(self, self.device, has_values=not awaits, whole=whole, beside=[start])
            scale, bias = start.tolist()
            self.built = replace(
                self.built, start_scale=scale, start_bias=bias, awaits_weights=False
            )

    def cpu(self) -> Any:
        """Move to the CPU; what has no values yet stays, so that a failed start says why."""
        return self if self.built.awaits_weights else super().cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down the global batch of scale and bias, too."""
        checkpoint["global_batch_size"] = self.global_batch_size
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the global batch, too."""
        super().on_load_checkpoint(checkpoint)
        self._compare_global_batch(recorded_global_batch(checkpoint), "the checkpoint")

    def setup(self, stage: str) -> None:
        """Check that features of the data module are those of a locked tower of this model."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        self.check_data(data)
        if stage == "fit":
            self.check_ranks(self.trainer.world_size)
        settle_identities(data, are_used=uses_picture_ids(self.loss))

    def check_data(self, data: object) -> None:
        """Check what a data module brings for teachers, too.

        Raises:
            UserError: as ``Teachers.check_data``.
        """
        super().check_data(data)
        self.teachers.check_data(data)

    def check_ranks(self, world_size: int) -> None:
        """Check that ranks can share the pairs that ``curation`` leaves.

        Raises:
            UserError: as ``CurationConfig.size_of``.
        """
        if self.curation is not None and self.loaded_batch_size:
            self.curation.size_of(self.loaded_batch_size, world_size)

    def on_fit_start(self) -> None:
        """Tell Lightning that locked parts are in evaluation mode on purpose."""
        if self.trainer.is_global_zero:
            self.teachers.warn_of_batch(self.global_batch_size)
        if self.towers.is_kept_in_evaluation or self.teacher is not None:
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def on_train_start(self) -> None:
        """Calibrate a new run if ``calibration_pairs`` asks for it."""
        super().on_train_start()
        if self.steps_done:
            return
        if self.trainer.is_global_zero:
            warn_of_mining(self.loss, is_calibrated=self.calibration_pairs is not None)
        if self.calibration_pairs is not None:
            calibrate_to_training_pairs(self, self.calibration_pairs)
        elif self.num_negatives and self._uses_bias and self.trainer.is_global_zero:
            logger.warning(
                "captions.negatives: %d more texts for each pair; the best bias is about %+.1f "
                "away; set model.calibration_pairs to begin there",
                self.num_negatives,
                -math.log1p(self.num_negatives),
            )

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images and texts to L2-normalised features, (B, D) each, float32."""
        return self.towers(images, texts)

    @naming_terms
    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """Return this rank's share of the global loss; the mean over ranks is the loss."""
        counted = self.begin_objectives()
        terms: Terms = {}
        teachers: TeacherFeatures | None = None
        self.step_timer.begin_encoding(self.device)
        if self.curation is not None:
            batch, teachers = self._curated(batch, self.curation)
        if counted:
            image_features, text_features, terms = self.encode_with_terms(counted, batch)
        else:
            image_features, text_features = self.encode(batch._replace(texts=batch.all_texts()))
        if self.teachers and self.curation is None:
            teachers = self.teachers.features_of(batch, self.micro_batch_size)
        self.step_timer.end_encoding()
        # Under autocast products and exchange are in the towers' precision, logits in float32.
        device_type = image_features.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            image_features, text_features = image_features.to(dtype), text_features.to(dtype)
            if teachers is not None:
                image, text = teachers.image.to(dtype), teachers.text.to(dtype)
                teachers = teachers._replace(image=image, text=text)
        text_features, negatives = part_negatives(text_features, batch)
        logit_scale, logit_bias = self.logits()
        if not self._uses_bias:
            logit_bias = logit_bias.detach()
        loss, duplicate_pairs, loss_terms = loss_of_captions(
            self.loss,
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            batch=batch,
            weights=self.caption_weights,
            nonfinite="raise" if self.step_check is None else "propagate",
            teachers=teachers,
            negative_text_features=negatives,
        )
        self.log_terms(loss_terms)
        self.log_terms(padding_of(batch.images))
        if self.objectives:
            loss = self.add_objectives(loss, terms, is_sharded=self._is_sharded)
        return self.finish_step(
            batch,
            loss,
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            duplicate_pairs=duplicate_pairs,
        )

    def _curated(
        self, batch: ImageTextBatch, config: CurationConfig
    ) -> tuple[ImageTextBatch, TeacherFeatures | None]:
        """Choose the pairs that train; log what they promise."""
        with evaluation_mode(self.towers):
            chosen, teachers, terms = curate(
                batch,
                self.encode,
                *self.logits(),
                teachers=self.teachers,
                loss=self.loss,
                config=config,
                step=self.global_step,
                micro_batch_size=self.micro_batch_size,
            )
        self.log_terms(terms)
        left_out = batch.substituted.sum() - chosen.substituted.sum()
        self._num_substituted = self._num_substituted + left_out
        return chosen, teachers

    def on_validation_epoch_start(self) -> None:
        """Forget the rows of the last evaluation; evaluate one model on all ranks."""
        self.evaluation.reset()
        self.forget_measures()
        # Running statistics of BatchNorm differ between ranks; a checkpoint holds the first one's.
        copy_from_first_rank(self.towers.buffers())

    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> None:
        """Keep the features of one batch of this rank."""
        image_features, text_features = self.encode_and_measure(batch)
        self.evaluation.update(
            image_features,
            text_features,
            batch.caption_ids,
            batch.caption_ids,
            batch.sample_ids,
            batch.valid,
            picture_ids=batch.picture_ids,
        )

    def on_validation_epoch_end(self) -> None:
        """Evaluate all ranks' pairs on one gallery and log the metrics as val/..."""
        logit_scale, logit_bias = (value.item() for value in self.logits())
        evaluation = self.evaluation.compute(
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            global_batch_size=self.global_batch_size,
            prefix_dims=self.prefix_dims,
        )
        self.evaluation.reset()
        metrics = {
            **evaluation.metrics,
            **self.compute_measures(),
            **self.available_pairs(),
            "logit_scale": logit_scale,
            "logit_bias": logit_bias,
            "learned_relative_bias": -logit_bias / logit_scale,
        }
        self.last_evaluation = Evaluation(metrics, evaluation.arrays)
        self.last_evaluated_step = self.steps_done
        # Every rank has the same numbers; nothing is left to synchronise.
        values = {f"val/{name}": value for name, value in metrics.items()}
        self.log_dict(values, sync_dist=False, rank_zero_only=False)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and its schedule, stepped every optimizer step."""
        return configure(self, self.optim, self._rules, is_sharded=self._is_sharded)

    def _compare_global_batch(self, trained: int | None, source: str) -> None:
        """Warn if scale and bias were trained for another global batch."""
        now = self.global_batch_size
        if self._uses_bias and trained is not None and now is not None and trained != now:
            logger.warning("%s %s", source, describe_batch_change(trained, now))
