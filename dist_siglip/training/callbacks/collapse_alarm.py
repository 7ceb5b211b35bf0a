"""Alarm for a fine-tuned model that loses what it knew.

Three signs, looked for at every evaluation: logits of positives and negatives meet, embeddings
spread over fewer directions, recall falls below that of the first evaluation.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from dist_siglip.errors import UserError
from dist_siglip.training.callbacks.preemption import end_training

logger = logging.getLogger(__name__)

_RECALLS = ("image_to_text_recall@1", "text_to_image_recall@1")
_RANKS = ("image_effective_rank", "text_effective_rank")


class CollapseAlarm(Callback):
    """Tells, or stops, a run whose evaluations collapse.

    Compared are the newest evaluation of the run and its best values so far, which a checkpoint
    keeps. ``val/collapse_signs`` is the number of signs found.

    Args:
        action: "warn" writes a line to the log; "stop" ends the run there, with a checkpoint, a
            report and exit code 4; "off" looks at nothing.
        logit_separation: distance of the means of positive and negative logits, in units of their
            standard deviation, below which they have met, if they were that far apart, and
            twice as far as now, before.
        rank_share: share of the largest effective rank so far below which it has dropped.
        recall_errors: standard errors of recall@1 by which it must lie under that of the first
            evaluation.

    Attributes:
        ends_run: whether a run is to end for what was found.

    Raises:
        UserError: if a setting is out of range.
    """

    def __init__(
        self,
        action: Literal["warn", "stop", "off"] = "warn",
        logit_separation: float = 1.0,
        rank_share: float = 0.5,
        recall_errors: float = 3.0,
    ) -> None:
        if action not in ("warn", "stop", "off"):
            raise UserError(f"collapse_alarm.action ({action}) must be warn, stop or off")
        if not 0 < rank_share < 1:
            raise UserError(f"collapse_alarm.rank_share ({rank_share}) must be in (0, 1)")
        for name, value in (
            ("logit_separation", logit_separation),
            ("recall_errors", recall_errors),
        ):
            if not 0 < value < math.inf:
                raise UserError(f"collapse_alarm.{name} ({value}) must be > 0")
        self.action = action
        self.logit_separation = logit_separation
        self.rank_share = rank_share
        self.recall_errors = recall_errors
        self.ends_run = False
        self._first: dict[str, float] = {}
        self._best: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the newest evaluation; every rank has the same numbers."""
        evaluation = getattr(pl_module, "last_evaluation", None)
        is_check = trainer.sanity_checking and trainer.num_sanity_val_steps != math.inf
        if self.action == "off" or evaluation is None or is_check:
            return
        signs = self.look(evaluation.metrics)
        step: int = getattr(pl_module, "last_evaluated_step", 0)
        for each in trainer.loggers:
            each.log_metrics({"val/collapse_signs": float(len(signs))}, step=step)
        if not signs:
            return
        text = f"the model may be collapsing at step {step}: {'; '.join(signs)}"
        remedy = (
            "lower optim.learning_rate, lock a tower, or calibrate scale and bias to the batch "
            "(model.calibration_pairs)"
        )
        if trainer.is_global_zero:
            logger.warning("%s; %s", text, remedy)
        if self.action == "stop":
            self.ends_run = True
            # Lightning calls this hook in its validating stage, in training too.
            if trainer.state.fn == TrainerFn.FITTING:
                end_training(trainer)

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """Compare an evaluation with those before it, and remember it.

        Args:
            metrics: of ``evaluate_pairs``.

        Returns:
            A phrase for every sign of collapse.
        """
        signs = []
        separation = logit_separation(metrics)
        best = self._best.get("separation", -math.inf)
        if best >= self.logit_separation and separation < min(self.logit_separation, best / 2):
            signs.append(f"positive and negative logits meet ({separation:.2f} apart, {best:.2f})")
        for name in _RANKS:
            best = self._best.get(name, 0.0)
            if metrics[name] < self.rank_share * best:
                signs.append(f"{name} fell from {best:.1f} to {metrics[name]:.1f}")
        for name in _RECALLS:
            first = self._first.get(name)
            if first is not None and metrics[name] < first - self._noise(first, metrics):
                signs.append(f"{name} is {metrics[name]:.3f}, and was {first:.3f} at the start")
        found = {"separation": separation, **{name: metrics[name] for name in _RANKS}}
        self._first = self._first or {name: metrics[name] for name in _RECALLS}
        self._best = {name: max(v, self._best.get(name, v)) for name, v in found.items()}
        return signs

    def _noise(self, recall: float, metrics: Mapping[str, float]) -> float:
        """So many standard errors of a recall of that size over the gallery."""
        pairs = max(metrics["gallery_pairs"], 1.0)
        return self.recall_errors * math.sqrt(max(recall * (1 - recall), 1 / pairs) / pairs)

    def state_dict(self) -> dict[str, Any]:
        """First and best values, so that a resumed run compares with its own start."""
        return {"first": self._first, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._first, self._best = dict(state_dict["first"]), dict(state_dict["best"])


def logit_separation(metrics: Mapping[str, float]) -> float:
    """Distance of the means of positive and negative logits in pooled standard deviations.

    (mean+ - mean-) / sqrt((std+ ^ 2 + std- ^ 2) / 2), the d' of signal detection.

    Example:
        >>> logit_separation({"positive_logit_mean": 3.0, "positive_logit_std": 2.0,
        ...                   "negative_logit_mean": -1.0, "negative_logit_std": 2.0})
        2.0
    """
    spread = (metrics["positive_logit_std"] ** 2 + metrics["negative_logit_std"] ** 2) / 2
    apart = metrics["positive_logit_mean"] - metrics["negative_logit_mean"]
    return apart / math.sqrt(spread) if spread > 0 else 0.0
