"""The tests that need a GPU are there, import, and skip with one reason where there is none."""

import re
import subprocess
import sys

import pytest
import torch

from tests.support.command import REPOSITORY

pytestmark = pytest.mark.e2e


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they run themselves")
def test_at_least_forty_are_collected_and_each_skips_with_the_reason():
    files = [
        str(path)
        for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
        if re.search(r"mark\.gpu|on_devices", path.read_text())
    ]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", "-rs", "-v", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    found = re.search(r"(\d+) skipped", last)
    assert found is not None, last
    assert int(found[1]) >= 40, last
    assert not re.search(r"passed|failed|error", last), last
    reasons = set(re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", done.stdout, re.M))
    assert reasons == {"needs a CUDA device, and torch finds none"}
