"""Unusable features are refused in one line that names them."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import collect_pair_statistics, modality_gap
from dist_siglip.metrics.rows import check_features, raise_together, widen_rows


def _check(rows, ids, unit_norm=True):
    check_features([("features", rows)], [("ids", ids)], unit_norm=unit_norm)


def _statistics(images, texts):
    ids = (torch.arange(len(side)) for side in (images, texts))
    return collect_pair_statistics(images, texts, *ids, logit_scale=1.0, logit_bias=0.0)


@pytest.mark.parametrize(
    ("rows", "ids", "text"),
    [
        (torch.ones(3), torch.arange(3), r"features must be a float \(rows, D\) matrix"),
        (torch.eye(3).long(), torch.arange(3), "features must be a float"),
        (torch.eye(3).to(torch.complex64), torch.arange(3), "features must be a float"),
        (torch.zeros(3, 0), torch.arange(3), "with D of at least 1"),
        (
            torch.eye(3).numpy(),
            torch.arange(3),
            r"features \(numpy.ndarray\) must be a torch.Tensor",
        ),
        ([[1.0, 0.0]], torch.arange(1), r"features \(list\) must be a torch.Tensor"),
        (torch.eye(3), torch.arange(3).numpy(), r"ids \(numpy.ndarray\) must be a torch.Tensor"),
        (torch.eye(3), torch.arange(2), r"ids \(2,\) must be \(3,\), one per row of features"),
        (torch.eye(3), torch.arange(3.0), r"ids \(torch.float32\) must be int64"),
        (torch.eye(3) * 1.5, torch.arange(3), r"features row 0 has norm 1\.5, must be 1"),
        (torch.zeros(1, 3), torch.arange(1), "features row 0 has norm 0"),
    ],
)
def test_problem_is_named(rows, ids, text):
    with pytest.raises(UserError, match=text):
        _check(rows, ids)


def test_norm_is_free_where_it_does_not_matter():
    _check(torch.eye(3) * 7, torch.arange(3), unit_norm=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 7, 768])
def test_what_a_dtype_makes_of_a_unit_vector_passes_and_more_does_not(dtype, width):
    rows = F.normalize(torch.randn(256, width).to(dtype), dim=1)
    _check(rows, torch.arange(256))
    assert not (rows.double().norm(dim=1) - 1).abs().gt(0.006).any()
    with pytest.raises(UserError, match=r"row 0 has norm 1\.0[12]"):
        _check(1.019 * rows, torch.arange(256))
    # float16 files are often read as float32; bfloat16 never has its norm by chance.
    if dtype == torch.float16:
        _check(rows.float(), torch.arange(256))


def test_half_precision_is_normalised_again_when_widened_and_nothing_else_is():
    rows = F.normalize(torch.randn(64, 5), dim=1).bfloat16()
    rows[0] *= 3
    wide = widen_rows(rows)
    assert torch.equal(wide[0], rows[0].float())
    assert torch.allclose(wide[1:].norm(dim=1), torch.ones(63), atol=1e-6)
    exact = torch.randn(4, 5)
    assert widen_rows(exact) is exact


@pytest.mark.parametrize("measure", [modality_gap, _statistics])
def test_sides_of_unequal_length_are_told_so(measure):
    with pytest.raises(UserError, match=r"image_features \(3 rows\) and text_features \(2 rows\)"):
        measure(torch.eye(3), torch.eye(3)[:2])


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
