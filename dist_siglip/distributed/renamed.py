"""Collectives under the name that the installed torch has for them."""

import torch.distributed as dist

# torch 2.14 renames these two and warns of the old names.
_RENAMED = hasattr(dist, "all_gather_single") and hasattr(dist, "reduce_scatter_single")
all_gather_single = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
reduce_scatter_single = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor
