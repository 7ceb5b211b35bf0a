"""Parity of the loss of many ranks and that of one, with all gradients.

Two, three and four processes hold uneven parts of one batch, one of them none at all. Every
exchange is compared with the full batch in one process, written in plain autograd: loss, and the
gradients of features, scale, and bias or relative bias, in float32 and float64.

Source: Zhai et al. 2023, arXiv:2303.15343, section 3.3: the chunked loss is the loss.
"""

import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from dist_siglip.distributed import ExchangeName, gather_rows, leave_process_groups, sum_over_ranks
from dist_siglip.lab.experiment import (
    COLOURS,
    LINES,
    MARKERS,
    LabSettings,
    Outcome,
    judge,
    label,
    new_figure,
)
from dist_siglip.losses import LogitScaleBias, siglip_loss, softmax_loss
from dist_siglip.losses.logit_scale import BiasParameterization

_ROW_COUNTS = {2: (14, 6), 3: (9, 0, 11), 4: (3, 8, 0, 9)}  # of 20 pairs, by rank
_WIDTH = 16
_TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
_EXCHANGES = tuple(name for name in get_args(ExchangeName) if name not in ("local", "auto"))


class _Case(NamedTuple):
    loss: str  # "sigmoid" or "softmax"
    bias: BiasParameterization
    dtype: str
    chunk_rows: int | None


_KINDS: tuple[tuple[str, BiasParameterization], ...] = (
    ("sigmoid", "absolute"),
    ("sigmoid", "relative"),
    ("softmax", "absolute"),
)
_CASES = [
    _Case(loss, bias, dtype, chunk_rows)
    for loss, bias in _KINDS
    for dtype in _TOLERANCE
    for chunk_rows in (None, 4)
]
_Numbers = dict[str, Tensor]


def run(settings: LabSettings) -> Outcome:
    """Start the ranks; when quick, two only."""
    world_sizes = (2,) if settings.quick else tuple(_ROW_COUNTS)
    errors: dict[tuple[int, str, str], float] = {}
    for number, world_size in enumerate(world_sizes):
        with tempfile.TemporaryDirectory() as folder:
            start_processes(
                _enter,
                args=(world_size, folder, settings.seed),
                nprocs=world_size,
                start_method="spawn",
            )
            for exchange, dtype, error in json.loads((Path(folder) / "errors.json").read_text()):
                key = world_size, exchange, dtype
                errors[key] = max(error, errors.get(key, 0.0))
        settings.progress((number + 1) / len(world_sizes))
    rows = [
        judge(
            f"{world_size} ranks, {exchange}, {dtype}: largest error", 0, error, _TOLERANCE[dtype]
        )
        for (world_size, exchange, dtype), error in errors.items()
    ]
    figure, (axes,) = new_figure(1, panel_width=5.4)
    for number, exchange in enumerate(_EXCHANGES):
        for dtype, line in zip(_TOLERANCE, LINES, strict=False):
            axes.semilogy(
                world_sizes,
                [max(errors[size, exchange, dtype], 1e-17) for size in world_sizes],
                linestyle=line,
                marker=MARKERS[number],
                markersize=10 - 2 * number,  # they lie on one another
                color=COLOURS[number],
                label=exchange if dtype == "float32" else None,
            )
    axes.set_xticks(world_sizes)
    label(axes, "solid: float32, dashed: float64", "ranks", "largest relative error")
    return Outcome(
        tuple(rows),
        figure,
        (
            "The largest difference over losses (sigmoid with bias, sigmoid with relative bias, "
            "softmax), tile sizes and all gradients, each relative to the largest element.",
            "Reference: one process, the full batch in float64, logsigmoid and autograd.",
        ),
    )


def _enter(rank: int, world_size: int, folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    try:
        errors = _compare(rank, world_size, seed)
        if rank == 0:
            (Path(folder) / "errors.json").write_text(json.dumps(errors))
        dist.barrier()
    finally:
        leave_process_groups()


def _compare(rank: int, world_size: int, seed: int) -> list[tuple[str, str, float]]:
    """Exchange, dtype and largest relative error of every case."""
    generator = torch.Generator().manual_seed(seed)
    counts = _ROW_COUNTS[world_size]
    shape = (2, sum(counts), _WIDTH)
    both = F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    errors = []
    for case in _CASES:
        dtype = {"float32": torch.float32, "float64": torch.float64}[case.dtype]
        rounded = both.to(dtype)
        truth = _gradients(_plain(case.loss), rounded.double(), case.bias)
        for exchange in _EXCHANGES:
            ours = _ours(case, exchange)
            local = _gradients(ours, rounded[:, mine], case.bias)
            whole = {
                name: gather_rows(value) if value.ndim == 2 else sum_over_ranks(value)
                for name, value in local.items()
            }
            error = max(
                float((whole[name] / world_size - value).abs().max() / value.abs().max())
                for name, value in truth.items()
                if float(value.abs().max())
            )
            errors.append((exchange, case.dtype, error))
    return errors


_Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _gradients(loss: _Loss, both: Tensor, bias: BiasParameterization) -> _Numbers:
    """Loss and gradients of features and of the two learned numbers."""
    images, texts = (side.clone().requires_grad_() for side in both)
    logits = LogitScaleBias(12.0, -4.0, bias_parameterization=bias).to(both.dtype)
    value = loss(images, texts, *logits())
    value.backward()
    gradients = {name: parameter.grad for name, parameter in logits.named_parameters()}
    gradients |= {"images": images.grad, "texts": texts.grad}
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    return {"loss": value.detach().reshape(1), **found}


def _ours(case: _Case, exchange: ExchangeName) -> _Loss:
    def loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        function = siglip_loss if case.loss == "sigmoid" else softmax_loss
        return function(images, texts, scale, bias, exchange=exchange, chunk_rows=case.chunk_rows)

    return loss


def _plain(name: str) -> _Loss:
    """Loss of the full batch by the textbook formula."""

    def sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        signs = 2 * torch.eye(len(images), dtype=images.dtype) - 1
        return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)

    def softmax(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits, labels = scale * images @ texts.T, torch.arange(len(images))
        rows, columns = F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)
        return (rows + columns) / 2 + 0 * bias

    return sigmoid if name == "sigmoid" else softmax
