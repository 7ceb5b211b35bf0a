import os
import pickle
from types import SimpleNamespace

import pytest

from dist_siglip.data.index.pairs import Span
from dist_siglip.data.remote import RemoteError
from dist_siglip.data.samples import fetch
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.fetch import ShardReader


@pytest.fixture
def files(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.tar").write_bytes(b"0123456789" * (number + 1))
    return [str(tmp_path / f"{number}.tar") for number in range(5)]


def num_open_files():
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files")


def test_spans_are_read_exactly(files):
    reader = ShardReader()
    assert reader.read(Span(files[0], 3, 4)) == b"3456"
    assert reader.read(Span(files[4], 48, 2)) == b"89"
    assert reader.read(Span(files[0], 0, 0)) == b""


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        (Span("0.tar", 8, 3), "ends 1 bytes early"),
        (Span("0.tar", 0, 21), "of 21 bytes, at most 20"),
        (Span("missing.tar", 0, 1), "cannot be read"),
    ],
)
def test_unreadable_spans_are_bad_samples(files, tmp_path, span, reason):
    reader = ShardReader(max_member_bytes=20)
    with pytest.raises(BadSampleError, match=reason):
        reader.read(span._replace(shard=str(tmp_path / span.shard)))


@needs_proc
def test_open_files_stay_bounded_and_close(files, monkeypatch):
    monkeypatch.setattr(fetch, "_OPEN_SHARDS", 2)
    before = num_open_files()
    reader = ShardReader()
    for _ in range(3):
        for path in files:
            assert reader.read(Span(path, 0, 1)) == b"0"
            assert num_open_files() <= before + 2
    reader.close()
    assert num_open_files() == before
    assert reader.read(Span(files[0], 0, 1)) == b"0"


@needs_proc
def test_copies_open_their_own_files(files):
    reader = ShardReader()
    reader.read(Span(files[0], 0, 1))
    opened = num_open_files()
    copy = pickle.loads(pickle.dumps(reader))
    assert num_open_files() == opened
    assert copy.read(Span(files[0], 1, 2)) == b"12"
    del copy
    assert reader.read(Span(files[0], 1, 2)) == b"12"


def remote(tmp_path):
    """A cache whose copies are files of this folder, by the name at the end of a URL."""

    def open_copy(url):
        path = tmp_path / url.rpartition("/")[2]
        if not path.exists():
            raise RemoteError(f"{url} cannot be fetched", is_missing="none" in url)
        return os.open(path, os.O_RDONLY)

    return SimpleNamespace(open=open_copy)


def test_spans_of_remote_shards_are_read_from_their_copies(files, tmp_path):
    reader = ShardReader(remote(tmp_path))
    assert reader.read(Span("https://host/0.tar", 3, 4)) == b"3456"
    assert reader.read(Span(files[0], 3, 4)) == b"3456"
    with pytest.raises(BadSampleError, match=r"none\.tar cannot be fetched"):
        reader.read(Span("https://host/none.tar", 0, 1))
    with pytest.raises(RemoteError, match=r"down\.tar cannot be fetched"):  # no fault of a sample
        reader.read(Span("https://host/down.tar", 0, 1))
    with pytest.raises(BadSampleError, match="there is no cache"):
        ShardReader().read(Span("https://host/0.tar", 0, 1))


@needs_proc
def test_an_evicted_copy_is_closed_so_that_its_space_is_free(files, tmp_path):
    reader = ShardReader(remote(tmp_path))
    reader.read(Span("https://host/0.tar", 0, 1))
    opened = num_open_files()
    os.unlink(files[0])
    assert reader.read(Span("https://host/0.tar", 3, 4)) == b"3456"
    reader.read(Span("https://host/1.tar", 0, 1))
    assert num_open_files() == opened
    reader.close()
