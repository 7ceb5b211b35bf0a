"""Where is a dual encoder cut into shards? At its blocks, the rest as one, scale and bias apart.

Every block is gathered when it is needed and given back after; at most a few are whole at once.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dist_siglip.errors import UserError
from dist_siglip.models.tuning.layer_groups import block_names


def shard_module(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard ``module.towers`` and ``module.logits`` over a mesh, in place (FSDP2).

    Args:
        module: before it goes to its device and before its optimizer is built.
        mesh: axes "shard", or "replicate" and "shard" (hybrid sharding).

    Raises:
        UserError: if the mesh is of another strategy, or there are other parameters.
    """
    if "shard" not in (mesh.mesh_dim_names or ()):
        raise UserError(
            f"trainer.strategy has a mesh with axes {', '.join(mesh.mesh_dim_names or ())}; to "
            "shard this model use the class dist_siglip.strategies.FullyShardedStrategy"
        )
    sharded = ("towers.", "logits.")
    others = [name for name, _ in module.named_parameters() if not name.startswith(sharded)]
    if others:
        raise UserError(
            f"FullyShardedStrategy shards towers, scale and bias, and {others[0]} is none of them; "
            "use a loss without parameters, or trainer.strategy: ddp"
        )
    towers = module.get_submodule("towers")
    for name in block_names(towers):
        fully_shard(towers.get_submodule(name), mesh=mesh)
    fully_shard(towers, mesh=mesh)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(towers, method)
    # Apart, so that the loss can ask for them outside of the towers.
    fully_shard(module.get_submodule("logits"), mesh=mesh)
