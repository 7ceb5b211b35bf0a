"""Rectangles cover the matrix once, and products do not depend on them."""

import pytest
import torch

from dist_siglip.metrics.tiles import exact_similarity, tile_slices


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0), (1, 1), (5, 7), (6, 6)])
@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 10])
def test_every_cell_is_covered_once(rows, columns, chunk_rows):
    seen = torch.zeros(rows, columns)
    for row_slice, column_slice in tile_slices(rows, columns, chunk_rows):
        tile = seen[row_slice, column_slice]
        assert 0 < tile.shape[0] <= chunk_rows
        assert 0 < tile.shape[1] <= chunk_rows
        tile += 1
    assert torch.equal(seen, torch.ones(rows, columns))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_similarity_is_wide_even_under_autocast(dtype):
    rows = torch.randn(4, 33).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = exact_similarity(rows, rows)
    assert result.dtype == torch.float64
    assert torch.equal(result, rows.double() @ rows.double().T)
