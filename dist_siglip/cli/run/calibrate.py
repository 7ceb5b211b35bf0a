"""``calibrate``: the scale and bias that suit a model, its data and its global batch.

Takes the configuration of a run, embeds some of its pairs with the model as configured, on as
many devices as configured, and prints what to set. It trains nothing and writes nothing.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.run.trainer_parts import draws_bar, plugins
from dist_siglip.cli.run.training import TrainingCLI, cli_settings, logger
from dist_siglip.data import (
    ImageTextBatch,
    PairDataset,
    PairSample,
    evaluation_transform,
    training_transform,
)
from dist_siglip.data.index.pairs import check_ranks_agree
from dist_siglip.data.samples.batch import picture_ids_of
from dist_siglip.errors import UserError
from dist_siglip.losses.calibration import Calibration
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.datamodule.calibration_subset import subset_loader
from dist_siglip.training.module import SigLipModule


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``calibrate`` and run it."""
    set_up_logging()
    CalibrationCLI(
        CalibrationModule,
        CalibrationData,
        trainer_class=CalibrationTrainer,
        args=[command, *arguments],
        **cli_settings(),
    )
    return 0


class CalibrationTrainer(Trainer):
    """A Trainer with the method that the command is named after."""

    def calibrate(self, ckpt_path: str | None = None) -> None:
        """Fit scale and bias to a model, its data and its global batch.

        Args:
            ckpt_path: checkpoint to calibrate. Null takes the newest of run_dir, else the model
                as built.
        """
        raise NotImplementedError("CalibrationCLI.calibrate does it")


class CalibrationModule(SigLipModule):
    """Fits scale and bias where its parent evaluates."""

    calibration: Calibration | None = None

    def on_validation_epoch_start(self) -> None:
        """Forget the rows of the last time."""
        self._rows: list[tuple[Tensor, ...]] = []

    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> None:
        """Keep the features of one batch of this rank."""
        features = self.towers(batch.images, batch.texts)
        self._rows.append((*features, batch.caption_ids, picture_ids_of(batch)))

    def on_validation_epoch_end(self) -> None:
        """Fit to the pairs of all ranks."""
        self.calibration = self.calibrate(
            *(torch.cat(column) for column in zip(*self._rows, strict=True))
        )

    def _compare_global_batch(self, trained: int | None, source: str) -> None:
        """Say nothing: calibrating is what the warning would recommend."""


class CalibrationData(ImageTextDataModule):
    """A subset of the training or validation pairs, served where evaluation pairs are."""

    split: Literal["train", "val"] = "train"
    num_pairs = 4096
    subset: PairDataset | None = None

    def prepare_data(self) -> None:
        """Index the shards, on the first rank of each node."""
        self.tables.of(f"{self.split}_shards")

    def setup(self, stage: str) -> None:
        """Build the data set of the split, with the transform of the split."""
        if self.inputs is None:
            raise UserError("inputs (null) must be the preprocessing of the model")
        name = f"{self.split}_shards"
        check_ranks_agree(self.tables.of(name), name=name, device=self._device())
        is_training = self.split == "train"
        transform = evaluation_transform(self.inputs)
        if is_training:
            transform = training_transform(
                self.inputs, self.train_crop_scale, scaled_decode=self.scaled_decode
            )
        self.subset = self.dataset_of(name, transform, is_evaluation=not is_training)

    def val_dataloader(self) -> DataLoader[PairSample]:
        """Loader of this rank's share of the subset."""
        if self.subset is None:
            raise RuntimeError("call setup before val_dataloader")
        return subset_loader(self.subset, self.num_pairs, self, self._world())


class CalibrationCLI(TrainingCLI):
    """Parses the configuration of a run, and three options of its own."""

    model: CalibrationModule
    datamodule: CalibrationData

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """One command."""
        return {"calibrate": set()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what to look at and how to print."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--pairs", type=int, default=4096, help="Pairs to fit to, over all ranks."
        )
        parser.add_argument(
            "--split", type=Literal["train", "val"], default="train", help="Which shards they are."
        )
        parser.add_argument("--json", action="store_true", help="Print one JSON object.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a Trainer that logs and writes nothing and looks at every pair."""
        settings = self._get(self.config_init, "trainer")
        return LightningCLI.instantiate_trainer(
            self,
            logger=False,
            limit_val_batches=1.0,
            plugins=plugins(settings),
            enable_progress_bar=draws_bar(settings),
            **kwargs,
        )

    def before_calibrate(self) -> None:
        """Check data and checkpoint before any rank is started."""
        self.datamodule.split = self._get(self.config, "split")
        self.datamodule.num_pairs = self._get(self.config, "pairs")
        if self.datamodule.num_pairs < 2:
            raise UserError(f"pairs ({self.datamodule.num_pairs}) must be at least 2, better 4096")
        self.model.check_can_calibrate()
        self.datamodule.prepare_data()
        self.start_checkpoint = self.choose_to_look_at()

    def calibrate(self, model: LightningModule, ckpt_path: str | None = None, **_: Any) -> None:
        """Embed, fit, print."""
        source = self.start_checkpoint
        logger.info("calibrating %s", source or "the model as built: no checkpoint in run_dir")
        self.trainer.validate(
            model, datamodule=self.datamodule, ckpt_path=source, verbose=False, weights_only=True
        )
        if self.trainer.is_global_zero and self.model.calibration is not None:
            facts = self._facts(self.model.calibration)
            if self._get(self.config, "json"):
                sys.stdout.write(json.dumps(facts) + "\n")
            else:
                _print(facts)

    def _facts(self, fitted: Calibration) -> dict[str, float | int | str | None]:
        scale_before, bias_before = (value.item() for value in self.model.logits())
        data = self.datamodule
        num_samples = data.tables.of(f"{data.split}_shards").num_samples
        return {
            "checkpoint": None if self.start_checkpoint is None else str(self.start_checkpoint),
            "split": data.split,
            "pairs": min(data.num_pairs, num_samples),
            "global_batch_size": self.model.global_batch_size,
            "logit_scale": fitted.scale,
            "logit_bias": fitted.bias,
            "relative_bias": fitted.relative_bias,
            "expected_loss": fitted.loss_after,
            "logit_scale_before": scale_before,
            "logit_bias_before": bias_before,
            "relative_bias_before": -bias_before / scale_before,
            "expected_loss_before": fitted.loss_before,
        }


def _print(facts: dict[str, Any]) -> None:
    table = Table(
        title=f"{facts['pairs']} pairs ({facts['split']}), global batch "
        f"{facts['global_batch_size']}"
    )
    for column in ("", "before", "fitted"):
        table.add_column(column, justify="right" if column else "left")
    for label, key, form in (
        ("logit scale", "logit_scale", "{:.4f}"),
        ("logit bias", "logit_bias", "{:.4f}"),
        ("relative bias", "relative_bias", "{:.4f}"),
        ("expected loss", "expected_loss", "{:.4f}"),
    ):
        table.add_row(label, form.format(facts[f"{key}_before"]), form.format(facts[key]))
    Console().print(table)
    sys.stdout.write(
        f"--model.logits.start_scale {facts['logit_scale']:.6g} "
        f"--model.logits.start_bias {facts['logit_bias']:.6g}\n"
    )
