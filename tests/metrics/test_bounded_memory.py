"""However many rows there are, no metric makes a tensor as large as the features."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_siglip.metrics import collect_moments, evaluate_pairs, modality_gap, uniformity

COUNT, WIDTH = 1500, 128
FEATURE_BYTES = COUNT * WIDTH * 2  # float16, as they lie in the file


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes; views count as what they show."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for made in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(made, torch.Tensor):
                    self.largest = max(self.largest, made.nbytes)
        return result


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """Files mapped into memory."""
    monkeypatch.setattr("dist_siglip.metrics.tiles._SUMMED_ROWS", 128)
    generator = np.random.default_rng(0)
    features = []
    for name in ("images", "texts"):
        rows = generator.normal(size=(COUNT, WIDTH))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.save(tmp_path / f"{name}.npy", rows.astype(np.float16))
        features.append(torch.from_numpy(np.load(tmp_path / f"{name}.npy", mmap_mode="c")))
    return features


def _largest(call, *args, **settings):
    with LargestTensor() as seen:
        call(*args, **settings)
    return seen.largest


def test_an_evaluation_stays_below_one_copy_of_the_features(pairs):
    ids = torch.arange(COUNT)
    largest = _largest(
        evaluate_pairs,
        *pairs,
        *(ids, ids, ids),
        logit_scale=10.0,
        logit_bias=-5.0,
        array_pairs=10,
        separability_pairs=50,
        chunk_rows=128,
    )
    # Two histograms of 20000 bins, whatever the rows.
    assert largest <= 320_000 < FEATURE_BYTES


@pytest.mark.parametrize("measure", [modality_gap, lambda images, _: collect_moments(images)])
def test_sums_over_rows_hold_one_part(pairs, measure):
    assert 0 < _largest(measure, *pairs) <= (WIDTH + 1) ** 2 * 8


def test_one_copy_in_float64_is_seen():
    """What the tests above look for does show."""
    rows = torch.nn.functional.normalize(torch.randn(COUNT, WIDTH), dim=1).half()
    assert _largest(lambda: rows.double().sum()) == 4 * FEATURE_BYTES
    assert _largest(uniformity, rows, chunk_rows=COUNT) >= 8 * COUNT**2
