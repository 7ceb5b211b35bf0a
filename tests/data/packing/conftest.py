"""Pictures that several tests pack."""

import pytest

from tests.support.packing import COUNT, KINDS
from tests.support.shards import encode, picture


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of pictures, all called .jpg whatever they are."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        (folder / f"{i}.jpg").write_bytes(encode(picture(i, side=24), KINDS[i % 3]))
    return folder
