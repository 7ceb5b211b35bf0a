"""Where the values of a module are: in shards over the ranks, and first of all on the first one.

For sharding each block of a tower is a unit of its own, the rest of the towers another, scale and
bias a third, what a loss learns a fourth; objectives and their teacher are split likewise. A block
is gathered when it is needed and freed after. Blocks are gathered in bfloat16 where training runs
in it, gradients are added up in float32; scale, bias and loss stay in float32. Micro-batches go
backward one after the other: of no more than one block, and of what is in none, gradients are whole
at a time.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from dist_siglip.distributed import copy_from_first_rank
from dist_siglip.errors import UserError
from dist_siglip.models.tuning import block_names


def shard_module(
    module: nn.Module, mesh: DeviceMesh, *, precision: str = "32-true", compile_blocks: bool = False
) -> None:
    """Shard a module over a mesh (FSDP2), in place: towers, scale, bias, loss, objectives, teacher.

    Args:
        module: before it goes to its device and before its optimizer is built.
        mesh: axes "shard", or "replicate" and "shard" (hybrid sharding).
        precision: of the Trainer.
        compile_blocks: translate each block with torch.compile. The hooks that gather and free
            parameters stand between blocks; inside a translated tower each would break its graph.

    Raises:
        UserError: if the mesh is of another strategy, or there are other parameters.
    """
    if "shard" not in (mesh.mesh_dim_names or ()):
        raise UserError(
            f"trainer.strategy has a mesh with axes {', '.join(mesh.mesh_dim_names or ())}; to "
            "shard this model use the class dist_siglip.training.strategies.FullyShardedStrategy"
        )
    sharded = ("towers.", "logits.", "loss.", "objectives.", "teacher.")
    others = [name for name, _ in module.named_parameters() if not name.startswith(sharded)]
    if others:
        raise UserError(
            "FullyShardedStrategy shards towers, scale, bias, loss and objectives, and "
            f"{others[0]} is none of them; use trainer.strategy: ddp"
        )
    towers = module.get_submodule("towers")
    policy = MixedPrecisionPolicy()
    if precision.startswith("bf16"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in block_names(towers):
        block = towers.get_submodule(name)
        if compile_blocks:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(towers, mesh=mesh, mp_policy=policy)
    for method in (
        "encode_image",
        "encode_image_tokens",
        "encode_patches",
        "encode_text",
        "encode_view",
    ):
        register_fsdp_forward_method(towers, method)
    others_of_it = [(each, False) for each in module.get_submodule("objectives").children()]
    if getattr(module, "teacher", None) is not None:
        # Nothing goes backward through it, after which it would be in shards again.
        others_of_it.append((module.get_submodule("teacher"), True))
    for part, reshards in others_of_it:
        for name in block_names(part):
            block = part.get_submodule(name)
            if compile_blocks:
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards or None)
        for method in ("measure", "write", "write_boxes", "stand_in", "prototypes"):
            if hasattr(part, method):
                register_fsdp_forward_method(part, method)
    # Apart, so that the loss can ask for them outside of the towers; never in half precision.
    for name in ("logits", "loss"):
        part = module.get_submodule(name)
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)


def receive_values(
    module: nn.Module,
    device: torch.device,
    *,
    has_values: bool,
    whole: dict[str, Any],
    beside: Iterable[Tensor],
) -> None:
    """Give a module the values of the first rank, on its device.

    Distributed contract: every rank calls it with the same module, sharded or not.

    Args:
        module: its parameters and buffers are on the CPU, or on torch's meta device.
        device: of this rank.
        has_values: False replaces parameters and buffers by new ones.
        whole: if it is sharded, its state on the first rank before that; empty on the others.
        beside: tensors of this device to be overwritten, too.
    """
    if has_values:
        module.to(device)
    else:
        module.to_empty(device=device)
    tensors = [*beside, *module.buffers()]
    if any(isinstance(each, FSDPModule) for each in module.modules()):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, whole, options=options)
    else:
        tensors += [parameter.detach() for parameter in module.parameters()]
    copy_from_first_rank(tensors)
