"""Cells come as they were written, however a writer stored them."""

import itertools
import json
import os

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dist_siglip.data.parquet import ParquetError
from dist_siglip.data.parquet import rows as rows_module
from dist_siglip.data.parquet.pages import hybrid
from dist_siglip.data.parquet.rows import Kept, ParquetRows, TextList, address

COUNT = 120
DRAW = np.random.default_rng(0)
PICTURES = [None if i % 7 == 3 else DRAW.bytes(int(DRAW.integers(0, 6000))) for i in range(COUNT)]
CAPTIONS = [None if i % 11 == 5 else f"caption {i % 40} é" for i in range(COUNT)]
LISTS = [[f"a{i}", None, "b"] if i % 13 else None for i in range(COUNT)]
TABLE = pyarrow.table(
    {
        "image": [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(PICTURES)],
        "raw": PICTURES,
        "caption": CAPTIONS,
        "texts": LISTS,
        "objects": [[{"raw": f"x{i}", "n": i}] for i in range(COUNT)],
        "number": list(range(COUNT)),
    }
)
IMAGE, RAW, CAPTION, TEXTS, OBJECTS, NUMBER, RECORD = range(7)
STORED = [
    {"compression": compression, "use_dictionary": dictionary, "data_page_version": version}
    | {"data_page_size": size}
    for compression, dictionary, version, size in itertools.product(
        ["none", "snappy", "zstd", "gzip"], [True, False], ["1.0", "2.0"], [2000, 1 << 20]
    )
]
STORED += [
    {"use_dictionary": False, "column_encoding": dict.fromkeys(["raw", "caption"], e)}
    for e in ("DELTA_LENGTH_BYTE_ARRAY", "PLAIN")
]
STORED += [{"compression": "lz4"}, {"compression": "brotli"}, {"write_statistics": False}]


@pytest.fixture
def opened(tmp_path):
    """Write the table, and open its rows."""
    descriptors = []

    def write(table=TABLE, rows=None, **options):
        path = tmp_path / "a.parquet"
        parquet.write_table(table, path, **{"row_group_size": 50, **options})
        descriptors.append(os.open(path, os.O_RDONLY))
        return ParquetRows(descriptors[-1], **(rows or {}))

    yield write
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("options", STORED, ids=str)
def test_every_cell_is_what_was_written(opened, options):
    rows = opened(**options)
    for i in range(COUNT):
        for column in (IMAGE, RAW):
            if PICTURES[i] is None:
                with pytest.raises(ParquetError, match="holds nothing"):
                    rows.read(address(column, i))
            else:
                assert rows.read(address(column, i)) == PICTURES[i]
        assert rows.read(address(CAPTION, i)) == (CAPTIONS[i] or "").encode()
    for i in range(0, COUNT, 9):
        texts = rows.read(address(TEXTS, i))
        if LISTS[i]:
            assert isinstance(texts, TextList)
            assert json.loads(texts) == [f"a{i}", "b"]
        else:
            assert texts == b""
        assert rows.read(address(NUMBER, i)) == str(i).encode()
        assert json.loads(rows.read(address(RECORD, i))) == {
            "caption": CAPTIONS[i],
            "texts": LISTS[i],
            "objects": [{"raw": f"x{i}", "n": i}],
            "number": i,
        }
    for group, column in itertools.product(range(3), (IMAGE, RAW, CAPTION)):
        values = (CAPTIONS if column == CAPTION else PICTURES)[50 * group :][:50]
        expected = [value is not None for value in values]
        has_counts = options.get("write_statistics", True)
        assert rows.present(group, column).tolist() == (
            expected if has_counts else [True] * len(expected)
        )


def test_of_a_page_that_is_not_compressed_one_picture_is_read_alone(opened, monkeypatch):
    """No neighbour's bytes, and of other columns nothing, as in a tar."""
    table = pyarrow.table({"image": [bytes([i]) * 50_000 for i in range(50)], "other": [1] * 50})
    rows = opened(table, compression="none", use_dictionary=False)
    asked = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda d, n, at: asked.append(n) or pread(d, n, at))
    assert rows.read(address(0, 30)) == bytes([30]) * 50_000
    assert sum(asked) < 50_000 + 4 * 50 + 4096 * 6
    asked.clear()
    assert rows.read(address(0, 29)) == bytes([29]) * 50_000
    assert asked == [50_000]


def test_columns_nobody_asks_for_are_not_decoded(opened, monkeypatch):
    rows = opened(rows={"fields": ("objects.raw", "caption")})
    decoded = []
    decode = ParquetRows._decode
    monkeypatch.setattr(
        ParquetRows, "_decode", lambda self, g, n: decoded.append(n) or decode(self, g, n)
    )
    assert set(json.loads(rows.read(address(RECORD, 3)))) == {"objects", "caption"}
    assert decoded == [OBJECTS]


def test_what_is_kept_is_bounded():
    kept = Kept(100)
    for number in range(20):
        assert kept.get(("a", number), lambda: bytes(30), len) == bytes(30)
    assert len(kept._found) == 3
    kept.get(("b",), lambda: bytes(1000), len)  # larger than all: kept alone
    assert list(kept._found) == [("b",)]
    kept.forget("b")
    assert kept._bytes == 0


def test_few_bytes_that_stand_for_many_are_not_decoded(opened, monkeypatch):
    many = pyarrow.table(
        {"n": pyarrow.array([["x" * 1000] * 300] * 100, pyarrow.list_(pyarrow.string()))}
    )
    rows = opened(many, row_group_size=100)
    before = pyarrow.total_allocated_bytes()
    assert len(json.loads(rows.read(address(0, 99)))) == 300
    assert pyarrow.total_allocated_bytes() - before < 1_000_000  # of 30 million
    monkeypatch.setattr(rows_module, "MOST_VALUES", 1000)
    with pytest.raises(ParquetError, match=r"30000 values .* write smaller row groups"):
        ParquetRows(rows._descriptor).read(address(0, 0))


def test_maps_and_nested_lists_are_read_as_they_were_written(opened, monkeypatch):
    maps = [[("a", "x" * 400)], None, [], [("b", "y"), ("c", None)]]
    lists = [[[{"k": ["p", None]}]], [[]], None, [None, [{"k": None}]]]
    table = pyarrow.table(
        {
            "m": pyarrow.array(maps, pyarrow.map_(pyarrow.string(), pyarrow.string())),
            "n": pyarrow.array(lists),
        }
    )
    rows = opened(table)
    for row in range(4):
        found = json.loads(rows.read(address(2, row)))
        pairs = maps[row] and [list(pair) for pair in maps[row]]
        assert found == {"m": pairs, "n": lists[row]}
    monkeypatch.setattr(rows_module, "LARGEST_PAGE", 500)  # of the row that is asked for alone
    assert json.loads(opened(table.select(["m"])).read(address(1, 3)))["m"] == [
        list(p) for p in maps[3]
    ]


@pytest.mark.parametrize("is_int96", [False, True])
def test_times_are_the_same_text_with_and_without_pandas(opened, is_int96):
    times = pyarrow.array([1_600_000_000_123_456_789, None], pyarrow.timestamp("ns"))
    options = {"use_deprecated_int96_timestamps": is_int96}
    rows = opened(pyarrow.table({"time": times}), **options)
    for row, text in ((0, "2020-09-13 12:26:40.123456"), (1, None)):
        assert json.loads(rows.read(address(1, row))) == {"time": text}


def test_front_coded_texts_are_refused(opened):
    options = {"use_dictionary": False, "column_encoding": {"caption": "DELTA_BYTE_ARRAY"}}
    with pytest.raises(ParquetError, match=r"DELTA_BYTE_ARRAY, .* write it PLAIN"):
        opened(TABLE.select(["caption"]), **options).read(address(0, 0))


@pytest.mark.parametrize("width", [1, 3, 8, 13])
def test_hybrid_numbers_are_those_of_a_plain_loop(width):
    """Runs and packed groups, mixed, against bits taken one by one."""
    draw = np.random.default_rng(width)
    data, expected = b"", []
    for _ in range(20):
        if draw.random() < 0.5:
            length, value = int(draw.integers(1, 60)), int(draw.integers(0, 1 << width))
            data += bytes([length << 1]) + value.to_bytes((width + 7) // 8, "little")
            expected += [value] * length
        else:
            groups = int(draw.integers(1, 7))
            values = draw.integers(0, 1 << width, 8 * groups).tolist()
            packed = sum(value << (width * place) for place, value in enumerate(values))
            data += bytes([groups << 1 | 1]) + packed.to_bytes(groups * width, "little")
            expected += values
    for count in (0, 1, 9, len(expected)):
        assert hybrid(data, 0, width, count).tolist() == expected[:count]
    with pytest.raises(ParquetError):
        hybrid(data, 0, width, len(expected) + 1)


@pytest.mark.parametrize(
    ("columns", "members", "expected"),
    [
        ({"img": b"x"}, (), ["img"]),
        ({"image": b"x", "mask": b"x"}, (), ["image"]),
        ({"photo": b"x", "mask": b"x"}, (), []),
        ({"photo": b"x", "mask": b"x"}, ("mask", "photo"), ["mask", "photo"]),
        ({"photo": {"bytes": b"x", "path": "p"}, "text": "t"}, (), ["photo"]),
        ({"photos": [b"x"], "text": "t"}, (), []),
    ],
)
def test_the_column_of_pictures_is_found(opened, columns, members, expected):
    footer = opened(pyarrow.Table.from_pylist([columns])).footer
    found = footer.picture_columns(members)
    assert [footer.columns[number].name for number in found] == expected
