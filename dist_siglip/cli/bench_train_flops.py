"""How much arithmetic is a training step, and how much could this machine do?

Model FLOPs are those of the matrix products and convolutions, forward and backward, without any
recomputation; the limit is the fastest plain matrix product in the same precision, measured here
and now. Their quotient, the model FLOPs utilisation, needs no data sheet.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dist_siglip.losses.kernels.products import product, uses_onednn
from dist_siglip.models import BuiltModel

_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}


def step_flops(built: BuiltModel, *, local_batch_size: int, global_batch_size: int) -> float:
    """Count the model FLOPs of one training step of one rank.

    towers: counted on shapes alone, forward and backward, for two pairs. loss: 3 products of
    (b, D), (N, D) and (b, N) matrices, 6 b N D.

    Args:
        built: the model; its towers are moved to the meta device and hold no weights afterwards.
        local_batch_size: b, pairs of the rank.
        global_batch_size: N, pairs of all ranks.
    """
    size = built.image_size
    height, width = (size, size) if isinstance(size, int) else size
    clip = built.encoder.to("meta").clip
    images = torch.zeros(2, 3, height, width, device="meta")
    texts = torch.zeros(2, built.context_length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        (clip.encode_image(images).sum() + clip.encode_text(texts).sum()).backward()
    loss = 6.0 * local_batch_size * global_batch_size * built.embed_dim
    return counter.get_total_flops() / 2 * local_batch_size + loss


def gemm_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Measure FLOPs per second of the fastest plain matrix product.

    Args:
        device: where.
        dtype: of the matrices.
        seconds: time for each size and library.
    """
    best = 0.0
    for side in _SIDES[device.type]:
        left, right = torch.randn(2, side, side, device=device).to(dtype).unbind()
        runs: list[Callable[[Tensor, Tensor], Tensor]] = [torch.mm]
        if uses_onednn(left):
            runs.append(product)
        for run in runs:
            best = max(best, 2.0 * side**3 / _least_seconds(run, left, right, seconds))
    return best


def _least_seconds(
    run: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, seconds: float
) -> float:
    repeats = 10 if left.device.type == "cuda" else 1
    least, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(repeats):
            run(left, right)
        if left.device.type == "cuda":
            torch.cuda.synchronize(left.device)
        least = min(least, (time.perf_counter() - started) / repeats)
    return least
