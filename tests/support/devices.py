"""Tests that run on every device at hand: on a CUDA device as ``gpu``, and on the CPU as ``e2e``.

So what needs a GPU is executed in every CI, and what it finds there is the same.
"""

import pytest

on_devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.e2e),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
