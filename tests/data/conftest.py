"""What several data tests share: a pair of processes (spawning costs seconds), a closed place."""

import tempfile

import pytest

from tests.support.data_ranks import compare_and_count
from tests.support.processes import run_ranks
from tests.support.shards import write_shards


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Results of ``compare_and_count`` by rank."""
    folder = tmp_path_factory.mktemp("two_ranks")
    same = write_shards(folder / "a", (3, 4))
    other = write_shards(folder / "b", (3, 5))
    return run_ranks(compare_and_count, 2, same, other)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with everything a process writes into: home, temporary files, data, work."""
    for name in ("home", "tmp", "data", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path
