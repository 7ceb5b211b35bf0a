"""One cluster for the tests of a process."""

import pytest

from tests.support.slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def cluster():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with SlurmCluster() as running:
        yield running
