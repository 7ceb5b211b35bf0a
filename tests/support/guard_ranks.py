"""Guarded training runs in which one rank has something that is not finite."""

import json
import os
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from dist_siglip.errors import RunFailedError, UserError
from dist_siglip.losses import SigLipLoss
from dist_siglip.objectives import Captioning, Term
from dist_siglip.runs import RunFolder
from dist_siglip.training.callbacks import SkipBadSteps
from dist_siglip.training.optim import NormHistory, OptimConfig, StepCheck
from dist_siglip.training.optim.step_check import skip_where
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.tuning_ranks import CALM, batches_of, fit, locked_module

OPTIMS = {
    "AdamW": CALM,
    "falling": OptimConfig(learning_rate=0.01, epsilon=0.01, schedule="linear"),
    "SGD": OptimConfig(
        learning_rate=0.01, schedule="constant", optimizer=partial(torch.optim.SGD, momentum=0.9)
    ),
}


class Faults(Callback):
    """Makes steps go wrong on one rank: {step: fault}.

    Faults: "pixels", "gradient", "loss", "large"; with an objective also "term" (its value),
    "tokens" (one of those it reads) and "head" (a gradient of its own).
    """

    def __init__(self, bad, is_here):
        self.bad, self.is_here, self.now, self.rates = bad, is_here, None, []

    def on_train_start(self, trainer, module):
        module.logits.log_scale.register_hook(self._on_gradient)
        for objective in module.objectives.values():
            objective.register_forward_pre_hook(self._on_rows)
            objective.register_forward_hook(self._on_terms)
            objective.output.weight.register_hook(self._on_head)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        # The step, not the batch's number in this start.
        self.now = self.bad.get(trainer.global_step) if self.is_here else None
        if self.now == "pixels":
            batch.images[0, 0, 0, 0] = torch.nan

    def _on_gradient(self, gradient):
        # Before the reduction over ranks; only a value that a sum over ranks keeps is a fault.
        factor = {"gradient": torch.inf, "large": 1e4}.get(self.now, 1.0)
        return gradient * factor

    def _on_rows(self, objective, arguments):
        (rows,) = arguments
        if self.now == "tokens":
            spoilt = torch.zeros_like(rows.tokens)
            spoilt[0, 0, 0] = torch.nan
            return (rows._replace(tokens=rows.tokens + spoilt),)
        return None

    def _on_terms(self, objective, arguments, terms):
        if self.now == "term":
            return {name: Term(term.total + torch.inf, term.number) for name, term in terms.items()}
        return None

    def _on_head(self, gradient):
        return gradient * (torch.nan if self.now == "head" else 1.0)


class FaultyLoss(nn.Module):
    """Infinite with finite gradients, where asked."""

    uses_caption_ids = False

    def __init__(self):
        super().__init__()
        self.base, self.faults = SigLipLoss(), None

    def forward(self, *args, nonfinite="raise"):
        return self.base(*args, nonfinite=nonfinite) + (
            torch.inf if self.faults.now == "loss" else 0.0
        )


class Alone(StepCheck):
    """The broken variant: each rank skips by its own loss."""

    def look(self, loss, image_features, text_features, sample_ids):
        super().look(loss, image_features, text_features, sample_ids)
        return loss

    def decide(self, optimizer, norm):
        super().decide(optimizer, norm)
        skip_where(optimizer, ~self._loss.isfinite())


def train(rank, world_size, model, folder, case):
    """Train one case.

    Args:
        case: "objective" (of Captioning), "bad" (step -> fault, on the last rank), "keep" (batches
            that are trained on at all), "guard" (settings of SkipBadSteps), "trainer", "optim" (see
            OPTIMS), "shard" (of FullyShardedStrategy), "every" (steps between checkpoints),
            "damage" (step of one that is cut), "start" (a checkpoint), "done" (steps behind it),
            "alone" (the broken variant), "init_scale" (of a GradScaler).

    Returns:
        Whole parameters, state of the optimizer, learning rates, counts and lines of skipped
        steps; or the error.
    """
    folder = Path(folder, case["name"])
    folder.mkdir(exist_ok=True)
    loss = FaultyLoss()
    module = locked_module(
        model,
        loss=loss,
        optim=OPTIMS[case.get("optim", "AdamW")],
        objectives=[Captioning(**case["objective"])] if "objective" in case else None,
    )
    faults = Faults(case.get("bad", {}), rank == world_size - 1)
    loss.faults = faults
    guard = SkipBadSteps(**case.get("guard", {}))
    callbacks = [faults, guard]
    if case.get("alone"):
        callbacks.append(_Swap())
    if "init_scale" in case:
        callbacks.append(_Scale(case["init_scale"]))
    if "every" in case:
        callbacks.append(_Save(case["every"], case.get("damage")))
    settings = {"gradient_clip_val": 1.0, **case.get("trainer", {})}
    if "shard" in case and world_size > 1:
        settings["strategy"] = FullyShardedStrategy(**case["shard"])
    batches = batches_of(12, rank, world_size)
    batches = [batches[number] for number in case.get("keep", range(12))]
    settings.setdefault("max_steps", len(batches))
    batches = batches[case.get("done", 0) :] + batches  # more than steps: an epoch has no end here
    try:
        trainer = fit(
            module, folder, batches, rank, world_size, case.get("start"),
            callbacks=callbacks, **settings,
        )  # fmt: skip
    except RunFailedError as error:
        return {"error": str(error), "lines": _lines(folder)}
    except UserError as error:  # ranks that have drifted apart
        if not case.get("alone"):
            raise
        return {"error": str(error)}
    optimizer = trainer.optimizers[0]
    state, moments = module.state_dict(), optimizer.state_dict()["state"]
    if "shard" in case:  # whole on the first rank
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(module, options=whole)
        moments = get_optimizer_state_dict(module, optimizer, options=whole).get("state", {})
    return {
        "state": {name: value.clone() for name, value in state.items()},
        "moments": [v for number in moments for v in moments[number].values()],
        "num_skipped": guard.num_skipped,
        "lines": _lines(folder),
        "metrics": {name: float(v) for name, v in trainer.callback_metrics.items()},
        "rates": faults.rates,
    }


class _Swap(Callback):
    def on_train_start(self, trainer, module):
        module.step_check.__class__ = Alone


class _Save(Callback):
    def __init__(self, every, damaged):
        self.every, self.damaged = every, damaged

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % self.every == 0:
            path = RunFolder(Path(trainer.default_root_dir)).checkpoint(trainer.global_step)
            trainer.save_checkpoint(path)
            if trainer.global_step == self.damaged:
                os.truncate(path, path.stat().st_size // 2)


class _Scale(Callback):
    def __init__(self, scale):
        self.scale = scale

    def on_fit_start(self, trainer, module):
        trainer.precision_plugin.scaler._init_scale = self.scale


def _lines(folder):
    path = folder / "skipped_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_all(rank, world_size, model, folder, cases):
    """Train one case after the other in one process group; return the results by name."""
    found = {case["name"]: train(rank, world_size, model, folder, case) for case in cases}
    return {**found, "spike on the last rank": judge_apart(rank == world_size - 1)}


def judge_apart(is_last):
    """Whether a step is skipped that only the last rank takes for a spike."""
    history, weight = NormHistory(factor=2.0, window=4), nn.Parameter(torch.ones(1))
    history.restore(torch.ones(4))
    check = StepCheck(history)
    check.decide(torch.optim.SGD([weight]), torch.tensor(2.1 if is_last else 1.9))
    return check.take().is_skipped.item()


def are_same(one, other):
    """Whether parameters and moments are equal to the bit."""
    pairs = [(one["state"][name], value) for name, value in other["state"].items()]
    pairs += zip(one["moments"], other["moments"], strict=True)
    return all(torch.equal(left, right) for left, right in pairs)
