"""What patch tokens know of places: votes of labelled patches, a linear map, pointing, and texts.

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
    problem = problem_of_ridge(ridge) or _problem_of_labels("labels", labels, num_classes)
    raise_together(problem, device=tokens.device, group=group)
    check_features([("tokens", tokens)], [("labels", labels)], unit_norm=False, group=group)
    sums = label_map_sums(tokens, labels, num_classes)
    return solve_label_map(sum_over_ranks(sums, group), ridge)


def problem_of_ridge(ridge: float) -> str | None:
    """Say what is wrong with the weight of squared entries; None if nothing is."""
    return None if 0 < ridge < math.inf else f"ridge ({ridge}) must be above 0; try 0.01"


def label_map_sums(tokens: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sums over some tokens that ``linear_label_map`` is made of: [X 1]^T [X 1  Y].

    Returns:
        (C + 1, C + 1 + K) float64; those of several parts may be added.
    """
    width = tokens.shape[1] + 1
    sums = tokens.new_zeros((width, width + num_classes), dtype=torch.float64)
    for part in row_slices(len(tokens)):
        counts = labels[part] >= 0
        rows = F.pad(tokens[part][counts].double(), (0, 1), value=1.0)
        classes = F.one_hot(labels[part][counts], num_classes).double()
        sums.addmm_(rows.T, torch.cat([rows, classes], dim=1))
    return sums


def solve_label_map(sums: Tensor, ridge: float) -> Tensor:
    """Solve for the map of ``linear_label_map``, from ``label_map_sums`` over all tokens."""
    width = len(sums)
    squares = sums[:, :width].clone()
    squares.diagonal().add_(ridge)
    return torch.linalg.solve(squares, sums[:, width:])


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
    return segmentation_of(
        sum_over_ranks(confusion_counts(predicted, labels, num_classes), group), background
    )


def confusion_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count some tokens, as ``segmentation`` takes them, by label and told class: (K, K) int64."""
    counts = labels >= 0
    pairs = labels[counts] * num_classes + predicted[counts]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def segmentation_of(confusion: Tensor, background: int | None) -> Segmentation:
    """Make the shares of ``segmentation`` of the ``confusion_counts`` of all tokens."""
    table = confusion.cpu().double()
    num_classes = len(table)
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
    problem = _problem_of_scores(scores, labels)
    raise_together(problem, device=labels.device, group=group)
    return share_of(sum_over_ranks(pointing_counts(scores, labels, background), group))


def share_of(counts: Tensor) -> float:
    """Divide the first of two counts by the second; NaN if that is 0."""
    first, second = counts.tolist()
    return first / second if second else math.nan


def pointing_counts(scores: Tensor, labels: Tensor, background: int | None) -> Tensor:
    """Count hits and objects of some pictures, as ``pointing_accuracy`` takes them: (2,) int64."""
    classes = torch.arange(scores.shape[2], device=labels.device)
    at_best = labels.gather(1, scores.argmax(dim=1))  # (B, K)
    occurs = (labels[:, :, None] == classes).any(dim=1)
    if background is not None:
        occurs &= classes != background
    hits = (at_best == classes) & occurs
    return torch.stack([hits.sum(), occurs.sum()])


class PatchTextRetrieval(NamedTuple):
    """How well texts of classes and patches find each other, over the pictures of all ranks.

    Attributes:
        recall_at_1: share of tokens of an object whose text has a higher score than that of any
            other object has; NaN without such tokens.
        mean_average_precision: mean, over the objects of all pictures, of the average precision of
            the labelled tokens of the picture, sorted by their scores for the object; NaN without
            objects.
    """

    recall_at_1: float
    mean_average_precision: float


@torch.no_grad()
def patch_text_retrieval(
    scores: Tensor,
    labels: Tensor,
    *,
    background: int | None = None,
    group: ProcessGroup | None = None,
) -> PatchTextRetrieval:
    """Let tokens look for the text of their class, and texts for the tokens in a picture.

    An object is a class that occurs in a picture. With the n tokens of it that are the object,

        AP = 1/n sum_{i of the object} |{j of the object: s_j >= s_i}| / |{j: s_j >= s_i}|

    where j runs over the labelled tokens of the picture. Ties count against the query.

    Distributed contract: every rank passes its own pictures, any number of them (0 too); one
    all-reduce of four numbers. Every rank gets the same result.

    Args:
        scores: (B, T, K) of each token and the text of each class, finite.
        labels: (B, T) int64, below K; tokens below 0 are left out.
        background: class that is no object, whose text is not asked; None for none.
        group: process group.

    Raises:
        UserError: if classes are out of range or shapes differ; on every rank.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.2], [0.3, 0.4], [0.5, 0.1]]])
        >>> found = patch_text_retrieval(scores, torch.tensor([[0, 0, 1]]))
        >>> round(found.recall_at_1, 4), round(found.mean_average_precision, 4)
        (0.3333, 0.5833)
    """
    problem = _problem_of_scores(scores, labels)
    raise_together(problem, device=labels.device, group=group)
    return patch_text_shares(sum_over_ranks(patch_text_sums(scores, labels, background), group))


def patch_text_sums(scores: Tensor, labels: Tensor, background: int | None) -> Tensor:
    """Sums over some pictures, as ``patch_text_retrieval`` takes them: (4,) float64.

    Returns:
        Tokens that find their text, tokens, average precisions, objects.
    """
    classes = torch.arange(scores.shape[2], device=labels.device)
    is_object = classes != (-1 if background is None else background)
    counts = (labels >= 0) & is_object[labels.clamp_min(0)]
    own = labels[counts][:, None]
    among = scores[counts].masked_fill(~is_object, -math.inf)
    others = among.scatter(1, own, -math.inf).amax(dim=1)
    found = among.gather(1, own)[:, 0] > others
    occurs = (labels[:, :, None] == classes).any(dim=1) & is_object
    pictures, asked = occurs.nonzero(as_tuple=True)
    ranked = scores.transpose(1, 2)[pictures, asked].masked_fill(labels[pictures] < 0, -math.inf)
    is_right = labels[pictures] == asked[:, None]
    at_least = _count_at_least(ranked, ranked)
    right_at_least = _count_at_least(ranked.masked_fill(~is_right, -math.inf), ranked)
    precisions = (right_at_least.double() / at_least).where(is_right, 0.0)
    precision = precisions.sum(dim=1) / is_right.sum(dim=1)
    sums = (found.sum(), counts.sum(), precision.sum(), occurs.sum())
    return torch.stack([each.double() for each in sums])


def patch_text_shares(sums: Tensor) -> PatchTextRetrieval:
    """Make the shares of ``patch_text_retrieval`` of the ``patch_text_sums`` of all pictures."""
    return PatchTextRetrieval(share_of(sums[:2]), share_of(sums[2:]))


def _count_at_least(values: Tensor, bounds: Tensor) -> Tensor:
    """How many values of each row are at least as large as each bound of the row."""
    ordered = values.sort(dim=1).values
    return values.shape[1] - torch.searchsorted(ordered, bounds.contiguous())


def patch_labels(masks: Tensor, patch_size: tuple[int, int], num_classes: int) -> Tensor:
    """Label each patch with the class that most of its pixels have.

    Pixels below 0, of no class, vote like a class: a patch most of whose pixels have none has none.
    Of equally many the lowest class wins, and no class last of all. Rows and columns of pixels that
    do not fill a patch are left out, as a tower leaves them.

    Args:
        masks: (B, H, W) integers below ``num_classes``.
        patch_size: (height, width) in pixels.
        num_classes: K.

    Returns:
        (B, T) int64, the patches of a picture row by row; -1 for no class.

    Example:
        >>> mask = torch.tensor([[[0, 1, -1, -1], [1, 1, -1, 2]]])
        >>> patch_labels(mask, (2, 2), 3)
        tensor([[ 1, -1]])
    """
    height, width = patch_size
    count, rows, columns = len(masks), masks.shape[1] // height, masks.shape[2] // width
    cut = masks[:, : rows * height, : columns * width].long()
    blocks = cut.reshape(count, rows, height, columns, width).transpose(2, 3).flatten(3)
    blocks = blocks.flatten(1, 2)
    blocks = blocks.where(blocks >= 0, num_classes)
    votes = blocks.new_zeros(count, rows * columns, num_classes + 1)
    votes.scatter_add_(2, blocks, torch.ones_like(blocks))
    # No two are equal then, whichever of equal ones argmax would take.
    votes.mul_(num_classes + 1).sub_(torch.arange(num_classes + 1, device=masks.device))
    labels = votes.argmax(dim=2)
    return labels.where(labels < num_classes, -1)


def _problem_of_scores(scores: Tensor, labels: Tensor) -> str | None:
    problem = _problem_of_labels("labels", labels, scores.shape[-1])
    if problem is None and (scores.ndim != 3 or scores.shape[:2] != labels.shape):
        problem = (
            f"scores {tuple(scores.shape)} must be (B, T, K), one row for each of labels "
            f"{tuple(labels.shape)}"
        )
    return problem


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
