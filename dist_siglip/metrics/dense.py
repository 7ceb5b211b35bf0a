"""What patch tokens know of places: votes of the nearest labelled patches, a linear map, pointing.

Labels are class numbers, one for each token. A token whose label is below 0 counts nowhere, as the
border of an object does in public masks.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed import ExchangeName, fetch_rows, sum_over_ranks
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors
from dist_siglip.metrics.rows import check_features, raise_together
from dist_siglip.metrics.tiles import row_slices


@torch.no_grad()
def vote_labels(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    *,
    k: int = 10,
    temperature: float = 0.07,
    chunk_rows: int | None = None,
    exchange: ExchangeName = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Let the k nearest labelled tokens of all ranks vote on the class of each token.

        share_c = sum_{j nearest, label_j = c} exp(cos_j / t) / sum_{j nearest} exp(cos_j / t)

    Distributed contract: every rank passes its own queries and its part of the bank, any number of
    each (0 too). One exchange of the bank without gradient, and one ``fetch_rows`` of labels.

    Args:
        queries: (B, C) tokens, finite; their length does not matter.
        bank: (M, C) tokens of known class.
        bank_labels: (M,) int64, below ``num_classes``; below 0 the token has no vote.
        num_classes: K.
        k: neighbours; all of the bank if it has fewer.
        temperature: t.
        chunk_rows: longest side of a live rectangle of cosines; see ``tile_side``.
        exchange: how the bank reaches the other ranks.
        group: process group.

    Returns:
        (B, K) float64, shares of the votes; rows add up to 1, or to 0 if nothing of the bank votes.

    Raises:
        UserError: if a number is out of range, or tokens or labels are unusable; on every rank.

    Example:
        >>> bank, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> vote_labels(torch.tensor([[3.0, 3.0]]), bank, labels, 2)
        tensor([[0.5000, 0.5000]], dtype=torch.float64)

    Source:
        Defaults and weights of the nearest-neighbour evaluation of DINO (Caron et al. 2021,
        arXiv:2104.14294), on patches.
    """
    problem = _problem_of_labels("bank_labels", bank_labels, num_classes)
    if not 0 < temperature < math.inf:
        problem = f"temperature ({temperature}) of votes must be above 0; try 0.07"
    raise_together(problem, device=queries.device, group=group)
    check_features(
        [("bank", bank), ("queries", queries)],
        [("bank_labels", bank_labels)],
        unit_norm=False,
        group=group,
    )
    votes = bank_labels >= 0
    found = nearest_neighbors(
        F.normalize(queries.double(), dim=1),
        F.normalize(bank[votes].double(), dim=1),
        k,
        chunk_rows=chunk_rows,
        exchange=exchange,
        group=group,
    )
    is_found = found.positions >= 0
    (labels,) = fetch_rows([bank_labels[votes]], found.positions[is_found], group=group)
    # Cosines of -inf stand where the bank is shorter than k: no weight. Without any, all are NaN.
    weights = (found.similarities / temperature).softmax(dim=1).nan_to_num(0.0)
    classes = torch.zeros_like(found.positions).masked_scatter_(is_found, labels)
    return weights.new_zeros(len(queries), num_classes).scatter_add_(1, classes, weights)


@torch.no_grad()
def linear_label_map(
    tokens: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ridge: float = 1e-2,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Fit the linear map from tokens to classes, in closed form.

        W = argmin |[X 1] W - Y|^2 + ridge |W|^2 = ([X 1]^T [X 1] + ridge I)^-1 [X 1]^T Y

    with Y one column for each class. ``F.pad(tokens, (0, 1), value=1.0) @ W`` are the scores.

    Distributed contract: every rank passes its own rows, any number of them (0 too); one all-reduce
    of (C + 1)(C + 1 + K) numbers. Every rank gets the same result.

    Args:
        tokens: (B, C), finite.
        labels: (B,) int64, below ``num_classes``; rows below 0 are left out.
        num_classes: K.
        ridge: weight of the squared entries, above 0.
        group: process group.

    Returns:
        (C + 1, K) float64 on the device of the tokens; the last row is the constant.

    Raises:
        UserError: if ``ridge`` is out of range, or tokens or labels are unusable; on every rank.

    Example:
        >>> tokens, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
        >>> linear_label_map(tokens, labels, 2, ridge=0.5)[0]
        tensor([-0.3636,  0.5455], dtype=torch.float64)
    """
    problem = _problem_of_labels("labels", labels, num_classes)
    if not 0 < ridge < math.inf:
        problem = f"ridge ({ridge}) must be above 0; try 0.01"
    raise_together(problem, device=tokens.device, group=group)
    check_features([("tokens", tokens)], [("labels", labels)], unit_norm=False, group=group)
    width = tokens.shape[1] + 1
    sums = tokens.new_zeros((width, width + num_classes), dtype=torch.float64)
    for part in row_slices(len(tokens)):
        counts = labels[part] >= 0
        rows = F.pad(tokens[part][counts].double(), (0, 1), value=1.0)
        classes = F.one_hot(labels[part][counts], num_classes).double()
        sums.addmm_(rows.T, torch.cat([rows, classes], dim=1))
    sums = sum_over_ranks(sums, group)
    sums[:, :width].diagonal().add_(ridge)
    return torch.linalg.solve(sums[:, :width], sums[:, width:])


class Segmentation(NamedTuple):
    """How well classes of tokens are told, over the tokens of all ranks.

    Attributes:
        accuracy: share of tokens of the right class, background left out; NaN without any.
        mean_iou: mean of ``ious``, background included; NaN without any.
        ious: (K,) float64 on the CPU, of each class the tokens that have it and are told to, over
            those that have it or are told to; NaN for a class that neither occurs nor is told.
    """

    accuracy: float
    mean_iou: float
    ious: Tensor


@torch.no_grad()
def segmentation(
    predicted: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    background: int | None = None,
    group: ProcessGroup | None = None,
) -> Segmentation:
    """Compare told classes of tokens with the true ones.

    Distributed contract: every rank passes its own rows, any number of them (0 too); one all-reduce
    of K^2 numbers. Every rank gets the same result.

    Args:
        predicted: (B,) int64 in [0, K).
        labels: (B,) int64, below K; rows below 0 are left out.
        num_classes: K.
        background: class that accuracy leaves out; None for none.
        group: process group.

    Raises:
        UserError: if classes are out of range or shapes differ; on every rank.

    Example:
        >>> found = segmentation(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2, background=1)
        >>> found.accuracy, found.mean_iou, found.ious.tolist()
        (0.5, 0.5, [0.5, 0.5])
    """
    problem = _problem_of_labels("labels", labels, num_classes) or _problem_of_labels(
        "predicted", predicted, num_classes, least=0
    )
    if problem is None and predicted.shape != labels.shape:
        problem = f"predicted {tuple(predicted.shape)} must be {tuple(labels.shape)}, as labels are"
    raise_together(problem, device=labels.device, group=group)
    counts = labels >= 0
    pairs = labels[counts] * num_classes + predicted[counts]
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=labels.device)
    confusion.scatter_add_(0, pairs, torch.ones_like(pairs))
    table = sum_over_ranks(confusion, group).view(num_classes, num_classes).cpu().double()
    right = table.diagonal()
    ious = right / (table.sum(dim=0) + table.sum(dim=1) - right)
    is_object = torch.arange(num_classes) != (-1 if background is None else background)
    accuracy = right[is_object].sum() / table.sum(dim=1)[is_object].sum()
    return Segmentation(float(accuracy), float(ious.nanmean()), ious)


@torch.no_grad()
def pointing_accuracy(
    scores: Tensor,
    labels: Tensor,
    *,
    background: int | None = None,
    group: ProcessGroup | None = None,
) -> float:
    """Share of objects whose best token, of all of their picture, lies on them.

    An object is a class that occurs in a picture; its best token has the highest score of that
    class, of equal ones the first.

    Distributed contract: every rank passes its own pictures, any number of them (0 too); one
    all-reduce of two numbers. Every rank gets the same result.

    Args:
        scores: (B, T, K) of each token for each class, finite.
        labels: (B, T) int64, below K; below 0 is no class, and no hit.
        background: class that is no object; None for none.
        group: process group.

    Returns:
        In [0, 1]; NaN without objects.

    Raises:
        UserError: if classes are out of range or shapes differ; on every rank.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.2], [0.1, 0.1]]])
        >>> pointing_accuracy(scores, torch.tensor([[0, 1]]))
        0.5
    """
    problem = _problem_of_labels("labels", labels, scores.shape[-1])
    if problem is None and (scores.ndim != 3 or scores.shape[:2] != labels.shape):
        problem = (
            f"scores {tuple(scores.shape)} must be (B, T, K), one row for each of labels "
            f"{tuple(labels.shape)}"
        )
    raise_together(problem, device=labels.device, group=group)
    classes = torch.arange(scores.shape[2], device=labels.device)
    at_best = labels.gather(1, scores.argmax(dim=1))  # (B, K)
    occurs = (labels[:, :, None] == classes).any(dim=1)
    if background is not None:
        occurs &= classes != background
    hits = (at_best == classes) & occurs
    sums = sum_over_ranks(torch.stack([hits.sum(), occurs.sum()]), group).tolist()
    return sums[0] / sums[1] if sums[1] else math.nan


def _problem_of_labels(
    name: str, labels: Tensor, num_classes: int, least: int | None = None
) -> str | None:
    if num_classes < 1:
        return f"num_classes ({num_classes}) must be at least 1"
    if labels.dtype != torch.int64:
        return f"{name} ({labels.dtype}) must be int64, a class for each token"
    if labels.numel() == 0:
        return None
    lowest, highest = (int(each) for each in labels.aminmax())
    if highest >= num_classes:
        return f"{name} has a class {highest}; they must be below num_classes ({num_classes})"
    if least is not None and lowest < least:
        return f"{name} has a class {lowest}; they must be at least {least}"
    return None
