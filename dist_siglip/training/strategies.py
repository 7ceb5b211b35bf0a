"""Fully sharded training (FSDP2) by Lightning's ``ModelParallelStrategy``.

Parameters, gradients and optimizer state are sharded over ranks; every rank still sees its own
pairs. Added here: the mesh of hybrid sharding, and checkpoints that are those of DDP or are
written by all ranks together.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Parameter
from torch.optim import Optimizer

from dist_siglip.errors import UserError
from dist_siglip.runs.checkpoints.sharded import (
    by_name,
    is_sharded,
    read_into,
    read_values,
    stored_shapes,
    stored_states,
    write_sharded,
)
from dist_siglip.system.lightning_compat import (
    set_device_mesh,
    set_mesh_sizes,
    writes_sharded_checkpoints,
)
from dist_siglip.training.module.from_run import (
    adopt_optimizer,
    adopt_weights,
    compare,
    convert_optimizer,
    resample,
)
from dist_siglip.training.module.objectives import refuse_other_heads
from dist_siglip.training.optim.evaluation_weights import UNAVERAGED


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards a model over all ranks, or over those of a node and copies it to every node.

    Args:
        shard_within: "world" keeps one copy of the model over all ranks, "node" one on each node
            (hybrid sharding): weights then travel inside the node, gradients also between nodes.
        checkpoint: "full" gathers the model on the first rank and writes the file that DDP would
            write; "sharded" makes a folder that every rank writes its part of. Either resumes
            on any number of ranks, with DDP too.
        process_group_backend: "nccl" or "gloo". Null takes the one of the device.

    Raises:
        UserError: if a setting is unknown; later, if there is only one rank.
    """

    checkpoint_group: ProcessGroup | None = None

    def __init__(
        self,
        shard_within: Literal["world", "node"] = "world",
        checkpoint: Literal["full", "sharded"] = "full",
        process_group_backend: str | None = None,
    ) -> None:
        for name, value, allowed in (
            ("shard_within", shard_within, ("world", "node")),
            ("checkpoint", checkpoint, ("full", "sharded")),
        ):
            if value not in allowed:
                raise UserError(f"strategy.{name} ({value}) must be {' or '.join(allowed)}")
        super().__init__(
            save_distributed_checkpoint=checkpoint == "sharded",
            process_group_backend=process_group_backend,
        )
        self.shard_within = shard_within

    def check_world(self) -> None:
        """Refuse a single rank.

        Raises:
            UserError: naming what to raise.
        """
        if self.num_nodes * self.num_processes < 2:
            raise UserError(
                "trainer.strategy (FullyShardedStrategy) shards a model over ranks and there is "
                "one; raise trainer.devices or trainer.num_nodes, or leave the strategy out"
            )

    def setup_environment(self) -> None:
        """Join the other ranks and lay out the mesh."""
        self.check_world()
        set_mesh_sizes(self, data=self.num_nodes * self.num_processes, tensor=1)
        super().setup_environment()
        # Lightning's mesh has an axis for tensor parallelism that nothing here uses.
        if self.lightning_module is not None:
            set_device_mesh(self.lightning_module, self._mesh())

    def _mesh(self) -> DeviceMesh:
        device = self.root_device.type
        if self.shard_within == "world":
            return init_device_mesh(device, (self.world_size,), mesh_dim_names=("shard",))
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.num_processes))
        if self.world_size % per_node:
            raise UserError(
                "strategy.shard_within (node) needs the same number of ranks on every node; "
                f"{self.world_size} ranks are no multiple of {per_node}"
            )
        return init_device_mesh(
            device, (self.world_size // per_node, per_node), mesh_dim_names=("replicate", "shard")
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State by parameter name: whole on the first rank, or this rank's shards."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.model is not None
        return get_optimizer_state_dict(self.model, optimizer, options=self._options())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Parameters and buffers by name: whole on the first rank, or this rank's shards."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=self._options())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a file through the checkpoint writer of the run, or a folder from all ranks.

        A thread may call it if ``checkpoint_group`` is a group of all ranks for it alone.
        """
        if writes_sharded_checkpoints(self):
            write_sharded(checkpoint, Path(filepath), self.checkpoint_group)
        else:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restore model and optimizers from a file or a folder; return the rest."""
        path = Path(self.broadcast(str(checkpoint_path)))
        # What changes its form is not read shard by shard.
        is_whole = not is_sharded(path) or (
            self._adopts(path) and compare(self.model, stored_shapes(path), path).converted
        )
        return self._load_whole(path) if is_whole else self._load_folder(path)

    def _load_whole(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        checkpoint = self.checkpoint_io.load_checkpoint(path)
        stored = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        weights, is_of_other = checkpoint.pop("state_dict"), self._adopts(path)
        if is_of_other:
            weights = checkpoint.pop(UNAVERAGED, weights)
            weights, found = adopt_weights(self.model, weights, path)
            self._run_module.note_differences(found)
        else:
            refuse_other_heads(self.model, weights, path)
        options = StateDictOptions(full_state_dict=True, strict=not is_of_other)
        set_model_state_dict(self.model, weights, options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            named = by_name(state, optimizer, self.model)
            if is_of_other:
                current = get_optimizer_state_dict(self.model, optimizer)
                named = convert_optimizer(self.model, named, stored)
                named = adopt_optimizer(named, current, found.resampled)
            late = self._stateless(optimizer, named["state"], path)
            options = StateDictOptions(full_state_dict=True, strict=not late)
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
            _forget(optimizer, late)
        return checkpoint

    def _load_folder(self, path: Path) -> dict[str, Any]:
        assert self.model is not None
        shapes, is_of_other = stored_shapes(path), self._adopts(path)
        model = get_model_state_dict(self.model)
        resampled: tuple[str, ...] = ()
        if is_of_other:
            found = compare(self.model, shapes, path)
            self._run_module.note_differences(found)
            resampled, others = found.resampled, found.fresh + found.resampled
            model = {name: value for name, value in model.items() if name not in others}
        else:
            refuse_other_heads(self.model, shapes, path)
        values = read_values(path)
        groups = values.pop("param_groups")
        states: list[dict[str, Any]] = [
            get_optimizer_state_dict(self.model, each) for each in self.optimizers
        ]
        stored = stored_states(path, len(states))
        lacking = [
            self._stateless(each, names.difference(resampled), path)
            for each, names in zip(self.optimizers, stored, strict=True)
        ]
        for state, late in zip(states, lacking, strict=True):
            for name in late:
                state["state"].pop(name, None)
        read_into(path, model, states)
        set_model_state_dict(self.model, model, options=StateDictOptions(strict=not is_of_other))
        if resampled:
            before = {name: torch.empty(shapes[name]) for name in resampled}
            read_into(path, before)
            options = StateDictOptions(full_state_dict=True, strict=False)
            after: dict[str, Any] = {**resample(self.model, before, path)}
            set_model_state_dict(self.model, after, options=options)
        for optimizer, state, saved, late in zip(
            self.optimizers, states, groups, lacking, strict=False
        ):
            options = StateDictOptions(strict=not late)
            whole = {**state, "param_groups": saved}
            if is_of_other:
                whole = adopt_optimizer(whole, state)
            set_optimizer_state_dict(self.model, optimizer, whole, options=options)
            _forget(optimizer, late)
        return values

    @property
    def _run_module(self) -> Any:
        return self.lightning_module

    def _adopts(self, path: Path) -> bool:
        """Whether a checkpoint is of another run, that this one goes on from."""
        goes_on_from = getattr(self._run_module, "goes_on_from", None)
        return goes_on_from is not None and goes_on_from(path)

    def _stateless(
        self, optimizer: Optimizer, stored: Collection[str], path: Path
    ) -> dict[str, Parameter]:
        """Parameters that an optimizer has no state of: heads of objectives that had not begun.

        Of another run any, such as what it had locked.
        """
        assert self.model is not None
        beginning = "" if self._adopts(path) else "objectives."
        own = {id(each) for group in optimizer.param_groups for each in group["params"]}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name.startswith(beginning) and id(parameter) in own and name not in stored
        }

    def _options(self) -> StateDictOptions:
        is_full = not writes_sharded_checkpoints(self)
        return StateDictOptions(full_state_dict=is_full, cpu_offload=True)


def _forget(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> None:
    """Drop the state that torch has filled in."""
    for parameter in parameters.values():
        optimizer.state.pop(parameter, None)


__all__ = ["FullyShardedStrategy"]
