"""One pair of processes for all data tests that need ranks: spawning costs seconds."""

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
