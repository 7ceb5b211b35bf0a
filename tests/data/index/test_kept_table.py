import io
import json
import os
import pickle

import numpy as np
import pytest

from dist_siglip.data.index.pairs import build_pair_table, read_table, table_path, write_table
from dist_siglip.errors import UserError
from tests.support.shards import UNEVEN, write_shards


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "dist_siglip" / "tables"


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
    (file,) = home.glob("*.npy")
    assert first.file == str(file)
    assert isinstance(first.image_offsets, np.memmap)
    for shard in shards:
        os.unlink(f"{shard}.idx.npz")
    monkeypatch.setattr("dist_siglip.data.index.pairs.read_index", None)  # must not be asked
    second = build(shards)
    assert equal(first, second)
    assert second.counts == UNEVEN


def test_a_table_of_several_members_is_kept_too(tmp_path, home, caplog):
    """Selected rows of several members lie in memory column by column."""
    shards = write_shards(tmp_path / "shards")
    options = {"image_extensions": ["png"], "other_extensions": ["json", "npz"]}
    first = build_pair_table(shards, **options)
    assert first.file is not None
    assert equal(first, build_pair_table(shards, **options))
    assert not caplog.messages


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
    (file,) = home.glob("*.npy")
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


def saved(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_a_damaged_table_is_made_again(tmp_path, home, caplog):
    shards = write_shards(tmp_path / "shards")
    wanted = build(shards)
    (file,), (values,) = home.glob("*.npy"), home.glob("*.json")
    columns, plain = file.read_bytes(), values.read_bytes()
    fewer = json.loads(plain)
    fewer["starts"] = fewer["starts"][:-1]
    damages = [(file, columns[:cut]) for cut in (0, 5, 40, 130, -1)]
    damages += [(values, plain[:cut]) for cut in (0, 5, -1)]
    damages += [(values, b"[]"), (values, b"[" * 5000), (values, json.dumps(fewer).encode())]
    damages += [
        (file, saved(np.load(file)[:, :-1])),
        (file, saved(np.load(file).astype(float))),
        (file, saved(np.asfortranarray(np.load(file)))),
        (file, columns.replace(b"<i8", b"|O8", 1)),
        (file, columns[:10] + b"(" * 100 + columns[110:]),
    ]
    for path, damage in damages:
        path.unlink()  # it is mapped: the bytes of what was mapped stay
        path.write_bytes(damage)
        caplog.clear()
        assert read_table(str(file)) is None, damage[:50]
        assert "is damaged" in caplog.text
        assert equal(build(shards), wanted)
        assert (file.read_bytes(), values.read_bytes()) == (columns, plain)
    values.unlink()
    os.mkfifo(values)
    assert read_table(str(file)) is None


def test_a_table_of_an_earlier_format_is_not_read(tmp_path, home):
    shards = write_shards(tmp_path / "shards")
    home.mkdir(parents=True)
    for name in ("npy", "table"):
        old = table_path(shards, {"images": ["png"], "captions": ["txt"]}).replace("npy", name)
        with open(old, "wb") as file:
            file.write(b"dist_siglip table 2\n" + bytes(1000))
    assert build(shards).counts == UNEVEN


def test_the_newest_tables_are_kept(tmp_path):
    table = build(write_shards(tmp_path / "shards"))
    (tmp_path / "old.table").write_bytes(b"")
    os.utime(tmp_path / "old.table", (1, 1))
    for number in range(20):
        write_table(str(tmp_path / f"{number}.npy"), table)
        os.utime(tmp_path / f"{number}.npy", (number + 2, number + 2))
    write_table(str(tmp_path / "last.npy"), table)
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    kept = ["last", *map(str, range(5, 20))]
    assert left == {f"{name}.npy{end}" for name in kept for end in ("", ".json")}


def test_a_closed_folder_is_no_error(tmp_path):
    table = build(write_shards(tmp_path / "shards"))
    (tmp_path / "file").write_text("")
    assert not write_table(str(tmp_path / "file" / "t.npy"), table)


def test_a_relative_name_is_not_used_from_another_folder(tmp_path, monkeypatch):
    shard = write_shards(tmp_path, (3,))[0]
    monkeypatch.chdir(tmp_path)
    build_pair_table([os.path.basename(shard)], image_extensions=("png",))
    monkeypatch.chdir("/")
    assert build_pair_table([str(shard)], image_extensions=("png",)).shards == (str(shard),)
