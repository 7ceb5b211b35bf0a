"""Run a loss on this rank's rows and compare the global result with a reference."""

from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_siglip.distributed import ExchangeName, gather_rows, sum_over_ranks

# A new exchange is compared as soon as it has a name.
EXCHANGES = tuple(name for name in get_args(ExchangeName) if name != "local")
LAYOUTS = {  # local batch sizes by rank
    "one": (6,),
    "even-2": (3, 3),
    "uneven-2": (4, 1),
    "even-3": (2, 2, 2),
    "uneven-3": (3, 0, 4),
    "even-4": (2, 2, 2, 2),
    "uneven-4": (1, 4, 2, 3),
}
# Four ranks take as long as two and three together.
LAYOUT_CASES = [
    pytest.param(name, marks=[pytest.mark.e2e] if len(sizes) > 3 else [])
    for name, sizes in LAYOUTS.items()
]
WIDTH = 5


def layouts_of(world_size):
    """Names of the layouts for this many ranks."""
    return [name for name, sizes in LAYOUTS.items() if len(sizes) == world_size]


def make_rows(names, num_rows, dtype=torch.float64):
    """Unit rows for each name, the same on every rank."""
    generator = torch.Generator().manual_seed(num_rows)
    sides = torch.randn(len(names), num_rows, WIDTH, generator=generator, dtype=torch.float64)
    return {
        name: F.normalize(side, dim=-1).to(dtype) for name, side in zip(names, sides, strict=True)
    }


def local_rows(rows, layout, rank):
    """This rank's part of each tensor, as leaves."""
    start = sum(layout[:rank])
    return {name: all_[start : start + layout[rank]].clone() for name, all_ in rows.items()}


def global_result(loss_fn, arguments):
    """Global loss and mean gradients, as every rank would see them after DDP's all-reduce.

    ``arguments`` by name: 2-D tensors are rows of this rank, others are shared by all ranks.
    """
    loss = loss_fn(**arguments)
    if loss.requires_grad:
        loss.backward()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    result = {"loss": sum_over_ranks(loss) / world_size}
    for name, value in arguments.items():
        if value.grad is None:
            result[name] = None
        elif value.ndim == 2:
            # A parameter of a tower would see the mean; rows live on one rank: sum / W.
            result[name] = gather_rows(value.grad) / world_size
        else:
            result[name] = sum_over_ranks(value.grad) / world_size
    return result


def largest_error(result, reference):
    """Largest difference over loss and the gradients that were computed, relative to each."""
    worst = 0.0
    for name, value in result.items():
        if value is None:
            continue
        truth = reference[name].reshape(value.shape)
        size = truth.abs().max().clamp_min(1e-12)
        worst = max(worst, ((value.double() - truth).abs().max() / size).item())
    return worst
