"""Pages in snappy, as pyarrow writes them unless told otherwise, give up one picture alone."""

import os

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dist_siglip.data.parquet import UnknownEncodingError
from dist_siglip.data.parquet.rows import ParquetRows, address
from dist_siglip.data.parquet.snappy import SnappyFragments, find_fragments

DRAW = np.random.default_rng(0)
PICTURES = [DRAW.bytes(50_000) for _ in range(40)]
SNAPPY = pyarrow.Codec("snappy")


def packed(data):
    return SNAPPY.compress(data, asbytes=True)


@pytest.fixture
def opened(tmp_path):
    descriptors = []

    def write(data):
        path = tmp_path / f"{len(descriptors)}"
        path.write_bytes(data)
        descriptors.append(os.open(path, os.O_RDONLY))
        return descriptors[-1]

    yield write
    for descriptor in descriptors:
        os.close(descriptor)


def mixed(size):
    """Bytes that compress here and there."""
    parts, length = [], 0
    while length < size:
        step = int(DRAW.integers(1, 9000))
        parts.append(DRAW.bytes(step) if DRAW.random() < 0.5 else b"hen in grass " * (step // 13))
        length += len(parts[-1])
    return b"".join(parts)[:size]


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 131_072, 400_000])
def test_every_part_of_a_stream_is_what_was_packed(opened, size):
    data = mixed(size)
    descriptor = opened(b"before" + packed(data) + b"behind")
    fragments = find_fragments(packed(data), 6, size)
    assert fragments is not None
    assert len(fragments.starts) == -(-size // 65_536) + 1
    for _ in range(50):
        first, last = sorted(DRAW.integers(0, size + 1, 2).tolist())
        assert fragments.read(descriptor, first, last - first) == data[first:last]


def test_streams_that_are_not_of_fragments_are_told():
    data = mixed(200_000)
    stored = packed(data)
    assert find_fragments(stored[:-1], 0, 200_000) is None
    assert find_fragments(stored + b"\0\0", 0, 200_000) is None
    assert find_fragments(stored, 0, 199_999) is None
    whole = b"\xc0\x9a\x0c" + b"\xf8\x3f\x0d\x03" + data  # one literal, across the fragments
    assert SNAPPY.decompress(whole, 200_000, asbytes=True) == data
    assert find_fragments(whole, 0, 200_000) is None
    short = b"\0a" * (1 << 19)  # pieces of one byte
    assert find_fragments(b"\x80\x80\x20" + short, 0, 1 << 19) is None


def test_a_copy_from_another_fragment_is_noticed(opened):
    """65,536 bytes, then four that stand 65,535 bytes before."""
    first = DRAW.bytes(65_536)
    stored = b"\x84\x80\x04" + b"\xf4\xff\xff" + first + bytes([3 << 2 | 2]) + b"\xff\xff"
    assert SNAPPY.decompress(stored, 65_540, asbytes=True) == first + first[1:5]
    fragments = find_fragments(stored, 0, 65_540)
    assert fragments is not None
    descriptor = opened(stored)
    assert fragments.read(descriptor, 10, 20) == first[10:30]
    with pytest.raises(UnknownEncodingError, match="cannot be unpacked alone"):
        fragments.read(descriptor, 65_536, 4)


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "data_page_version": "2.0"}])
def test_one_picture_is_read_and_unpacked_without_its_page(opened, monkeypatch, options):
    sink = pyarrow.BufferOutputStream()
    pictures = [None, *PICTURES[1:]]
    parquet.write_table(pyarrow.table({"image": pictures}), sink, compression="snappy", **options)
    rows = ParquetRows(opened(sink.getvalue().to_pybytes()))
    asked, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda d, n, at: asked.append(n) or pread(d, n, at))
    assert rows.read(address(0, 30)) == PICTURES[30]
    for i in (29, 1, 39):
        asked.clear()
        assert rows.read(address(0, i)) == PICTURES[i]
        assert sum(asked) < 50_000 + 2 * 65_536
    assert rows._kept._bytes < 10_000  # of two million
    monkeypatch.setattr(SnappyFragments, "read", _cannot)
    assert rows.read(address(0, 30)) == PICTURES[30]  # as pyarrow decodes it


def _cannot(*arguments):
    raise UnknownEncodingError
