"""The sigmoid loss between more than two modalities, with one scale and one bias for all."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, agree_once
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import Nonfinite, check_rows
from dist_siglip.losses.kernels.pair_terms import Kernel
from dist_siglip.losses.sigmoid import siglip_loss

ModalityGraph = Literal["complete", "star"]


def multimodal_sigmoid_loss(
    features: Sequence[Tensor],
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    graph: ModalityGraph = "complete",
    nonfinite: Nonfinite = "raise",
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """Mean of ``siglip_loss`` over the edges of a graph whose nodes are modalities.

        loss = 1/|edges| * sum_{(a, b) in edges} siglip_loss(features[a], features[b])

    "complete" joins every two of k modalities, k (k-1) / 2 edges; "star" joins the first, the
    hub, with each other one, k - 1 edges. With two modalities both are ``siglip_loss``.

    Distributed contract: that of ``siglip_loss``, for the features of every modality, scale and
    bias. One pass per edge, one after the other; backward communicates nothing.

    Args:
        features: k >= 2 tensors (B, D), L2-normalised, of one dtype; row i of each belongs to
            sample i. B may differ between ranks.
        logit_scale: one element > 0, the multiplier, shared by all edges.
        logit_bias: one element, added to every logit, shared by all edges; None for none.
        graph: which modalities are compared.
        nonfinite: as for ``siglip_loss``.
        exchange: how features reach other ranks, see ``dist_siglip.distributed.exchange``.
        group: process group; the default group if None.
        chunk_rows: side of the largest tile of logits that exists at a time. None is 1024 on a
            CPU, 8192 rows and 4096 columns on a GPU.
        kernel: who computes the terms of a tile, as for ``siglip_loss``.

    Returns:
        (), float32 (float64 for float64 features); a mean over edges of sums over pairs times W/N.

    Raises:
        UserError: if there are fewer than two modalities, their shapes or dtypes differ (names
            the modality), the graph is unknown, or as ``siglip_loss`` does.

    Example:
        >>> eye = torch.eye(2)
        >>> multimodal_sigmoid_loss([eye, eye, eye], torch.tensor(10.0), torch.tensor(-10.0))
        tensor(0.6932)

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, synchronisation graphs; the paper prints the sum
        over edges, the authors' code and we take the mean.
    """
    if graph not in get_args(ModalityGraph):
        raise UserError(f"graph ({graph!r}) must be one of {', '.join(get_args(ModalityGraph))}")
    if len(features) < 2:
        raise UserError(f"features holds {len(features)} modalities; pass at least 2")
    for number, other in enumerate(features):
        check_rows(**{f"modality {number}": other})
        if other.shape != features[0].shape or other.dtype != features[0].dtype:
            raise UserError(
                f"modality {number} is {other.dtype} {tuple(other.shape)} but modality 0 is "
                f"{features[0].dtype} {tuple(features[0].shape)}; all must be (B, D) of one dtype"
            )
    agree_once(f"{graph} graph of {len(features)} modalities", group)
    losses = [
        siglip_loss(
            features[a],
            features[b],
            logit_scale,
            logit_bias,
            nonfinite=nonfinite,
            exchange=exchange,
            group=group,
            chunk_rows=chunk_rows,
            kernel=kernel,
        )
        for a, b in edges_of(graph, len(features))
    ]
    return torch.stack(losses).mean()


def edges_of(graph: ModalityGraph, num_modalities: int) -> list[tuple[int, int]]:
    """List the pairs of modalities that are compared.

    Example:
        >>> edges_of("complete", 3), edges_of("star", 3)
        ([(0, 1), (0, 2), (1, 2)], [(0, 1), (0, 2)])
    """
    pairs = list(combinations(range(num_modalities), 2))
    return pairs if graph == "complete" else [(a, b) for a, b in pairs if a == 0]
