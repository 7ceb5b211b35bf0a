"""Training of free embeddings: unit rows that are parameters themselves, without an encoder.

The rows are put back on the sphere after every step. As in the authors' code the loss usually sees
normalised rows, so that gradients are tangent to the sphere. Where a loss extends rows and
normalises what is extended (their adapter), it gets them as they are: gradients then keep a part
along the row, which the projection undoes but Adam's moments see.

``train_space`` is the setting of all experiments of Bangachev et al. 2025: N free pairs (or
k-tuples) in d dimensions, one scale and one relative bias, full batch, the loss divided by N^2.

``fit_margin`` and ``is_solvable`` have a query for each set of k of n documents; the two published
papers train them with different loss, temperature and steps.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_siglip.losses import (
    LogitScaleBias,
    ModalityGraph,
    multimodal_sigmoid_loss,
    relevance_sigmoid_loss,
    relevance_softmax_loss,
)
from dist_siglip.losses.logit_scale import BiasParameterization
from dist_siglip.losses.research.adapter import SimplexAdapter
from dist_siglip.losses.research.modalities import edges_of
from dist_siglip.metrics import (
    RelevanceMargins,
    collect_pair_statistics,
    joint_constellation,
    relevance_margins,
)

_RECORDS = 200  # points of the loss curve
_FIRST_RECORDS = (1, 2, 5, 10, 20)  # for logarithmic axes
AUTHORS_SEED = 50
# The seed of Weller et al.
CRITICAL_SEED = 42


class Training(NamedTuple):
    """Result of a training.

    Attributes:
        rows: unit rows after the last step, one (N, D) tensor for each matrix, without gradients.
        loss: that of the last step, before its update.
        steps: how many were made.
        recorded_steps: steps, counted from 1, at which the loss was recorded.
        recorded_losses: losses of these steps.
    """

    rows: list[Tensor]
    loss: float
    steps: int
    recorded_steps: list[int]
    recorded_losses: list[float]


def random_rows(
    num_rows: int, dimension: int, generator: torch.Generator, *, trainable: bool = True
) -> nn.Parameter:
    """Return rows that are uniform on the unit sphere, (num_rows, dimension), float32.

    Args:
        num_rows: how many.
        dimension: of the space.
        generator: a generator seeded with s draws what ``torch.manual_seed(s)`` would.
        trainable: whether training moves them; a locked encoder's do not move.

    Example:
        >>> rows = random_rows(4, 3, torch.Generator().manual_seed(0))
        >>> torch.allclose(rows.norm(dim=-1), torch.ones(4))
        True
    """
    rows = torch.randn(num_rows, dimension, generator=generator)
    return nn.Parameter(F.normalize(rows, dim=-1), requires_grad=trainable)


def train_free_embeddings(
    rows: Sequence[nn.Parameter],
    loss: Callable[[list[Tensor]], Tensor],
    scalars: Iterable[nn.Parameter] = (),
    *,
    steps: int,
    normalize: bool = True,
    learning_rate: float = 1e-2,
    schedule: Callable[[float], float] | None = None,
    watch: Callable[[int, float, list[Tensor]], bool] | None = None,
    watch_steps: int = 50,
    progress: Callable[[float], None] | None = None,
) -> Training:
    """Minimise a loss of unit rows and scalars with Adam, in one process.

    Give losses of this library ``nonfinite="propagate"``: looking for rows that are not finite
    would be a tenth of the time.

    Args:
        rows: (N, D) matrices; those that need no gradient are locked. Changed in place.
        loss: of the (unit) rows, in the order of ``rows``; full batch, in the reduction of the
            experiment (Adam's epsilon makes late steps depend on it).
        scalars: the other parameters, such as those of ``LogitScaleBias``; locked ones are left
            alone. Changed in place.
        steps: most steps to make, at least 1.
        normalize: whether the loss gets normalised rows; False leaves that to the loss.
        learning_rate: of rows and scalars, before the schedule.
        schedule: from the share of the steps that are done, 0 to below 1, to a factor of the
            learning rate; None keeps it constant. See ``warm_up_and_cosine``.
        watch: called every ``watch_steps`` steps and after the last one with the steps made, the
            last loss and the unit rows; True ends the training.
        watch_steps: see ``watch``.
        progress: called with the share of the steps that are done.

    Example:
        >>> pair = [random_rows(2, 2, torch.Generator().manual_seed(s)) for s in (0, 1)]
        >>> trained = train_free_embeddings(pair, lambda uv: (uv[0] - uv[1]).square().sum(),
        ...                                 steps=500)
        >>> torch.allclose(*trained.rows, atol=1e-4)
        True

    Source:
        Bangachev et al. 2025, arXiv:2509.18552, section 3.5 and the authors' code (Adam, learning
        rate 0.01 for rows and scalars, full batch).
    """
    trained = [parameter for parameter in (*rows, *scalars) if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    every = max(1, steps // _RECORDS)
    recorded_steps: list[int] = []
    recorded_losses: list[float] = []
    step, value = 0, torch.tensor(math.nan)
    for step in range(1, steps + 1):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = learning_rate * schedule((step - 1) / steps)
        optimizer.zero_grad()
        value = loss([F.normalize(matrix, dim=-1) if normalize else matrix for matrix in rows])
        value.backward()
        optimizer.step()
        with torch.no_grad():
            for matrix in rows:
                if matrix.requires_grad:
                    matrix.div_(matrix.norm(dim=-1, keepdim=True))
        if step % every == 0 or step in _FIRST_RECORDS or step == steps:
            recorded_steps.append(step)
            recorded_losses.append(value.item())
            if progress is not None:
                progress(step / steps)
        is_watched = watch is not None and (step % watch_steps == 0 or step == steps)
        if is_watched and watch is not None and watch(step, value.item(), _unit(rows)):
            break
    if progress is not None:
        progress(1.0)
    return Training(_unit(rows), value.item(), step, recorded_steps, recorded_losses)


def warm_up_and_cosine(
    warm_up_share: float = 0.05, *, start: float = 0.1, end: float = 0.01
) -> Callable[[float], float]:
    """Linear warm-up from ``start`` to 1, then half a cosine down to ``end``.

    Example:
        >>> factor = warm_up_and_cosine(0.05)
        >>> [round(factor(share), 3) for share in (0.0, 0.05, 0.525, 1.0)]
        [0.1, 1.0, 0.505, 0.01]
    """

    def factor(share_done: float) -> float:
        if share_done < warm_up_share:
            return start + (1 - start) * share_done / warm_up_share
        left = (share_done - warm_up_share) / (1 - warm_up_share)
        return end + (1 - end) * (1 + math.cos(math.pi * left)) / 2

    return factor


def _unit(rows: Sequence[nn.Parameter]) -> list[Tensor]:
    return [F.normalize(matrix.detach(), dim=-1) for matrix in rows]


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


SubsetLoss = Literal["sigmoid", "softmax"]


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
