"""Training runs under several strategies and precisions that must agree."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group

from dist_siglip.models.tuning import block_names
from dist_siglip.objectives import Captioning
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.tuning_ranks import batches_of, fit, locked_module


class Losses(Callback):
    """Keeps the global loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *_):
        self.values.append(trainer.callback_metrics["train/loss"].item())


def train(model, folder, case, rank=0, world_size=1, num_steps=3):
    """Train one case; return whole parameters, losses of the steps, and the last grad norm.

    Args:
        case: "module" (settings of the module), "objective" (of Captioning), "trainer" (of the
            Trainer), "shard" (of FullyShardedStrategy; null is DDP), "start" and "save"
            (checkpoints), "done" (steps behind the checkpoint), "kind" (of the model), "receives"
            (ranks but the first are built without values).
    """
    receives = bool(case.get("receives") and rank)
    with torch.device("meta") if receives else nullcontext():
        module = locked_module(model, **settings_of(case))
    is_empty = all(value.is_meta for value in module.towers.parameters())
    assert is_empty == receives
    settings: dict[str, Any] = {"gradient_clip_val": 1.0, **case.get("trainer", {})}
    sharding = case.get("shard")
    if sharding is not None and world_size > 1:
        settings["strategy"] = FullyShardedStrategy(**sharding)
    losses = Losses()
    # More batches than steps: Lightning would begin an epoch where they end.
    kind = case.get("kind", "siglip")
    batches = batches_of(num_steps + 8, rank, world_size, kind)[case.get("done", 0) :]
    trainer = fit(
        module,
        folder,
        batches,
        rank,
        world_size,
        case.get("start"),
        callbacks=[losses, *settings.pop("callbacks", [])],
        **{"max_steps": num_steps, **settings},
    )
    if case.get("save"):
        trainer.save_checkpoint(case["save"])
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=whole)
    state = {name: value.clone() for name, value in state.items()}
    norm = trainer.callback_metrics["train/grad_norm"].item()
    return {"state": state, "losses": losses.values, "norm": norm}


def settings_of(case):
    """Settings of the module; a loss and objectives are built anew for each."""
    objective = case.get("objective")
    objectives = None if objective is None else [Captioning(**objective)]
    loss = copy.deepcopy(case.get("module", {}).get("loss"))
    return {**case.get("module", {}), "loss": loss, "objectives": objectives}


def train_cases(rank, world_size, model, folder, cases, num_steps=3):
    """Train one case after the other in one process group."""
    return [train(model, folder, case, rank, world_size, num_steps) for case in cases]


def start_of(model, case):
    """Parameters before the first step."""
    module = locked_module(model, **settings_of(case))
    return {name: value.clone() for name, value in module.state_dict().items()}


def worst_error(found, expected, start):
    """Largest distance of a parameter from what is expected, relative to its movement."""
    return max(
        (
            (found[name].double() - value.double()).norm()
            / (value.double() - start[name].double()).norm()
        ).item()
        for name, value in expected.items()
        if not torch.equal(value, start[name])
    )


def count_live_gradients(model, folder, rank, world_size, *, together):
    """Train with micro-batches; return the most elements of blocks' gradients whole at once.

    Args:
        together: micro-batches go backward in one pass, as they do where nothing is sharded.
    """
    module, waiting, most = locked_module(model, micro_batch_size=1), {}, 0
    if together:
        module._trained_towers = set()
    own = param_group.FSDPParamGroup.post_backward

    def counting(self, *args):
        """A group whose backward pass is over holds its gradients until they are reduced.

        In one backward pass a gradient lies with autograd until all its parts are there.
        """
        nonlocal most
        values = [getattr(each, "_unsharded_param", None) for each in self.fsdp_params]
        are_there = any(value is not None and value.grad is not None for value in values)
        went_backward = self._training_state is param_group.TrainingState.PRE_BACKWARD
        if "blocks." in self._module_fqn and (are_there or went_backward):
            waiting[self._module_fqn] = sum(value.numel() for value in values)
            most = max(most, sum(waiting.values()))
        own(self, *args)
        if are_there:
            waiting.pop(self._module_fqn, None)

    losses = Losses()
    param_group.FSDPParamGroup.post_backward = counting
    try:
        strategy = FullyShardedStrategy()
        batches = batches_of(2, rank, world_size)
        fit(module, folder, batches, rank, world_size, callbacks=[losses], strategy=strategy)
    finally:
        param_group.FSDPParamGroup.post_backward = own
    blocks = [
        sum(value.numel() for value in module.towers.get_submodule(name).parameters())
        for name in block_names(module.towers)
    ]
    return {"most": most, "blocks": blocks, "losses": losses.values}
