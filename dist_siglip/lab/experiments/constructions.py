"""Margin and loss of the constructions of the papers.

Nothing is trained: codes, Constructions 1 and 2, the adapter identity, the triplet loss and the
bound of Theorem 3.4 are exact, so the tolerance is rounding.

Source: Bangachev et al. 2025, arXiv:2509.18552, Theorems 3.1 to 3.5, Constructions 1 and 2,
Observations 1, 2 and 4.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_siglip.lab.experiment import (
    COLOURS,
    LabSettings,
    Outcome,
    Row,
    judge,
    judge_claim,
    label,
    new_figure,
)
from dist_siglip.lab.free_embeddings import margin_of
from dist_siglip.losses import multimodal_sigmoid_loss, siglip_loss
from dist_siglip.losses.research.adapter import SimplexAdapter
from dist_siglip.metrics import recall_at_k, retrieval_ranks_both_ways
from dist_siglip.metrics.capacity import capacity_alpha, largest_margin
from dist_siglip.metrics.constructions import (
    code_alpha,
    constellation_from_code,
    construction_one,
    construction_two,
    random_code,
    simplex_code,
)

_NUM_PAIRS, _DIMENSION, _EXACT = 100, 60, 1e-6
_MARGIN, _BIAS = 0.1, 0.05  # asked of a random code
_LARGEST_PRINTED = 0.611  # Table 1


def run(settings: LabSettings) -> Outcome:
    """Build everything; quick or not, it takes a second."""
    code = random_code(_NUM_PAIRS, _DIMENSION, seed=settings.seed)
    rows = [*_rows_of_constructions(code), *_rows_of_adapter(settings.seed)]
    images, texts = constellation_from_code(code, margin=_MARGIN, relative_bias=_BIAS)
    rows += [*_rows_of_triplets(images, texts), *_rows_of_retrieval(images, texts)]
    scales = [10.0 * 2**power for power in range(9)]
    slopes = _rates(images, texts, scales)
    rows.append(judge("-log(loss) / scale at scale 2560", _MARGIN, slopes[-1], 0.005))
    rows += _rows_of_bound()
    settings.progress(1.0)
    figure, (rate, bound) = new_figure(2)
    rate.semilogx(scales, slopes, "o-", color=COLOURS[0], label="-log(loss) / scale")
    rate.axhline(_MARGIN, linestyle="--", color=COLOURS[5], label="margin")
    label(rate, "the margin is the rate of the loss", "logit scale", "rate")
    grid = [number / 100 for number in range(-100, 101)]
    for pairs, line in ((2, ":"), (100, "-")):
        values = [largest_margin(bias, pairs) for bias in grid]
        bound.plot(grid, values, line, color=COLOURS[0], label=f"{pairs} pairs")
    label(bound, "largest margin (Theorem 3.4)", "relative bias", "margin (half gap)")
    return Outcome(
        tuple(rows),
        figure,
        (f"{_NUM_PAIRS} random points in {_DIMENSION} dimensions, and simplices; float64.",),
    )


def _rows_of_constructions(code: Tensor) -> list[Row]:
    alpha = code_alpha(code)
    rows = []
    margin, bias = margin_of([code, code])
    # A code has one of its pairs at alpha exactly.
    rows.append(judge("code: margin + relative bias", 1.0, margin + bias, _EXACT))
    rows.append(judge("code: margin is (1 - alpha) / 2", (1 - alpha) / 2, margin, _EXACT))
    delta, phi = 0.7, 0.4
    margin_one, bias_one = margin_of(construction_one(code, code, delta=delta, phi=phi))
    moved = delta**2 * bias + phi**2 - (1 - delta**2 - phi**2)
    rows += [
        judge("construction 1: margin", delta**2 * margin, margin_one, _EXACT),
        judge("construction 1: relative bias", moved, bias_one, _EXACT),
    ]
    asked = margin_of(constellation_from_code(code, margin=_MARGIN, relative_bias=_BIAS))
    rows += [
        judge("Theorem 3.3: margin asked of a code", _MARGIN, asked[0], _EXACT),
        judge("Theorem 3.3: relative bias asked of a code", _BIAS, asked[1], _EXACT),
    ]
    for k in (2, 4, 6):
        found, threshold = margin_of(construction_two(code, k, delta=delta))
        expected = delta**2 * bias - (1 - delta**2) / (k - 1)
        rows += [
            judge(f"construction 2, {k} modalities: margin", delta**2 * margin, found, _EXACT),
            judge(f"construction 2, {k} modalities: relative bias", expected, threshold, _EXACT),
        ]
    return rows


def _rows_of_adapter(seed: int) -> list[Row]:
    """The loss behind an adapter is that without it at another scale and relative bias."""
    rows = []
    for k in (2, 4):
        adapter = SimplexAdapter(k).double()
        sides = [random_code(_NUM_PAIRS, 10, seed=seed + number) for number in range(k)]
        scale, bias = 30.0, -0.2
        folded_scale, folded_bias = adapter.fold(scale, bias)
        with torch.no_grad():
            behind = multimodal_sigmoid_loss(adapter(sides), *_scalars(scale, bias))
            without = multimodal_sigmoid_loss(sides, *_scalars(folded_scale, folded_bias))
        error = abs(float(behind - without)) / float(without)
        rows.append(judge(f"adapter of {k} folded: relative change of loss", 0.0, error, _EXACT))
    return rows


def _rows_of_triplets(images: Tensor, texts: Tensor) -> list[Row]:
    """Zero triplet loss up to a triplet margin of four times the margin, and not beyond."""
    first, second = torch.triu_indices(len(images), len(images), 1)
    anchor, other = torch.cat([first, second]), torch.cat([second, first])

    def triplet_loss(triplet_margin: float) -> float:
        total = F.triplet_margin_with_distance_loss(
            images[anchor],
            texts[anchor],
            texts[other],
            distance_function=lambda x, y: (x - y).square().sum(dim=-1),
            margin=triplet_margin,
            reduction="sum",
        )
        return float(total)

    inside, beyond = triplet_loss(4 * _MARGIN), triplet_loss(4 * _MARGIN + 0.01)
    return [
        judge("triplet loss at 4 margins", 0.0, inside, _EXACT),
        judge_claim("triplet loss at 4 margins + 0.01", "above 0", beyond, beyond > _EXACT),
    ]


def _rows_of_retrieval(images: Tensor, texts: Tensor) -> list[Row]:
    ids = torch.arange(len(images))
    ranks = retrieval_ranks_both_ways(images, texts, ids, ids)
    return [
        judge(f"recall@1, {name}", 1.0, recall_at_k(found, 1), 0.0)
        for name, found in zip(("image to text", "text to image"), ranks, strict=True)
    ]


def _rates(images: Tensor, texts: Tensor, scales: list[float]) -> list[float]:
    """-log(loss) / scale at the best relative bias: the margin, in the limit."""
    losses = [float(siglip_loss(images, texts, *_scalars(scale, _BIAS))) for scale in scales]
    return [-math.log(loss) / scale for loss, scale in zip(losses, scales, strict=True)]


def _rows_of_bound() -> list[Row]:
    margin, bias = margin_of([simplex_code(100), simplex_code(100)])
    limit = max(largest_margin(number / 1000, 100) for number in range(-1000, 1001))
    return [
        judge(
            "Theorem 3.4, 100 pairs: a simplex reaches", largest_margin(bias, 100), margin, _EXACT
        ),
        judge("Theorem 3.4: alpha of m = 0.1, b = 0", 7 / 11, capacity_alpha(0.1, 0.0), _EXACT),
        judge(
            "largest margin of 100 pairs against Table 1",
            _LARGEST_PRINTED,
            limit,
            0.01,
            correction="no configuration of 100 pairs has a larger margin than this; the table "
            "prints the full gap",
        ),
    ]


def _scalars(scale: float, relative_bias: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(scale).double(), torch.tensor(-scale * relative_bias).double()
