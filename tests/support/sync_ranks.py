"""What a training step makes the host wait for."""

import traceback
import warnings

import torch.distributed as dist
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from dist_siglip.training.callbacks import Preemption, SkipBadSteps, Throughput
from tests.support.tuning_ranks import batches_of, fit, locked_module

# Parts of the loss that a CPU alone takes, where a value is at hand; see their docstrings.
CPU_ONLY = ("look", "find_nonfinite", "read_numbers", "_logits_and_scratch", "_sum_negatives_")
COLLECTIVES = ("broadcast", "all_reduce", "all_gather", "all_gather_object", "barrier", "reduce")


class Waits(TorchDispatchMode):
    """Notes every read of a tensor's value by the host, with the line that asked."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "_local_scalar_dense" in name or "aten.nonzero" in name or "is_nonzero" in name:
            frames = [
                frame
                for frame in traceback.extract_stack()
                if "/torch/" not in frame.filename and frame.name != "__torch_dispatch__"
            ]
            if not any(frame.name in CPU_ONLY for frame in frames):
                self.found.append(f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].name}")
        return function(*args, **(kwargs or {}))


class Count(Callback):
    """Notes what happens between the starts of two steps that are not logged."""

    def __init__(self, first, last):
        self.first, self.last, self.mode, self.calls = first, last, Waits(), []
        self.has_begun = False

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.has_begun = True
        if batch_idx == self.first:
            self.mode.__enter__()
            for name in COLLECTIVES:
                setattr(dist, name, self._counting(name, getattr(dist, name)))
        if batch_idx == self.last:
            self.mode.__exit__(None, None, None)

    def _counting(self, name, function):
        def counting(*args, **kwargs):
            self.calls.append(name)
            return function(*args, **kwargs)

        return counting


def count(rank, world_size, model, folder, mends=True, reads=False):
    """Train seven steps; return what steps 2 to 5 waited for."""
    warnings.simplefilter("ignore")
    module, watch = locked_module(model), Count(2, 6)
    if reads:
        step = module.training_step

        def reading_step(batch, batch_idx):
            loss = step(batch, batch_idx)
            loss.item()
            return loss

        module.training_step = reading_step
    stops = [Preemption(agree_every_steps=100)] if mends else []
    callbacks = [*stops, SkipBadSteps(), Throughput(), watch]
    own = {name: getattr(dist, name) for name in (*COLLECTIVES, "new_group")}
    made: list[bool] = []  # whether training had begun

    def new_group(*args, **settings):
        made.append(watch.has_begun)
        return own["new_group"](*args, **settings)

    dist.new_group = new_group
    try:
        fit(
            module,
            folder,
            batches_of(7, rank, world_size),
            rank,
            world_size,
            callbacks=callbacks,
            log_every_n_steps=100,
            gradient_clip_val=1.0,
        )
    finally:
        for name, function in own.items():
            setattr(dist, name, function)
    return {"waits": watch.mode.found, "calls": watch.calls, "late groups": made.count(True)}


def count_all(rank, world_size, model, folder):
    """As it is, with Lightning's own broadcast, and with a loss that is read."""
    return [
        count(rank, world_size, model, folder, **options)
        for options in ({}, {"mends": False}, {"reads": True})
    ]
