"""Experiments on the sigmoid loss: a quick run of each leaves nothing to explain."""

import pytest
import torch

from dist_siglip.lab import LabSettings
from dist_siglip.lab.experiments import clamped_loss, function_of


def quick_rows(name):
    told = []
    outcome = function_of(name)(LabSettings(quick=True, progress=told.append))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert outcome.figure.axes
    assert [row for row in outcome.rows if not row.is_sound] == []
    return {row.quantity: row for row in outcome.rows}


def test_constructions_are_exact():
    rows = quick_rows("constructions")
    exact = [row for row in rows.values() if row.tolerance == 1e-6]
    assert len(exact) > 10
    assert all(row.verdict == "reproduced" for row in exact)
    assert rows["largest margin of 100 pairs against Table 1"].ours == pytest.approx(0.505)


def test_twenty_pairs_end_at_the_published_scale_and_a_plane_separates_them():
    rows = quick_rows("separator")
    name = "20 pairs, 3 dimensions, frozen 0"
    assert rows[f"{name}: scale"].ours == pytest.approx(950.98, abs=5)
    assert rows[f"{name}: images above, of 20"].ours == 20


def test_a_relative_bias_from_zero_ends_with_the_larger_margin():
    assert quick_rows("five_starts")["margin gained from start 0"].ours >= 0.06


def test_a_larger_frozen_bias_has_the_larger_margin():
    rows = quick_rows("frozen_bias")
    margins = [rows[f"margin at frozen relative bias {bias:+.3f}"].ours for bias in (-0.333, 0.333)]
    assert margins[0] < margins[1]


def test_a_locked_encoder_needs_a_bias_that_learns():
    rows = quick_rows("locked_encoder")
    assert rows["relative bias from 0: loss"].ours <= 1e-6
    assert rows["fixed scale 10, bias 0: loss"].ours > 0.5


def test_the_printed_gap_of_two_modalities_is_twice_the_margin():
    rows = quick_rows("modalities")
    assert rows["2 modalities: margin"].verdict.startswith("corrected: ")
    assert rows["2 modalities: full gap"].verdict == "reproduced"


def test_only_the_clamped_logarithm_fails_at_a_large_fixed_scale():
    rows = quick_rows("clamped_loss")
    name = "fixed scale 100, relative bias +0.0"
    assert rows[f"{name}: clamped loss"].ours > 0.1
    assert rows[f"{name}: exact loss"].ours <= 1e-6
    assert rows[f"{name}: margin with the clamped loss"].ours < 0
    assert rows[f"{name}: margin with the exact loss"].ours > 0.09


def test_the_clamped_logarithm_has_no_gradient_where_pairs_are_far_wrong():
    rows = [side.requires_grad_() for side in (torch.eye(100), -torch.eye(100))]
    loss = clamped_loss._clamped_loss(0.0)(rows)
    (gradient,) = torch.autograd.grad(loss, rows[:1])
    assert loss.item() > 0.1
    assert gradient.diagonal().abs().max() < 1e-12
