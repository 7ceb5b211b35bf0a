"""``fit`` and ``validate``: LightningCLI with our defaults, a run folder, and checks first.

Constructor signatures are the schema; YAML holds what differs from them. Before any rank is
started and before anything is written, the first process checks what can be checked: data,
batch arithmetic, the checkpoint to go on from, and that the folder holds no other run.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.seed import isolate_rng

from dist_siglip.cli import EXIT_COLLAPSED, EXIT_INTERRUPTED, EXIT_SAVED
from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.parser import TrainingParser
from dist_siglip.cli.ranges import check_ranges
from dist_siglip.cli.run.from_run import Origin, folder_of_settings, read_origin
from dist_siglip.cli.run.start_point import (
    check_data_once_per_node,
    check_same_run,
    checkpoint_to_look_at,
    checkpoint_to_start_from,
    describe_interrupt,
    evaluated_step,
    folder_to_run_in,
    keep_pictures,
    once_per_node,
    owes_evaluation,
    recorded_precision,
    schedule_change,
    set_aside_unreadable,
    steps_behind,
)
from dist_siglip.cli.run.trainer_parts import (
    CONFIGURED,
    TRAINER_DEFAULTS,
    check_gpus,
    code_for_launcher,
    default_callbacks,
    draws_bar,
    more_loggers,
    plugins,
    precision,
    scratch_folder,
    spare_copies,
    strategy,
)
from dist_siglip.cli.table import print_evaluation
from dist_siglip.distributed import leave_process_groups
from dist_siglip.distributed.world import is_first_process
from dist_siglip.errors import UserError
from dist_siglip.health.callback import end_children
from dist_siglip.health.start_check import describe_start
from dist_siglip.runs import RunFolder, collect_provenance
from dist_siglip.runs.checkpoints.io import read_values
from dist_siglip.system import signals
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.best_effort import best_effort
from dist_siglip.system.process_lock import ProcessLock
from dist_siglip.system.redaction import redact
from dist_siglip.training.callbacks import CollapseAlarm, MetricsLog, Preemption
from dist_siglip.training.callbacks.loggers import attach_report, name_trackers, tell_settings
from dist_siglip.training.callbacks.preemption import reason_of_early_end
from dist_siglip.training.datamodule import ImageTextDataModule, refuse_accumulation
from dist_siglip.training.module import SigLipModule
from dist_siglip.training.optim import how_to_go_on
from dist_siglip.training.strategies import FullyShardedStrategy

logger = logging.getLogger(__name__)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run ``fit`` or ``validate``."""
    done = train([command, *arguments])
    code = done.exit_code
    done.let_go()
    leave_process_groups()
    return code


def train(arguments: list[str]) -> "TrainingCLI":
    """Parse, check and run; ``arguments`` begin with the command."""
    set_up_logging()
    module = SigLipModule if is_first_process() else ReceivingModule
    return TrainingCLI(module, ImageTextDataModule, args=arguments, **cli_settings())


class ReceivingModule(SigLipModule):
    """The module of a rank that gets its weights from the first: it reads and allocates none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            super().__init__(*args, **kwargs)


def cli_settings() -> dict[str, Any]:
    """Return what every command line on a ``TrainingCLI`` has in common."""
    return {
        "parser_class": TrainingParser,
        "parser_kwargs": {"prog": "dist-siglip"},
        "trainer_defaults": dict(TRAINER_DEFAULTS),
        "seed_everything_default": 0,
        "save_config_callback": None,
        "auto_configure_optimizers": False,
        "load_from_checkpoint_support": False,
    }


class TrainingCLI(LightningCLI):
    """Wires module, data and Trainer to a run folder."""

    model: SigLipModule
    datamodule: ImageTextDataModule
    trainer: Trainer
    _lock: ProcessLock | None = None
    _chosen_precision: str | None = None
    _origin: Origin | None = None
    exit_code = 0

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, and the arguments of the Trainer's method that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder and the links between groups."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="Folder of the run. If it holds checkpoints of this run, fit goes on from the "
            "newest.",
        )
        parser.add_argument(
            "--from_run",
            type=str | None,
            default=None,
            help="Run that a new one goes on from, with its step, schedule, optimizer and data: "
            "FOLDER takes its newest sound checkpoint, FOLDER:STEP another. What that lacks, such "
            "as heads of more objectives, begins fresh.",
        )
        parser.add_argument(
            "--evaluate_at_start",
            type=bool | None,
            default=None,
            help="Evaluate before the first step of a new run. Null: if its weights are loaded.",
        )
        for group, callback in CONFIGURED.items():
            parser.add_lightning_class_args(callback, group)
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.global_batch_size", "model.global_batch_size")
        parser.link_arguments("model.inputs", "data.inputs", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the list given; about pictures, what it leaves open is as in the run."""
        self.config = parser.parse_args(args)
        settings = self.config[self.config["subcommand"]]
        check_ranges(settings)
        settings.run_dir = folder_to_run_in(
            settings.run_dir,
            [Path(each.absolute) for each in settings.config or [] if each is not None],
            is_given=any(each.partition("=")[0] == "--run_dir" for each in args),
        )
        folder = RunFolder(Path(settings.run_dir))
        keep_pictures(settings.data, folder_of_settings(folder, settings.from_run))

    def instantiate_classes(self) -> None:
        """Build model, data and Trainer; all see pictures alike, and the settings say how."""
        name_trackers(self._get_all().trainer.logger, self.folder.path.resolve().name)
        try:
            super().instantiate_classes()
        except Exception as error:  # the parser wraps what constructors raise
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            needed = re.search(r"Requirement '([^']+)' not met", str(error))
            if needed is None:
                raise
            raise UserError(
                f"trainer.logger needs {needed[1]}; run: pip install {needed[1]!r}"
            ) from error
        self.model.use_pictures(self.datamodule.pictures)
        self._get_all().data.update(Namespace(self.datamodule.pictures.of_model))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add our loggers, callbacks and checkpoint writer to what the configuration asks for."""
        root = self.folder.path
        settings = self._get(self.config_init, "trainer")
        self.trainer_defaults["callbacks"] = default_callbacks(settings)
        check_gpus(settings, os.environ)
        metrics_log = MetricsLog(root)
        kwargs |= strategy(settings)
        before = folder_of_settings(self.folder, self._get(self.config, "from_run"))
        self._chosen_precision = precision(settings, recorded_precision(before))
        if self._chosen_precision is not None:
            kwargs["precision"] = self._get_all().trainer.precision = self._chosen_precision
        try:
            trainer = super().instantiate_trainer(
                default_root_dir=str(root),
                logger=[metrics_log, *more_loggers(settings, root)],
                plugins=plugins(settings),
                enable_progress_bar=draws_bar(settings),
                **kwargs,
            )
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        spare_copies(trainer.strategy, self.model)
        metrics_log.follow(lambda: self.model.steps_done)
        return trainer

    @cached_property
    def folder(self) -> RunFolder:
        """The run folder; one that is thrown away for ``fit`` with ``trainer.fast_dev_run``."""
        if self.subcommand == "fit" and self._get(self.config, "trainer.fast_dev_run"):
            return RunFolder(scratch_folder())
        return RunFolder(Path(self._get(self.config, "run_dir")))

    def before_fit(self) -> None:
        """Check everything, then claim the folder and write down what is about to run."""
        if self.trainer.max_steps < 1:
            raise UserError(
                f"trainer.max_steps ({self.trainer.max_steps}) must be at least 1: the training "
                "data has no end"
            )
        world_size = self.trainer.num_nodes * self.trainer.num_devices
        if self.datamodule.bad_sample_log is None:
            self.datamodule.bad_sample_log = str(self.folder.bad_samples)
        check_data_once_per_node(self.trainer, self.model, self.datamodule)
        self._get(self.config_init, "benchmarks").check(self.model.towers)
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            self.trainer.strategy.check_world()
        self.model.check_data(self.datamodule)
        self.model.check_ranks(world_size)
        refuse_accumulation(self.trainer)
        given = self._get(self.config, "ckpt_path")
        from_run = self._get(self.config, "from_run")
        self.start_checkpoint = start = self._choose(
            lambda: checkpoint_to_start_from(self.folder, given, self.model, from_run)
        )
        resolved = self._parser("fit").dump(self._get_all(), skip_none=False)
        settings = yaml.safe_load(resolved)
        check_same_run(self.folder, settings)
        if from_run is not None and start is not None:
            self._trace(start, settings)
        change = schedule_change(self.folder, settings, self.model.optim, start, self._origin)
        self.datamodule.start_facts = self._start_facts(settings, world_size)
        if self.trainer.is_global_zero:
            self._lock = self.folder.lock()
            set_up_logging(self.folder.log)
            set_aside_unreadable(self.folder)
            with best_effort(str(self.folder.config)):
                write_atomically(self.folder.config, resolved)
                if redact(resolved) != resolved:  # a start from this file needs them
                    self.folder.config.chmod(0o600)
            tell_settings(self.trainer.loggers, settings)
            provenance = collect_provenance(sys.argv, world_size=world_size)
            provenance |= {"lineage": self.model.lineage} if self.model.lineage else {}
            with best_effort(str(self.folder.provenance)):
                content = json.dumps(provenance, indent=1) + "\n"
                write_atomically(self.folder.provenance, content)
            num_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            logger.info(
                "run folder %s, %.1f M parameters, precision %s%s",
                self.folder.path,
                num_parameters / 1e6,
                self.trainer.precision,
                " (of this GPU or run; trainer.precision sets another)"
                if self._chosen_precision
                else "",
            )
            if self._origin is not None:
                logger.info("%s", self._origin.describe(settings))
            if change:
                logger.info("%s", change)

    def _trace(self, start: Path, settings: dict[str, Any]) -> None:
        """Find out which runs are behind a checkpoint of this run or, at its beginning, another."""
        if start.parent == self.folder.checkpoints:
            self.model.lineage = read_values(start).get("lineage", [])
            return
        optim = self.model.optim
        self._origin = read_origin(start, self.model, self.datamodule, optim, settings)
        self.model.lineage, self.model.other_checkpoint = self._origin.lineage, start

    def fit(self, model: LightningModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train to max_steps, or until a callback or an alarm stops; evaluate, leave a report."""
        start = self.start_checkpoint
        done = steps_behind(self.folder, start) if self._origin is None else self._origin.step
        signals.describe_with(
            lambda: describe_interrupt(self.folder, max(done, self.model.steps_done)),
            lambda: end_children(self.trainer),
        )
        if done >= self.trainer.max_steps:
            if self._owes_end(done):
                self._conclude(start)
            text = "run %s is complete: step %d of %d; %s to go on, or choose another run_dir"
            more = how_to_go_on(self.model.optim, done)
            logger.info(text, self.folder.path, done, self.trainer.max_steps, more)
            return
        is_dev_run: bool = self.trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning's
        if start is None and self._evaluates_at_start() and not is_dev_run:
            self.trainer.num_sanity_val_steps = float("inf")
        if start is not None:
            logger.info("going on from %s", start)
            owes = owes_evaluation(self.folder, done, self.trainer.val_check_interval)
            if self._origin is not None:
                has_pairs = self.datamodule.val_shards is not None
                owes = has_pairs and self._evaluates_at_start() and not is_dev_run
            if owes:
                with isolate_rng():  # training must not see that it took place
                    self._evaluate(start)
        wanted, had_ended = self.trainer.max_steps, bool(start) and not self._owes_end(done)
        alarm: CollapseAlarm = self._get(self.config_init, "collapse_alarm")
        if not alarm.ends_run:
            self.trainer.fit(model, datamodule=self.datamodule, ckpt_path=start, weights_only=True)
        stop: Preemption = self._get(self.config_init, "stop")
        stop.finish()
        if stop.has_stopped:
            stop.leave(self.trainer)
            code = EXIT_INTERRUPTED if stop.is_interrupt else EXIT_SAVED
            self.exit_code = code_for_launcher(self.trainer, code)
            if stop.is_interrupt and self.trainer.is_global_zero:
                logger.warning("interrupted%s", signals.where())
            return
        if is_dev_run:
            logger.info("fast_dev_run went through; nothing of it is kept")
            return
        step = self.model.steps_done
        if not (had_ended and step == done):
            self._conclude()
        if alarm.ends_run:
            logger.error("stopped at step %d of %d by collapse_alarm", step, wanted)
            self.exit_code = code_for_launcher(self.trainer, EXIT_COLLAPSED)
        elif step < wanted:
            reason = reason_of_early_end(self.trainer)
            logger.info("stopped early at step %d of %d because %s", step, wanted, reason)

    def _conclude(self, source: Path | None = None) -> None:
        """Evaluate the last step, of a checkpoint or just trained, and leave a report."""
        if self.datamodule.val_shards is None:
            return
        if source is not None or self.model.last_evaluated_step != self.model.steps_done:
            self._evaluate(source)
        if self.folder.is_moved():
            raise self.folder.moved()
        if self.trainer.is_global_zero:
            # Plotting takes a while to import, and only this moment needs it.
            from dist_siglip.report import write_report

            with best_effort("the report", Exception):
                attach_report(self.trainer.loggers, write_report(self.folder.path))

    def _owes_end(self, step: int) -> bool:
        """Whether the last step was reached, but not its evaluation or the report."""
        return evaluated_step(self.folder) < step or not self.folder.report.exists()

    def _start_facts(self, settings: dict[str, Any], world_size: int) -> dict[str, str]:
        """Write down what all ranks of this start have to share."""
        start = self.start_checkpoint
        return describe_start(
            settings,
            world_size=world_size,
            checkpoint=None if start is None else start.name,
            evaluated_step=evaluated_step(self.folder),
            has_report=self.folder.report.exists(),
        )

    def _evaluates_at_start(self) -> bool:
        asked: bool | None = self._get(self.config, "evaluate_at_start")
        brings_weights = self.model.built.weights_loaded or self._origin is not None
        return brings_weights if asked is None else asked

    def _choose(self, choose: Callable[[], Path | None]) -> Path | None:
        """Choose a checkpoint: once on each node, if there is any to be read."""
        named = [self._get(self.config, name) for name in ("ckpt_path", "from_run")]
        if named == [None, None] and not self.folder.steps_with_checkpoint():
            return choose()
        return once_per_node(self.trainer, self.model, choose)

    def before_validate(self) -> None:
        """Check the data and the checkpoint to evaluate."""
        check_data_once_per_node(self.trainer, self.model, self.datamodule)
        self._get(self.config_init, "benchmarks").check(self.model.towers)
        self.start_checkpoint = self.choose_to_look_at()

    def choose_to_look_at(self) -> Path | None:
        """Choose the checkpoint to evaluate; None for the model as built.

        Raises:
            UserError: as ``checkpoint_to_look_at``, or if there is none and ``from_run`` is set.
        """
        given, from_run = (self._get(self.config, name) for name in ("ckpt_path", "from_run"))
        chosen = self._choose(lambda: checkpoint_to_look_at(self.folder, given, self.model))
        if chosen is None and from_run is not None:
            raise UserError(
                f"from_run ({from_run}) is where fit begins, and run_dir ({self.folder.path}) has "
                "no checkpoint yet; to evaluate that run name it as run_dir"
            )
        return chosen

    def validate(self, model: LightningModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Evaluate the given checkpoint, else the newest of the run, else the model as built."""
        source = self.start_checkpoint
        logger.info("evaluating %s", source or "the model as built: no checkpoint in run_dir")
        self._evaluate(source)
        if self.trainer.is_global_zero:
            print_evaluation(self.folder)

    def _evaluate(self, source: Path | None) -> None:
        """Evaluate a checkpoint, or the model as it is."""
        self.trainer.validate(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=source,
            verbose=False,
            weights_only=True,
        )

    def let_go(self) -> None:
        """Give the run folder back, for another start in this process."""
        if self._lock is not None:
            self._lock.release()

    def _get_all(self) -> Any:
        """Return the resolved configuration of the command."""
        return self.config[self.subcommand]
