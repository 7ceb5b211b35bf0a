"""Progress of the run: a bar on a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_siglip.metrics.evaluation import describe_num_pairs

logger = logging.getLogger(__name__)

# Metric, short label, format; in the order of a line.
_SHOWN = (
    ("train/pairs_per_second", "pairs/s", "{:.0f}"),
    ("train/data_wait_percent", "data wait %", "{:.0f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("train/logit_scale", "scale", "{:.2f}"),
    ("train/logit_bias", "bias", "{:.2f}"),
    ("train/grad_norm", "grad norm", "{:.3f}"),
    ("train/substituted_samples", "bad samples", "{:.0f}"),
    ("train/skipped_steps", "skipped steps", "{:.0f}"),
)
# What the bar has room for on a terminal of 80 columns.
_ON_BAR = frozenset({"train/pairs_per_second", "train/loss"})


class ProgressReport(Callback):
    """Shows step/total, speed, loss, scale, bias, gradient norm and time left, on rank 0.

    Lines go to the logger ``dist_siglip`` (and so to RUN/log.txt) at most every ``line_seconds``;
    the bar, on a terminal, moves every step. Metrics are those of the last logged step.

    Args:
        line_seconds: least seconds between two lines.
    """

    def __init__(self, line_seconds: float = 10.0) -> None:
        self.line_seconds = line_seconds
        self._bar: Progress | None = None
        self._has_bar = False  # ours or another
        self._started = 0.0
        self._first_step = self._total = 0
        self._last_line = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar if there is a terminal to draw it on."""
        self._started = self._last_line = time.monotonic()
        # A stop lowers the Trainer's own number.
        self._first_step, self._total = trainer.global_step, trainer.max_steps
        if not trainer.is_global_zero:
            return
        logger.info("training from step %d to %d", self._first_step, self._total)
        console = Console(stderr=True)
        self._has_bar = console.is_terminal
        # One that the user has chosen draws alone.
        if self._has_bar and trainer.progress_bar_callback is None:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
            )
            self._bar.add_task("", total=self._total, completed=self._first_step)
            self._bar.start()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the bar; write a line when it is time."""
        if not trainer.is_global_zero:
            return
        now, step = time.monotonic(), trainer.global_step
        is_last = step >= trainer.max_steps
        if self._bar is not None:
            short = {k: v for k, v in trainer.callback_metrics.items() if k in _ON_BAR}
            self._bar.update(self._bar.task_ids[0], completed=step, description=describe(short))
        if now - self._last_line >= self.line_seconds or is_last:
            self._last_line = now
            rate = (step - self._first_step) / max(now - self._started, 1e-9)
            parts = [
                f"step {step}/{self._total}",
                describe(trainer.callback_metrics),
                f"{_clock((self._total - step) / max(rate, 1e-9))} left",
            ]
            logger.info(
                "%s",
                ", ".join(part for part in parts if part),
                # The terminal shows the bar instead; the file gets the line.
                extra={"is_on_bar": self._has_bar},
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say the headline of an evaluation."""
        recall = trainer.callback_metrics.get("val/image_to_text_recall@1")
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.is_global_zero and recall is not None and loss is not None:
            logger.info(
                "evaluation at step %d: %s, loss %.4f, image to text recall@1 %.3f",
                getattr(pl_module, "last_evaluated_step", trainer.global_step),
                describe_num_pairs(trainer.callback_metrics, "val/"),
                float(loss),
                float(recall),
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back before the error is shown."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):  # a terminal that is gone
                self._bar.stop()
            self._bar = None


def describe(metrics: Mapping[str, Any]) -> str:
    """Write the metrics of a line.

    Example:
        >>> describe({"train/loss": 1.25, "train/logit_scale": 10.0})
        'loss 1.2500, scale 10.00'
    """
    return ", ".join(
        f"{label} {form.format(float(metrics[name]))}"
        for name, label, form in _SHOWN
        if name in metrics
    )


def _clock(seconds: float) -> str:
    """Write a duration.

    Example:
        >>> _clock(3725)
        '1:02:05'
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
