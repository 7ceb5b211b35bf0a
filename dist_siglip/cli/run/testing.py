"""``test``: a checkpoint, or a model by name, on the benchmarks of a configuration.

Takes the configuration of a run and the group ``benchmarks``, which a second file may hold, or the
name of a suite and the folder of its data sets. It needs no training or validation data and trains
nothing.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from dist_siglip.evaluation.shards import LoadSettings
from dist_siglip.evaluation.suites import (
    SuiteMember,
    SuiteValues,
    is_counted,
    main_metric,
    read_suite,
    read_values,
    suite_averages,
)
from dist_siglip.health.start_check import check_ranks_started_alike
from dist_siglip.runs import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.best_effort import best_effort
from dist_siglip.training.callbacks import Benchmarks
from dist_siglip.training.callbacks.benchmarks import plain
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
    suite_members: Sequence[SuiteMember] = ()
    compared: Mapping[str, dict[str, float]] = MappingProxyType({})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """One command."""
        return {"test": {"model", "dataloaders", "datamodule", "verbose", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add suites, and how to print."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--suite",
            type=str,
            default=None,
            help="Data sets of suite_folder that are run beside benchmarks.tasks: datacomp, vtab, "
            "vtab+, imagenet_robustness, retrieval, or all that are there.",
        )
        parser.add_argument(
            "--suite_folder",
            type=str,
            default=None,
            help="Folder of CLIP_benchmark's webdatasets, wds_NAME/test/*.tar.",
        )
        parser.add_argument(
            "--suite_probes",
            action="store_true",
            help="A linear probe, too, of data sets with train/*.tar.",
        )
        parser.add_argument(
            "--suite_batch_size",
            type=int,
            default=256,
            help="Pictures of the suite that a rank encodes together.",
        )
        parser.add_argument(
            "--suite_workers", type=int, default=2, help="Loader processes of each rank."
        )
        parser.add_argument(
            "--compare",
            type=str | list[str],
            default=None,
            help="Run folder, or list of them, whose results of the suite stand beside.",
        )
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
        self._find_suite()
        if not self.benchmarks.tasks:
            raise UserError(
                "benchmarks.tasks (null) must name at least one, e.g. class_path: "
                "dist_siglip.evaluation.Retrieval with init_args: {shards: ...}; or give suite"
            )
        self.benchmarks.check(self.model.towers)
        self.start_checkpoint = self.choose_to_look_at()
        self.benchmarks.weights_name = self._get(self.config, "model.pretrained")
        settings = yaml.safe_load(self._parser("test").dump(self._get_all(), skip_none=False))
        world_size = self.trainer.num_nodes * self.trainer.num_devices
        self.model.start_facts = self._start_facts(settings, world_size)

    def _find_suite(self) -> None:
        """Add the data sets of the suite to the benchmarks."""
        names = ("suite", "suite_folder", "compare", "suite_probes")
        suite, folder, runs, probes = (self._get(self.config, name) for name in names)
        if suite is None:
            for name, value in zip(names[1:], (folder, runs, probes), strict=True):
                if value:
                    raise UserError(f"{name} ({value}) needs suite; give suite, such as datacomp")
            return
        if folder is None:
            raise UserError(
                f"suite ({suite}) needs suite_folder, the folder of CLIP_benchmark's webdatasets"
            )
        self.suite_members = read_suite(
            suite,
            folder,
            probes=probes,
            loading=LoadSettings(
                local_batch_size=self._get(self.config, "suite_batch_size"),
                workers_per_rank=self._get(self.config, "suite_workers"),
            ),
        )
        self.compared = {
            run: read_values(suite, RunFolder(Path(run)).benchmarks, self.suite_members)
            for run in ([runs] if isinstance(runs, str) else runs or ())
        }
        added = [member.benchmark for member in self.suite_members]
        self.benchmarks.tasks = [*self.benchmarks.tasks, *added]

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
        averages = self._average(results)
        if self._get(self.config, "json"):
            sys.stdout.write(json_of(results, averages))
        else:
            of_suite = {member.benchmark.name for member in self.suite_members}
            others = {name: each for name, each in results.items() if name not in of_suite}
            if others:
                _print(others)
            if averages is not None:
                _print_suite(averages, results, self.suite_members, self.compared)
            print_path("results in", self.folder.benchmarks)

    def _average(self, results: Mapping[str, BenchmarkResult]) -> SuiteValues | None:
        """Write the averages of the suite; None without one."""
        if not self.suite_members:
            return None
        suite = self._get(self.config, "suite")
        found = SuiteValues.of(suite, self.suite_members, results)
        path = self.folder.benchmarks / "suites" / f"{suite}.json"
        with best_effort(f"the averages of suite {suite}"):
            write_atomically(path, json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n")
        return found


def json_of(results: Mapping[str, BenchmarkResult], averages: SuiteValues | None) -> str:
    """Metrics by benchmark, and the averages of a suite, as one JSON object."""
    content: dict[str, Any] = {name: plain(result.metrics) for name, result in results.items()}
    if averages is not None:
        content["averages"] = averages.as_json()["averages"]
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _print(results: Mapping[str, BenchmarkResult]) -> None:
    table = Table()
    for column in ("benchmark", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, result in results.items():
        for place, (metric, value) in enumerate(result.metrics.items()):
            table.add_row("" if place else name, metric, f"{value:.4f}")
        table.add_section()
    Console().print(table)


def _print_suite(
    found: SuiteValues,
    results: Mapping[str, BenchmarkResult],
    members: Sequence[SuiteMember],
    compared: Mapping[str, dict[str, float]],
) -> None:
    """Print a line for each data set and each average, with the values of other runs beside."""
    table = Table(title=f"suite {found.suite}")
    for column in ("data set", "metric", "value", *map(_short_name, compared)):
        is_text = column in ("data set", "metric")
        table.add_column(column, justify="left" if is_text else "right")

    def shown(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{value:.4f}"

    for key, benchmark in members:
        name, value = main_metric(found.suite, key, results[benchmark.name])
        beside = [shown(values.get(key)) for values in compared.values()]
        if not is_counted(benchmark):
            name, beside = "lp_acc1", ["-"] * len(compared)
            value = results[benchmark.name].metrics["lp_acc1"]
        table.add_row(benchmark.name, name, shown(value), *beside)
    table.add_section()
    of_others = [suite_averages(found.suite, values) for values in compared.values()]
    for name, each in suite_averages(found.suite, found.values).items():
        counted = f"{each.present} of {each.total} data sets"
        beside = [
            f"{shown(other[name].value)}{'' if other[name].present == each.present else '*'}"
            for other in of_others
        ]
        table.add_row(name, counted, shown(each.value), *beside)
    if any("*" in cell for column in table.columns for cell in map(str, column.cells)):
        table.caption = "* mean of another number of data sets"
    Console().print(table)


def _short_name(run: str) -> str:
    return Path(run).resolve().name
