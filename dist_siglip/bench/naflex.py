"""``bench naflex``: an image tower of pictures of any shape, beside one of pictures of one size.

At each length both take a step, forward and backward, in turns within every round: packed pictures
of a mix of shapes, padded to the length, and pictures that fill it. What differs is the price of
keeping shapes: masks, positions for each picture, and patches that are padding.
"""

import json as json_text
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dist_siglip.bench.plan import mebibytes
from dist_siglip.bench.simulate import LiveBytes
from dist_siglip.bench.train_runs import Precision
from dist_siglip.data.samples.patches import pack_pictures, target_grid
from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder

NAFLEX, SQUARE = "NaFlex", "one size"

# Height and width of twenty pictures, as photo libraries and the web have them: 4:3 and 3:2 in both
# directions, squares, 16:9, and a banner. A guess of ours, not counted from a data set.
MIX = (
    *[(480, 640)] * 5,
    *[(640, 480)] * 2,
    *[(1000, 1500)] * 4,
    *[(1500, 1000)] * 2,
    *[(1080, 1080)] * 3,
    *[(1080, 1920)] * 2,
    (1920, 1080),
    (300, 1000),
)

# A vision transformer of 2 M parameters beside the smallest of texts.
_SMALL: dict[str, Any] = {
    "embed_dim": 192,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 256,
        "timm_model_name": "vit_base_patch16_siglip_256",
        "timm_pool": "map",
        "timm_proj": "none",
        "patch_size": 16,
        "width": 192,
        "layers": 4,
        "head_width": 64,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}


class StepCost(NamedTuple):
    """What a step of an image tower took.

    Attributes:
        seconds: of the clock.
        processor_seconds: that this process worked.
    """

    seconds: float
    processor_seconds: float


def naflex(
    model: str | None = None,
    lengths: Sequence[int] = (64, 128, 256, 576),
    local_batch_size: int = 8,
    precision: Precision = "32-true",
    rounds: int = 3,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> int:
    """Time a step of an image tower at each sequence length, NaFlex and one size in turns.

    Pictures are noise of a mix of shapes, 4:3, 3:2, 1:1, 16:9 and a banner. A step is forward and
    backward, without data, texts, loss and optimizer. One size is the grid of as many patches that
    is the nearest to a square. Padding is the share of a length that the mix leaves empty.

    Args:
        model: open_clip architecture whose image tower is a ViT of timm with attention pooling, a
            built-in name or a JSON config. Null is one of 4 layers, 192 wide.
        lengths: patches of a picture.
        local_batch_size: pictures of a step.
        precision: of products.
        rounds: steps of each that count, after one that does not; the median counts.
        device: cpu, cuda, or auto for cuda where there is one.
        json: print JSON instead of a table.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in (
        ("local_batch_size", local_batch_size),
        ("rounds", rounds),
        *(("lengths", length) for length in lengths),
    ):
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = str(Path(folder) / "small.json")
            Path(model).write_text(json_text.dumps(_SMALL))
        rows = [
            row
            for length in lengths
            for row in _measure(
                model, length, local_batch_size, precision, rounds, torch.device(device)
            )
        ]
    if json:
        sys.stdout.write(json_text.dumps(rows, indent=2) + "\n")
    else:
        Console().print(_table(rows, rounds, local_batch_size, f"{device}, {precision}"))
    return 0


def mixed_pictures(number: int, patch_size: int, num_patches: int) -> Tensor:
    """Return packed noise (number, 1 + N, 3 p^2) of the shapes of ``MIX``, in turns."""
    turns = cycle([shape for first in range(5) for shape in MIX[first::5]])
    grids = [target_grid(*shape, patch_size, num_patches) for shape in islice(turns, number)]
    return torch.stack(
        [
            pack_pictures(
                torch.randn(3, rows * patch_size, columns * patch_size), patch_size, num_patches
            )
            for rows, columns in grids
        ]
    )


def padding_share(patch_size: int, num_patches: int) -> float:
    """Return the share of a length that is padding, mean over ``MIX``.

    Example:
        >>> round(padding_share(16, 256), 3)
        0.019
    """
    grids = [target_grid(*shape, patch_size, num_patches) for shape in MIX]
    return 1 - fmean(rows * columns for rows, columns in grids) / num_patches


def grid_of(num_patches: int) -> tuple[int, int]:
    """Return the grid of so many patches that is the nearest to a square.

    Example:
        >>> grid_of(128), grid_of(256), grid_of(7)
        ((8, 16), (16, 16), (1, 7))
    """
    rows = next(n for n in range(math.isqrt(num_patches), 0, -1) if num_patches % n == 0)
    return rows, num_patches // rows


def _measure(
    model: str, length: int, number: int, precision: Precision, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    flexible = build_dual_encoder(model, num_patches=length, check_tokenizer=False)
    assert flexible.patches is not None  # or num_patches is refused
    side = flexible.patches.patch_size
    size = grid_of(length)[0] * side, grid_of(length)[1] * side
    fixed = build_dual_encoder(model, image_size=size, check_tokenizer=False)
    inputs = {NAFLEX: mixed_pictures(number, side, length), SQUARE: torch.randn(number, 3, *size)}
    towers = {NAFLEX: flexible.encoder.clip, SQUARE: fixed.encoder.clip}
    steps = {}
    for name, clip in towers.items():
        visual: Any = clip.visual
        steps[name] = partial(_step, visual.to(device).train(), inputs[name].to(device), precision)
    peaks = {name: _peak(step, device) for name, step in steps.items()}  # and the warm-up
    found: dict[str, list[StepCost]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(_cost(step, device))
    padding = {NAFLEX: padding_share(side, length), SQUARE: 0.0}
    pairs = {name: list(zip(own, found[SQUARE], strict=True)) for name, own in found.items()}
    return [
        {
            "patches": length,
            "tower": name,
            "images_per_second": number / median(each.seconds for each in costs),
            "processor_seconds": median(each.processor_seconds for each in costs),
            "ratio": median(own.seconds / other.seconds for own, other in pairs[name]),
            "processor_ratio": median(
                own.processor_seconds / other.processor_seconds for own, other in pairs[name]
            ),
            "peak_bytes": peaks[name],
            "padding": padding[name],
        }
        for name, costs in found.items()
    ]


def _step(tower: nn.Module, images: Tensor, precision: Precision) -> None:
    is_narrow = precision == "bf16-mixed"
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=is_narrow):
        features: Tensor = tower(images)
    features.float().sum().backward()
    tower.zero_grad(set_to_none=True)


def _peak(step: Any, device: torch.device) -> int:
    """Most bytes of tensors that a step makes, gradients included; the allocator's on a GPU."""
    if device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as counter:
        step()
    return counter.peak


def _cost(step: Any, device: torch.device) -> StepCost:
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(device)
    start, worked = time.perf_counter(), time.process_time()
    step()
    if is_gpu:
        torch.cuda.synchronize(device)
    return StepCost(time.perf_counter() - start, time.process_time() - worked)


def _table(rows: list[dict[str, Any]], rounds: int, number: int, where: str) -> Table:
    table = Table(
        title=f"image towers by sequence length on {where}",
        caption=f"forward and backward of {number} pictures, medians of {rounds} rounds; "
        "processors: ms that this process worked for a step; ratios: over the tower of one size in "
        "the same round; peak: tensors of a step, gradients included, without weights; padding: "
        "share of the length, mean over the mix",
    )
    headings = ("patches", "tower", "images/s", "ratio", "processors", "ratio", "peak", "padding")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "tower" else "right")
    for row in rows:
        table.add_row(
            str(row["patches"]),
            row["tower"],
            f"{row['images_per_second']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['processor_seconds'] * 1e3:,.0f}",
            f"{row['processor_ratio']:.2f}",
            mebibytes(row["peak_bytes"]),
            f"{row['padding']:.1%}",
        )
    return table
