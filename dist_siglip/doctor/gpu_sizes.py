"""Sizes of the parts of the acceptance run, and what several parts share."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_siglip import models
from dist_siglip.cli import main


class Sizes(NamedTuple):
    """How much each part does.

    Attributes:
        loss_shapes: local batch and width of each loss.
        loss_rounds: of each.
        world_size: of the simulated world.
        hop_rows: local batch of the hops that are timed, small: what counts is the host.
        memory_rows: local batch of the step whose memory is measured.
        transfers: of the companion group under load.
        fit_model: architecture that trains without a wait.
        fit_batch: its pairs.
        fit_steps: its steps.
        train_model: architecture of the timed training; None for a tiny one.
        train_batch: its pairs.
        train_steps: that count.
        compiled: whether its towers are, for each run.
        candidates: of the retrieval.
        embed_dim: width of the features of hops, transfers and retrieval.
        tests: files or folders of tests; () for those that need a GPU.
    """

    loss_shapes: tuple[tuple[int, int], ...]
    loss_rounds: int
    world_size: int
    hop_rows: int
    memory_rows: int
    transfers: int
    fit_model: str
    fit_batch: int
    fit_steps: int
    train_model: str | None
    train_batch: int
    train_steps: int
    candidates: int
    embed_dim: int
    compiled: tuple[bool, ...] = (False, True)
    tests: tuple[str, ...] = ()


LARGE = Sizes(
    loss_shapes=((4096, 768), (16384, 768), (32768, 1152)),
    loss_rounds=5,
    world_size=64,
    hop_rows=64,
    memory_rows=4096,
    transfers=200,
    fit_model="ViT-B-32",
    fit_batch=256,
    fit_steps=33,
    train_model="ViT-B-16",
    train_batch=512,
    train_steps=20,
    candidates=100_000,
    embed_dim=768,
)
SMALL = LARGE._replace(
    loss_shapes=((4096, 768), (8192, 768)),
    loss_rounds=3,
    memory_rows=1024,
    fit_batch=64,
    train_batch=64,
    train_steps=10,
    candidates=50_000,
)
TINY = Sizes(
    loss_shapes=((32, 16),),
    loss_rounds=1,
    world_size=4,
    hop_rows=4,
    memory_rows=8,
    transfers=5,
    fit_model=str(Path(models.__file__).with_name("handwriting.json")),
    fit_batch=16,
    fit_steps=12,
    train_model=None,
    train_batch=8,
    train_steps=10,
    candidates=200,
    embed_dim=16,
    compiled=(False,),
)


class PartError(Exception):
    """A part found something wrong; what it measured is kept.

    Args:
        text: a sentence.
        found: for the JSON.
    """

    def __init__(self, text: str, found: dict[str, Any]) -> None:
        super().__init__(text)
        self.found = found


def make_leaves(
    device: torch.device, rows: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make features, scale and bias that want gradients; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, rows, width, generator=generator).to(device)
    image, text = (F.normalize(side, dim=1).to(dtype).requires_grad_() for side in sides)
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (10.0, -10.0))
    return image, text, scale, bias


def read_command(*names: str, **options: Any) -> list[dict[str, Any]]:
    """Run one of our commands and read the rows that it prints."""
    said = io.StringIO()
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with redirect_stdout(said):
        code = main([*names, *arguments, "--json=true"])
    if code:
        raise RuntimeError(f"{' '.join(names)} ended with code {code}; the log says why")
    rows: list[dict[str, Any]] = json.loads(said.getvalue())
    return rows


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
