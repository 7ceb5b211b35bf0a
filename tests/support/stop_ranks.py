"""Ranks that get signals at chosen moments of a small training run."""

import logging
import signal
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Callback

from dist_siglip.objectives import Captioning
from dist_siglip.runs import RunFolder
from dist_siglip.system import signals
from dist_siglip.training.callbacks import Preemption, RunCheckpoint
from tests.support.tuning_ranks import batches_of, fit, locked_module

NUM_STEPS = 12
NAMES = ("SIGUSR1", "SIGUSR2", "SIGTERM")


class Signals(Callback):
    """Sends this process signals at one moment, and remembers which steps were evaluated."""

    def __init__(self, moment=None, names=NAMES):
        self.moment, self.names, self.evaluated = moment, names, []

    def _send(self, moment):
        if moment == self.moment:
            self.moment = None
            for name in self.names:
                signal.raise_signal(getattr(signal, name))

    def setup(self, trainer, module, stage):
        self._send("setup")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 4:
            self._send("step")

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step == 4:
            self._send("before the gradients meet")

    def on_validation_start(self, trainer, module):
        if trainer.global_step:
            self.evaluated.append(trainer.global_step)
            self._send("evaluation")

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self._send("save")


class EachForItself(Preemption):
    """A wrong one: a rank that was asked stops alone."""

    def _agree(self, asked, heard=None):
        return asked


def train(
    rank,
    world_size,
    model,
    folder,
    moment,
    signalled,
    callback=Preemption,
    done=0,
    objective=None,
    **options,
):
    """Train the steps after ``done`` while one rank gets signals; return what this rank did."""
    logging.getLogger("dist_siglip").setLevel(logging.ERROR)
    objectives = None if objective is None else [Captioning(**objective)]
    module = locked_module(model, objectives=objectives)
    sender = Signals(moment if rank == signalled else None)
    stop = callback(agree_every_steps=3)
    with signals.listening():
        trainer = fit(
            module,
            folder,
            # More batches than steps: Lightning would begin an epoch where they end.
            batches_of(2 * NUM_STEPS, rank, world_size)[done:],
            rank,
            world_size,
            val_batches=batches_of(1),
            callbacks=[stop, sender, RunCheckpoint(every_steps=5)],
            val_check_interval=6,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_checkpointing=True,
            max_steps=NUM_STEPS,
            # Otherwise DDP lays its buckets out anew after the first step of every start, and sums
            # of more than two ranks are rounded in another order in that step.
            strategy="ddp_find_unused_parameters_true",
            **options,
        )
        if stop.has_stopped:
            stop.leave(trainer)
    return {
        "step": trainer.global_step,
        "has_stopped": stop.has_stopped,
        "evaluated": sender.evaluated,
        "checkpoints": RunFolder(Path(folder)).steps_with_checkpoint(),
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }


def train_at_each_moment(rank, world_size, model, folder, moments, signalled):
    """One run for each moment, the last one without a signal and the one before gone on with."""
    found = {
        moment: train(rank, world_size, model, f"{folder}/{number}", moment, signalled)
        for number, moment in enumerate(moments)
    }
    last = RunFolder(Path(f"{folder}/{len(moments) - 1}"))
    torch.distributed.barrier()
    found["resumed"] = train(
        rank,
        world_size,
        model,
        f"{folder}/resumed",
        None,
        signalled,
        done=max(last.steps_with_checkpoint()),
        ckpt_path=last.newest_checkpoint(),
    )
    found["never"] = train(rank, world_size, model, f"{folder}/never", None, signalled)
    return found


def train_with_objective(rank, world_size, model, folder, moments, objective):
    """A run that is not stopped, and for each moment one that is and goes on."""
    common = {"signalled": world_size - 1, "objective": objective}
    where = (rank, world_size, model)
    found = {None: train(*where, f"{folder}/never", None, **common)}
    for number, moment in enumerate(moments):
        parts = RunFolder(Path(f"{folder}/{number}"))
        stopped = train(*where, str(parts.path), moment, **common)["step"]
        torch.distributed.barrier()
        start = {"done": stopped, "ckpt_path": parts.checkpoint(stopped)}
        rest = train(*where, f"{folder}/{number}-rest", None, **start, **common)
        found[moment] = {**rest, "stopped": stopped}
    return found


def train_alone(rank, world_size, model, folder):
    """The wrong callback: the ranks lose each other."""
    with suppress(RuntimeError):
        return train(rank, world_size, model, folder, "step", 1, EachForItself)["step"]
    return "lost"
