"""Spaces that training with the sigmoid loss ends in, from a given start of scale and bias.

The setting of all experiments of Bangachev et al. 2025: N free pairs (or k-tuples) in d
dimensions, one scale and one relative bias, full batch, the loss divided by N^2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_siglip.lab.free_embeddings import Training, random_rows, train_free_embeddings
from dist_siglip.losses import LogitScaleBias, ModalityGraph, multimodal_sigmoid_loss
from dist_siglip.losses.logit_scale import BiasParameterization
from dist_siglip.losses.research.adapter import SimplexAdapter
from dist_siglip.losses.research.modalities import edges_of
from dist_siglip.metrics import collect_pair_statistics, joint_constellation

AUTHORS_SEED = 50


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run of the sigmoid loss on free embeddings.

    Args:
        num_pairs: N.
        dimension: d.
        num_modalities: k; 2 are pairs.
        graph: which modalities are compared.
        bias_parameterization: which number is the parameter; the other one follows.
        scale: logit scale at the start.
        relative_bias: at the start, also of the absolute parameterisation: bias = -scale times it.
        train_scale: whether the scale learns.
        train_bias: whether the bias, or relative bias, learns.
        is_locked: whether the first modality stays where it starts.
        has_adapter: whether an explicit adapter stands behind the rows; scale and relative bias
            are then set so that the loss starts as without it, and extended rows are normalised.
        draws: which matrices the modalities are, of those that the generator draws one after the
            other, counted from 0 and ascending; empty for the first ones. The authors' notebooks
            draw some that they do not use.
        steps: of training.
        seed: of the random start, beyond the authors' own.
    """

    num_pairs: int = 100
    dimension: int = 10
    num_modalities: int = 2
    graph: ModalityGraph = "complete"
    bias_parameterization: BiasParameterization = "relative"
    scale: float = 10.0
    relative_bias: float = 0.0
    train_scale: bool = True
    train_bias: bool = True
    is_locked: bool = False
    has_adapter: bool = False
    draws: tuple[int, ...] = ()
    steps: int = 10_000
    seed: int = 0


class Space(NamedTuple):
    """Result of a run.

    Attributes:
        training: rows and loss curve.
        loss: of the last step, mean over the N^2 pairs.
        scale: learned logit scale.
        relative_bias: learned; -bias / scale if the bias is the parameter.
        margin: half the gap between the worst positive and the worst negative over all edges.
        best_relative_bias: the middle of that gap.
        delta: of the adapter; 1 without one.
        folded: scale and relative bias that give the same loss without the adapter.
    """

    training: Training
    loss: float
    scale: float
    relative_bias: float
    margin: float
    best_relative_bias: float
    delta: float
    folded: tuple[float, float]


def train_space(start: Start, progress: Callable[[float], None] | None = None) -> Space:
    """Train free embeddings on the sigmoid loss and measure the space.

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, section 3.5 and appendix D; reduction, seed and
        projection as in the authors' notebooks.
    """
    generator = torch.Generator().manual_seed(AUTHORS_SEED + start.seed)
    draws = start.draws or tuple(range(start.num_modalities))
    drawn = [random_rows(start.num_pairs, start.dimension, generator) for _ in range(draws[-1] + 1)]
    rows = [drawn[draw] for draw in draws]
    rows[0].requires_grad_(not start.is_locked)
    adapter = SimplexAdapter(start.num_modalities) if start.has_adapter else None
    scale, relative_bias = start.scale, start.relative_bias
    if adapter is not None:
        scale, relative_bias = adapter.unfold(scale, relative_bias)
    logits = LogitScaleBias(
        scale,
        -scale * relative_bias,
        bias_parameterization=start.bias_parameterization,
        train_scale=start.train_scale,
        train_bias=start.train_bias,
    )

    def loss(features: list[Tensor]) -> Tensor:
        if adapter is not None:
            features = [F.normalize(extended, dim=-1) for extended in adapter(features)]
        total = multimodal_sigmoid_loss(
            features, *logits(), graph=start.graph, nonfinite="propagate"
        )
        return total / start.num_pairs

    training = train_free_embeddings(
        rows,
        loss,
        [*logits.parameters(), *(adapter.parameters() if adapter is not None else ())],
        steps=start.steps,
        normalize=adapter is None,
        progress=progress,
    )
    with torch.no_grad():
        learned_scale, learned_bias = (value.item() for value in logits())
    learned = (learned_scale, -learned_bias / learned_scale)
    margin, best = margin_of(training.rows, start.graph)
    return Space(
        training,
        training.loss,
        *learned,
        margin,
        best,
        1.0 if adapter is None else float(adapter.delta.detach()),
        learned if adapter is None else adapter.fold(*learned),
    )


def margin_of(rows: Sequence[Tensor], graph: ModalityGraph = "complete") -> tuple[float, float]:
    """Return margin and best relative bias with one threshold for all edges of the graph.

    Example:
        >>> margin_of([torch.eye(2), torch.eye(2)])
        (0.5, 0.5)
    """
    ids = torch.arange(len(rows[0]))
    found = joint_constellation(
        [
            collect_pair_statistics(rows[a], rows[b], ids, ids, logit_scale=1.0, logit_bias=0.0)
            for a, b in edges_of(graph, len(rows))
        ]
    )
    return found.margin, found.relative_bias
