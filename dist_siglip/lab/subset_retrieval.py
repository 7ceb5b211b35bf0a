"""Free embeddings trained to answer every query for k of n documents.

There is one query for each set of k documents. Queries and documents are free rows on the sphere;
how the two published papers train them differs in loss, temperature and steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dist_siglip.lab.free_embeddings import (
    Training,
    random_rows,
    train_free_embeddings,
    warm_up_and_cosine,
)
from dist_siglip.losses import relevance_sigmoid_loss, relevance_softmax_loss
from dist_siglip.metrics import RelevanceMargins, relevance_margins

SubsetLoss = Literal["sigmoid", "softmax"]
# The seed of Weller et al.
CRITICAL_SEED = 42


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A set of queries and the space they must fit into.

    Args:
        num_documents: n.
        answers: k, documents that answer a query.
        dimension: d.
        seed: of the random start.
    """

    num_documents: int
    answers: int = 2
    dimension: int
    seed: int = 0


class Fitted(NamedTuple):
    """Result of a training."""

    margins: RelevanceMargins
    training: Training


def subset_relevance(num_documents: int, answers: int) -> Tensor:
    """Return a query for every set of ``answers`` documents, (binomial(n, k), n), bool.

    Example:
        >>> subset_relevance(3, 2).int()
        tensor([[1, 1, 0],
                [1, 0, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    sets = torch.tensor(list(combinations(range(num_documents), answers)))
    relevance = torch.zeros(len(sets), num_documents, dtype=torch.bool)
    return relevance.scatter_(1, sets, True)


def fit_margin(
    case: Retrieval,
    loss: SubsetLoss,
    *,
    steps: int = 100_000,
    progress: Callable[[float], None] | None = None,
) -> Fitted:
    """Train for the largest margin.

    "sigmoid": the sum over all pairs, threshold frozen at 0, scale from 1. "softmax": the mean over
    relevant pairs, temperature from 0.1. Scale and temperature are plain numbers that learn; Adam
    at 0.01 with 5 % warm-up and a cosine to 1 %.

    Source:
        Bangachev et al. 2026, arXiv:2605.23556, code BangachevKiril/TopK.
    """
    relevance = subset_relevance(case.num_documents, case.answers)
    rows = _start(case, relevance)
    number = nn.Parameter(torch.tensor(1.0 if loss == "sigmoid" else 0.1))
    threshold = torch.tensor(0.0)

    def sigmoid(unit_rows: list[Tensor]) -> Tensor:
        queries, documents = unit_rows
        value = relevance_sigmoid_loss(
            queries, documents, relevance, number, threshold, nonfinite="propagate"
        )
        return value * len(relevance)  # the sum over queries

    def softmax(unit_rows: list[Tensor]) -> Tensor:
        queries, documents = unit_rows
        scale = 1 / number.clamp(1e-4, 1e2)
        return relevance_softmax_loss(queries, documents, relevance, scale, nonfinite="propagate")

    training = train_free_embeddings(
        rows,
        sigmoid if loss == "sigmoid" else softmax,
        [number],
        steps=steps,
        schedule=warm_up_and_cosine(),
        progress=progress,
    )
    queries, documents = training.rows
    return Fitted(relevance_margins(queries, documents, relevance), training)


def is_solvable(case: Retrieval, *, temperature: float = 0.1, steps: int = 100_000) -> bool:
    """Whether training finds rows that rank the k answers of every query first.

    Softmax over documents at a fixed temperature, Adam at 0.01; it ends when all is ranked right,
    looked at every 50 steps, or when the loss has not fallen by 1e-5 for 1000 steps.

    Source:
        Weller et al. 2025, arXiv:2508.21038, code google-deepmind/limit (free embeddings).
    """
    relevance = subset_relevance(case.num_documents, case.answers)
    scale = torch.tensor(1 / temperature)
    is_solved, best, waited = False, float("inf"), 0

    def watch(step: int, value: float, unit_rows: list[Tensor]) -> bool:
        nonlocal is_solved, best, waited
        is_solved = _ranks_answers_first(unit_rows, relevance)
        waited = 0 if value < best - 1e-5 else waited + 50
        best = min(best, value)
        return is_solved or waited >= 1000

    train_free_embeddings(
        _start(case, relevance),
        lambda rows: relevance_softmax_loss(
            rows[0], rows[1], relevance, scale, nonfinite="propagate"
        ),
        steps=steps,
        watch=watch,
        watch_steps=50,
    )
    return is_solved


def critical_documents_found(
    dimension: int, *, seed: int = CRITICAL_SEED, progress: Callable[[float], None] | None = None
) -> int:
    """Return the most documents for which training solves every query for two of them.

    Doubles until training fails, halves the interval, then tries the four sizes below and the
    five above, because a random start may fail by bad luck.
    """
    tried: dict[int, bool] = {}

    def solves(num_documents: int) -> bool:
        if num_documents not in tried:
            case = Retrieval(num_documents=num_documents, dimension=dimension, seed=seed)
            tried[num_documents] = is_solvable(case)
            if progress is not None:
                progress(len(tried) / (len(tried) + 6))
        return tried[num_documents]

    low, high = dimension + 1, 2 * (dimension + 1)
    while solves(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if solves(middle) else (low, middle)
    around = range(max(3, low - 4), low + 6)
    found = max((size for size in around if solves(size)), default=0)
    if progress is not None:
        progress(1.0)
    return found


def _ranks_answers_first(unit_rows: list[Tensor], relevance: Tensor) -> bool:
    """Whether the worst answer of every query lies above its best other document."""
    queries, documents = unit_rows
    cosines = queries @ documents.T
    worst_answer = cosines.masked_fill(~relevance, torch.inf).amin(dim=1)
    best_other = cosines.masked_fill(relevance, -torch.inf).amax(dim=1)
    return bool((worst_answer > best_other).all())


def _start(case: Retrieval, relevance: Tensor) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(case.seed)
    return [
        random_rows(len(relevance), case.dimension, generator),
        random_rows(case.num_documents, case.dimension, generator),
    ]
