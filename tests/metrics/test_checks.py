"""Unusable features are refused in one line that names them."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.metrics.checks import check_features, raise_together


def _check(rows, ids, unit_norm=True):
    check_features([("features", rows)], [("ids", ids)], unit_norm=unit_norm)


@pytest.mark.parametrize(
    ("rows", "ids", "text"),
    [
        (torch.ones(3), torch.arange(3), r"features must be a float \(rows, D\) matrix"),
        (torch.eye(3).long(), torch.arange(3), "features must be a float"),
        (torch.eye(3), torch.arange(2), r"ids must be int64 \(3,\)"),
        (torch.eye(3), torch.arange(3.0), "ids must be int64"),
        (torch.eye(3) * 1.5, torch.arange(3), r"features row 0 has norm 1\.5, must be 1"),
        (torch.zeros(1, 3), torch.arange(1), "features row 0 has norm 0"),
    ],
)
def test_problem_is_named(rows, ids, text):
    with pytest.raises(UserError, match=text):
        _check(rows, ids)


def test_norm_is_free_where_it_does_not_matter():
    _check(torch.eye(3) * 7, torch.arange(3), unit_norm=False)


def test_rounding_to_bfloat16_passes_as_normalised():
    rows = torch.nn.functional.normalize(torch.randn(64, 768), dim=1).bfloat16()
    _check(rows, torch.arange(64))


def test_two_widths_are_refused():
    with pytest.raises(UserError, match="embedding sizes of images, texts"):
        check_features(
            [("images", torch.eye(3)), ("texts", torch.eye(4))],
            [("a", torch.arange(3)), ("b", torch.arange(4))],
            unit_norm=True,
        )


def test_raise_together_keeps_non_ascii_text():
    with pytest.raises(UserError, match="größe"):
        raise_together("größe", device=torch.device("cpu"))
