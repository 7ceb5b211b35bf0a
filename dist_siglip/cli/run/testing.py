"""``test``: a checkpoint, or a model by name, on the benchmarks of a configuration.

Takes the configuration of a run and the group ``benchmarks``, which a second file may hold. It
needs no training or validation data and trains nothing.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.run.trainer_parts import draws_bar, plugins
from dist_siglip.cli.run.training import TrainingCLI, cli_settings, logger
from dist_siglip.cli.table import print_path
from dist_siglip.distributed import copy_from_first_rank, leave_process_groups
from dist_siglip.errors import UserError
from dist_siglip.evaluation import BenchmarkResult
from dist_siglip.health.start_check import check_ranks_started_alike
from dist_siglip.training.callbacks import Benchmarks
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module import SigLipModule

_DESCRIPTION = (
    "Run benchmarks on a checkpoint of a run, or on a model by name; needs no other data. Without "
    "ckpt_path the newest checkpoint of run_dir is taken, else the model as built."
)


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``test`` and run it."""
    set_up_logging()
    settings = cli_settings()
    settings["parser_kwargs"][command] = {"description": _DESCRIPTION}
    BenchmarkCLI(BenchmarkedModule, ImageTextDataModule, args=[command, *arguments], **settings)
    leave_process_groups()
    return 0


class BenchmarkedModule(SigLipModule):
    """The model of a run as Lightning tests it: the callback ``Benchmarks`` does all the work."""

    start_facts: Mapping[str, str] = MappingProxyType({})

    def setup(self, stage: str) -> None:
        """Refuse ranks that were started differently, before they wait for each other."""
        check_ranks_started_alike(self.start_facts)

    def on_test_epoch_start(self) -> None:
        """Evaluate one model on all ranks, as a validation does."""
        copy_from_first_rank(self.towers.buffers())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Do nothing: the one batch is there because Lightning wants one."""


class BenchmarkCLI(TrainingCLI):
    """Parses the configuration of a run, and one option of its own."""

    model: BenchmarkedModule

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """One command."""
        return {"test": {"model", "dataloaders", "datamodule", "verbose", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add how to print."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", action="store_true", help="Print one JSON object.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a Trainer that writes into the run folder, but not into its logs."""
        settings = self._get(self.config_init, "trainer")
        return LightningCLI.instantiate_trainer(
            self,
            default_root_dir=str(self.folder.path),
            logger=False,
            limit_test_batches=1.0,
            plugins=plugins(settings),
            enable_progress_bar=draws_bar(settings),
            **kwargs,
        )

    @property
    def benchmarks(self) -> Benchmarks:
        """The callback that runs them."""
        return self._get(self.config_init, "benchmarks")

    def before_test(self) -> None:
        """Check benchmarks and checkpoint before any rank is started."""
        if not self.benchmarks.tasks:
            raise UserError(
                "benchmarks.tasks (null) must name at least one, e.g. class_path: "
                "dist_siglip.evaluation.Retrieval with init_args: {shards: ...}"
            )
        self.benchmarks.check(self.model.towers)
        self.start_checkpoint = self.choose_to_look_at()
        self.benchmarks.weights_name = self._get(self.config, "model.pretrained")
        settings = yaml.safe_load(self._parser("test").dump(self._get_all(), skip_none=False))
        world_size = self.trainer.num_nodes * self.trainer.num_devices
        self.model.start_facts = self._start_facts(settings, world_size)

    def test(self, model: LightningModule, **_: Any) -> None:
        """Test the given checkpoint, else the newest of the run, else the model as built."""
        source = self.start_checkpoint
        logger.info("testing %s", source or "the model as built: no checkpoint in run_dir")
        nothing: DataLoader[Tensor] = DataLoader([torch.zeros(1)])  # type: ignore[arg-type]
        self.trainer.test(
            model, dataloaders=nothing, ckpt_path=source, verbose=False, weights_only=True
        )
        if not self.trainer.is_global_zero:
            return
        results = self.benchmarks.results
        if self._get(self.config, "json"):
            metrics = {name: result.metrics for name, result in results.items()}
            sys.stdout.write(json.dumps(metrics, indent=1) + "\n")
        else:
            _print(results)
            print_path("results in", self.folder.benchmarks)


def _print(results: Mapping[str, BenchmarkResult]) -> None:
    table = Table()
    for column in ("benchmark", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, result in results.items():
        for place, (metric, value) in enumerate(result.metrics.items()):
            table.add_row("" if place else name, metric, f"{value:.4f}")
        table.add_section()
    Console().print(table)
