import os
import pickle

import numpy as np
import pytest

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.index.table_file import read_table, table_path, write_table
from dist_siglip.errors import UserError
from tests.support.shards import UNEVEN, write_shards

ARRAYS = {
    "a": np.arange(10, dtype=np.int64),
    "b": np.arange(6, dtype=np.int64).reshape(2, 3),
    "none": np.zeros((0, 2), dtype=np.int64),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "dist_siglip" / "tables"


def test_what_is_written_is_mapped(tmp_path):
    path = str(tmp_path / "t.table")
    assert write_table(path, ARRAYS, {"name": "x", "list": ["a", "b"]})
    arrays, values = read_table(path)
    assert values == {"name": "x", "list": ["a", "b"]}
    for name, expected in ARRAYS.items():
        assert np.array_equal(arrays[name], expected)
        assert arrays[name].shape == expected.shape
    assert isinstance(arrays["a"], np.memmap)


@pytest.mark.parametrize("cut", [0, 5, 25, 40, 200, -1])
def test_a_damaged_file_is_no_table(tmp_path, cut, caplog):
    path = tmp_path / "t.table"
    write_table(str(path), ARRAYS, {})
    path.write_bytes(path.read_bytes()[:cut])
    assert read_table(str(path)) is None
    assert "is damaged" in caplog.text


def test_a_hostile_header_is_no_table(tmp_path):
    path = tmp_path / "t.table"
    write_table(str(path), ARRAYS, {})
    sound = path.read_bytes()
    for old, new in ((b'"a": [0', b'"a": [9'), (b"[10]", b"[-1]"), (b'"bytes"', b'"bytfs"')):
        path.write_bytes(sound.replace(old, new, 1))
        found = read_table(str(path))
        assert found is None or not np.array_equal(found[0]["a"], ARRAYS["a"])
    path.write_bytes(sound[:20] + (1 << 60).to_bytes(8, "little"))
    assert read_table(str(path)) is None


def test_the_newest_tables_are_kept(tmp_path):
    paths = [str(tmp_path / f"{i}.table") for i in range(20)]
    for number, path in enumerate(paths):
        write_table(path, ARRAYS, {})
        os.utime(path, (number, number))
    write_table(str(tmp_path / "last.table"), ARRAYS, {})
    left = {p.name for p in tmp_path.glob("*.table")}
    assert len(left) == 16
    assert "last.table" in left
    assert "0.table" not in left


def test_a_closed_folder_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert not write_table(str(tmp_path / "file" / "t.table"), ARRAYS, {})


def build(shards, **options):
    return build_pair_table(shards, image_extensions=("png",), **options)


def equal(first, second):
    return (
        first.counts == second.counts
        and first.fingerprint == second.fingerprint
        and first.shard_lines == second.shard_lines
        and all(first.image_span(i) == second.image_span(i) for i in range(first.num_samples))
        and all(first.caption_spans(i) == second.caption_spans(i) for i in range(first.num_samples))
    )


def test_the_second_table_of_the_same_shards_is_mapped_and_equal(tmp_path, home, monkeypatch):
    shards = write_shards(tmp_path / "shards")
    first = build(shards)
    (file,) = home.iterdir()
    assert first.file == str(file)
    for shard in shards:
        os.unlink(f"{shard}.idx.npz")
    monkeypatch.setattr("dist_siglip.data.index.pairs.read_index", None)  # must not be asked
    second = build(shards)
    assert equal(first, second)
    assert second.counts == UNEVEN


def test_another_shard_order_setting_or_time_is_another_table(tmp_path):
    shards = write_shards(tmp_path / "shards")
    first = table_path(shards, {"images": ["png"]})
    assert table_path(shards[::-1], {"images": ["png"]}) != first
    assert table_path(shards, {"images": ["jpg"]}) != first
    os.utime(shards[0], ns=(1, 1))
    assert table_path(shards, {"images": ["png"]}) != first


def test_a_pickled_table_is_small_and_maps_the_same_file(tmp_path, home):
    table = build(write_shards(tmp_path / "shards", (400, 400)))
    pickled = pickle.dumps(table)
    assert len(pickled) < 1000
    assert equal(pickle.loads(pickled), table)
    (file,) = home.iterdir()
    file.unlink()
    assert equal(pickle.loads(pickle.dumps(table)), table)
    with pytest.raises(UserError, match="vanished"):
        pickle.loads(pickled)


def test_damaged_data_are_told_every_time(tmp_path, caplog):
    shards = write_shards(tmp_path / "shards")
    os.truncate(shards[2], 9000)
    for _ in range(2):
        caplog.clear()
        build(shards, on_damage="skip", max_bad_fraction=0.9)
        assert "00002.tar" in caplog.text
        with pytest.raises(UserError, match="cut short"):
            build(shards)
