"""Large fixed scales, with the exact loss and with the clamped logarithm of the published code.

The authors' code computes -log(sigmoid(z) + 1e-8) in float32. Where sigmoid(z) is far below 1e-8
that is a constant: pairs that are very wrong have no gradient and stay wrong. The loss of this
library is exact. 100 pairs, 10 dimensions, 10 000 steps, frozen relative bias.

Source: Bangachev et al. 2025, arXiv:2509.18552, section 3.5 and the authors' ablation notebook,
whose numbers these are; Table 3 for large scales at the start.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.lab.experiment import (
    LabSettings,
    Outcome,
    Row,
    draw_loss,
    judge,
    judge_claim,
    label,
    new_figure,
)
from dist_siglip.lab.free_embeddings import (
    AUTHORS_SEED,
    Space,
    Start,
    Training,
    margin_of,
    random_rows,
    train_free_embeddings,
    train_space,
)

_SCALE, _NUM_PAIRS, _DIMENSION, _STEPS = 100.0, 100, 10, 10_000
# Frozen relative bias -> published loss at fixed scale 100; loss and scale when it learns from 10.
_PUBLISHED = {
    0.0: (0.1621, 0.0, 74.6),
    -1.0: (18.2241, 0.6931, 6.49),
    -0.5: (0.1695, 0.0, 124.3),
    0.5: (0.1161, 0.0, 64.9),
    1.0: (0.1771, 0.0069, 26.7),
}
# Scale and relative bias at the start, both learn; Table 3 prints negative margins for all.
_LARGE_STARTS = ((30.0, 0.2), (30.0, 1.0), (100.0, -0.6), (100.0, 0.2), (100.0, 1.0))
_NO_GRADIENT = (
    "the clamped logarithm has no gradient where pairs are far wrong; the exact one trains on"
)


class _Clamped(NamedTuple):
    training: Training
    margin: float


def run(settings: LabSettings) -> Outcome:
    """Train with the clamped and the exact loss; when quick, at relative bias 0 only."""
    biases = (0.0,) if settings.quick else tuple(_PUBLISHED)
    starts = () if settings.quick else _LARGE_STARTS
    num_runs = len(biases) * (2 if settings.quick else 3) + len(starts)
    parts = iter([settings.part(number, num_runs) for number in range(num_runs)])
    clamped = {bias: _train_clamped(bias, next(parts)) for bias in biases}
    exact = {bias: _train_exact(_SCALE, bias, next(parts)) for bias in biases}
    rows = [row for bias in biases for row in _rows(bias, clamped[bias], exact[bias])]
    if not settings.quick:
        learned = {bias: _train_exact(10.0, bias, next(parts), learns=True) for bias in biases}
        rows += [row for bias in biases for row in _rows_of_learned(bias, learned[bias])]
        gain = learned[0.0].margin - exact[0.0].margin
        rows.append(
            judge_claim(
                "relative bias 0: margin gained by learning the scale", "above 0", gain, gain > 0
            )
        )
    rows += [_row_of_start(*start, next(parts), settings.seed) for start in starts]
    figure, (panel,) = new_figure(1, panel_width=5.5, height=3.6)
    curves = {"clamped, relative bias 0": clamped[0.0].training, "exact": exact[0.0].training}
    for number, (name, training) in enumerate(curves.items()):
        draw_loss(panel, number, training, name)
    panel.set_ylim(bottom=1e-8)
    label(panel, "fixed scale 100", "step", "loss, mean over pairs")
    return Outcome(tuple(rows), figure, _NOTES)


_NOTES = (
    "What survives of the published claim: a scale that learns ends with a larger margin than a "
    "large fixed one. What does not: that a large fixed scale, or a large one at the start, fails.",
    "At relative bias -1 no configuration has zero loss, with either logarithm.",
)


def _rows(bias: float, clamped: _Clamped, exact: Space) -> list[Row]:
    name = f"fixed scale 100, relative bias {bias:+.1f}"
    published = _PUBLISHED[bias][0]
    return [
        judge(f"{name}: clamped loss", published, clamped.training.loss, 0.01),
        judge(f"{name}: exact loss", published, exact.loss, 0.01, correction=_NO_GRADIENT),
        judge(f"{name}: margin with the clamped loss", None, clamped.margin),
        judge(f"{name}: margin with the exact loss", None, exact.margin),
    ]


def _rows_of_learned(bias: float, space: Space) -> list[Row]:
    _, loss, scale = _PUBLISHED[bias]
    name = f"learned scale, relative bias {bias:+.1f}"
    return [
        judge(f"{name}: loss", loss, space.loss, 1e-3),
        judge(f"{name}: scale", scale, space.scale, round(0.03 * scale, 2)),
        judge(f"{name}: margin", None, space.margin),
    ]


def _row_of_start(scale: float, bias: float, settings: LabSettings, seed: int) -> Row:
    start = Start(scale=scale, relative_bias=bias, seed=seed)
    space = train_space(start, settings.progress)
    return judge_claim(
        f"both learn, from scale {scale:.0f}, relative bias {bias:+.1f}: margin",
        "negative",
        space.margin,
        space.margin < 0,
        correction=_NO_GRADIENT,
    )


def _train_exact(
    scale: float, bias: float, settings: LabSettings, *, learns: bool = False
) -> Space:
    start = Start(
        scale=scale,
        relative_bias=bias,
        train_scale=learns,
        train_bias=False,
        seed=settings.seed,
        num_pairs=_NUM_PAIRS,
        dimension=_DIMENSION,
        steps=_STEPS,
    )
    return train_space(start, settings.progress)


def _train_clamped(bias: float, settings: LabSettings) -> _Clamped:
    generator = torch.Generator().manual_seed(AUTHORS_SEED + settings.seed)
    rows = [random_rows(_NUM_PAIRS, _DIMENSION, generator) for _ in range(2)]
    training = train_free_embeddings(
        rows, _clamped_loss(bias), steps=_STEPS, progress=settings.progress
    )
    return _Clamped(training, margin_of(training.rows)[0])


def _clamped_loss(bias: float) -> Callable[[list[Tensor]], Tensor]:
    """The published formula, unchanged."""
    is_positive = torch.eye(_NUM_PAIRS, dtype=torch.bool)

    def loss(rows: list[Tensor]) -> Tensor:
        probability = torch.sigmoid(_SCALE * (rows[0] @ rows[1].T - bias))
        right = torch.where(is_positive, probability, 1 - probability)
        return -(right + 1e-8).log().mean()

    return loss
