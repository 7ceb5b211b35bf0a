"""Metrics of spaces whose values follow on paper.

Equal modalities, two opposite points, orthogonal rows, independent rows in a high dimension, a
regular simplex, rotations. Cases without chance are exact; random ones are compared with their
limit.

Source: the definitions of Liang et al. 2022 (arXiv:2203.02053), Schrodi et al. 2025
(arXiv:2404.07983), Wang and Isola 2020 (arXiv:2005.10242), Fahim et al. 2024 (arXiv:2405.18570),
Huh et al. 2024 (arXiv:2405.07987) and Bangachev et al. 2025, 2026 (arXiv:2509.18552, 2605.23556).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_siglip.lab.experiment import COLOURS, LabSettings, Outcome, judge, label, new_figure
from dist_siglip.lab.free_embeddings import subset_relevance
from dist_siglip.metrics import (
    PairStatistics,
    collect_pair_statistics,
    constellation,
    linear_separability,
    modality_gap,
    recall_at_k,
    relevance_margins,
    retrieval_ranks,
    simplex_code,
    subset_code,
    subset_margin,
    uniformity,
)
from dist_siglip.metrics.alignment import measure_alignment
from dist_siglip.metrics.geometry.spread import effective_rank

_ROWS, _WIDTH, _NEIGHBOURS = 1000, 256, 10
_EXACT = 1e-6


class _Case(NamedTuple):
    quantity: str
    on_paper: float
    ours: Callable[[], float]
    tolerance: float = _EXACT


def run(settings: LabSettings) -> Outcome:
    """Compute all of them; when quick, without random rows."""
    cases = _exact_cases()
    if not settings.quick:
        cases += _limits(torch.Generator().manual_seed(settings.seed))
    rows = []
    for number, case in enumerate(cases):
        rows.append(judge(case.quantity, case.on_paper, case.ours(), case.tolerance))
        settings.progress((number + 1) / len(cases))
    figure, (axes,) = new_figure(1, panel_width=7.0, height=0.22 * len(rows) + 0.9)
    errors = [max(abs(row.ours - float(row.published or 0.0)), 1e-17) for row in rows]
    places = range(len(rows))
    axes.scatter(errors, places, marker="o", s=18, color=COLOURS[0], label="distance")
    allowed = [case.tolerance for case in cases]
    axes.scatter(allowed, places, marker="|", s=70, color=COLOURS[1], label="tolerance")
    axes.set_xscale("log")
    axes.set_yticks(places, [row.quantity for row in rows])
    axes.invert_yaxis()
    label(axes, "distance from the value on paper (none is drawn at 1e-17)", "", "")
    return Outcome(
        tuple(rows),
        figure,
        (
            "Exact cases are within rounding of float64 or float32. Random clouds have "
            f"{_ROWS} rows in {_WIDTH} dimensions; their tolerance is a few standard errors.",
        ),
    )


def _exact_cases() -> list[_Case]:
    basis = torch.eye(8, dtype=torch.float64)
    images = basis[:1].expand(8, -1)
    opposite = modality_gap(images, -images)
    same = modality_gap(basis, basis)
    margins = constellation(_statistics(basis, basis))
    corners = simplex_code(6)
    simplex = constellation(_statistics(corners, corners))
    queries, documents = subset_code(6, 2)
    subsets = relevance_margins(queries, documents, subset_relevance(6, 2))
    turned = basis.roll(1, dims=0)
    return [
        _Case("equal clouds: centroid distance", 0, lambda: same.centroid_distance),
        _Case("equal clouds: relative modality gap", 0, lambda: same.relative_modality_gap),
        _Case("equal clouds: alignment", 0, lambda: same.alignment),
        _Case("opposite points: centroid distance", 2, lambda: opposite.centroid_distance),
        _Case("opposite points: relative modality gap", 1, lambda: opposite.relative_modality_gap),
        _Case("opposite points: alignment", 4, lambda: opposite.alignment),
        _Case("opposite points: linear separability", 1, lambda: _separability(images, -images)),
        _Case("orthogonal rows: uniformity", -4, lambda: uniformity(basis)),
        _Case("orthogonal rows: effective rank", 8, lambda: effective_rank(basis)),
        _Case("one point: effective rank", 1, lambda: effective_rank(images)),
        _Case("orthogonal pairs: margin", 0.5, lambda: margins.margin),
        _Case("orthogonal pairs: relative bias", 0.5, lambda: margins.relative_bias),
        _Case("simplex of 6: margin", 0.6, lambda: simplex.margin),
        _Case("simplex of 6: relative bias", 0.4, lambda: simplex.relative_bias),
        _Case("2 of 6 documents: margin", subset_margin(6, 2), lambda: subsets.margin),
        _Case("2 of 6 documents: threshold", 0, lambda: subsets.relative_bias),
        _Case("shifted pairs: recall@1", 0, lambda: _recall(basis, turned)),
        _Case("equal pairs: recall@1", 1, lambda: _recall(basis, basis)),
    ]


def _limits(generator: torch.Generator) -> list[_Case]:
    """Random rows, with the limit for many rows or a high dimension."""
    one, other = (
        F.normalize(torch.randn(_ROWS, _WIDTH, generator=generator), dim=1) for _ in range(2)
    )
    square = torch.randn(_WIDTH, _WIDTH, generator=generator)
    rotation = torch.linalg.qr(square).Q
    gap = modality_gap(one, other)
    rotated = measure_alignment(one, one @ rotation, k=_NEIGHBOURS)
    independent = measure_alignment(one, other, k=_NEIGHBOURS)
    by_chance = _NEIGHBOURS / (_ROWS - 1)
    return [
        _Case(
            "independent clouds: relative modality gap",
            0.5,
            lambda: gap.relative_modality_gap,
            0.01,
        ),
        _Case(
            "independent clouds: linear separability", 0.5, lambda: _separability(one, other), 0.07
        ),
        _Case("uniform cloud: uniformity", -4, lambda: uniformity(one), 0.05),
        _Case("rotated cloud: mutual k-NN", 1, lambda: rotated.mutual_knn, 0.001),
        _Case("rotated cloud: CKA", 1, lambda: rotated.cka, 1e-5),
        _Case("rotated cloud: unbiased CKA", 1, lambda: rotated.unbiased_cka, 1e-5),
        _Case("independent clouds: mutual k-NN", by_chance, lambda: independent.mutual_knn, 0.004),
        _Case("independent clouds: unbiased CKA", 0, lambda: independent.unbiased_cka, 0.02),
    ]


def _statistics(images: Tensor, texts: Tensor) -> PairStatistics:
    ids = torch.arange(len(images))
    return collect_pair_statistics(images, texts, ids, ids, logit_scale=1.0, logit_bias=0.0)


def _separability(images: Tensor, texts: Tensor) -> float:
    return linear_separability(images, texts, torch.arange(len(images)))


def _recall(images: Tensor, texts: Tensor) -> float:
    ids = torch.arange(len(images))
    return recall_at_k(retrieval_ranks(images, texts, ids, ids), 1)
