import json
import os
import pickle

import numpy as np
import pytest

from dist_siglip.data.index import read as index_module
from dist_siglip.data.index import read as side_car
from dist_siglip.data.index.read import read_index
from dist_siglip.data.index.shard_index import build_index, split_name
from dist_siglip.data.index.tar_scan import Member, scan_tar
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.errors import UserError
from tests.support.servers import serve
from tests.support.shards import load_index, write_shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dist_siglip" / "index"


@pytest.fixture
def shard(tmp_path):
    members = [(f"k{i}", {"jpg": b"j" * i, "txt": b"t"}) for i in range(5)]
    return str(write_shard(tmp_path / "a.tar", members))


@pytest.fixture
def scans(monkeypatch):
    """Paths whose headers were scanned, in order."""
    seen = []

    def scan(path):
        seen.append(path)
        return scan_tar(path)

    monkeypatch.setattr(index_module, "scan_tar", scan)
    return seen


def values(index):
    arrays = [index.samples, index.kinds, index.offsets, index.sizes]
    return index.keys(), index.extensions, [a.tolist() for a in arrays], index.digest


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("img.v2.JPG", ("img", "v2.jpg")),
        ("d.x/a.jpg", ("d.x/a", "jpg")),
        ("./a.txt", ("./a", "txt")),
        ("README", None),
        ("._a.jpg", None),
        ("d.x/.hidden", None),
        ("__meta__/a.jpg", None),
        ("__worker__.json", ("__worker__", "json")),
    ],
)
def test_names_split_as_in_webdataset(name, parts):
    assert split_name(name) == parts


def test_members_are_grouped_even_when_apart():
    members = [Member("a.jpg", 0, 1), Member("b.jpg", 10, 2), Member("a.txt", 20, 3)]
    index = build_index("x.tar", members)
    assert index.keys() == ["a", "b"]
    assert index.samples.tolist() == [0, 1, 0]
    assert index.extensions == ("jpg", "txt")
    assert index.kinds.tolist() == [0, 0, 1]


def test_duplicate_member_is_refused(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("k", {"txt": b"1"}), ("k", {"txt": b"2"})])
    with pytest.raises(UserError, match=r"a\.tar' holds member 'k\.txt' twice") as info:
        load_index(str(path))
    assert "\n" not in str(info.value)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_side_car_is_written_once_and_read_back(shard, scans):
    first = load_index(shard)
    second = load_index(shard)
    assert scans == [shard]
    assert values(first) == values(second)
    assert first.num_samples == 5
    assert first.keys() == [f"k{i}" for i in range(5)]
    assert sorted(os.listdir(os.path.dirname(shard))) == ["a.tar", "a.tar.idx.npz"]


def test_new_modification_time_makes_a_new_index(shard, scans):
    load_index(shard)
    os.utime(shard, ns=(1, 1))
    load_index(shard)
    load_index(shard)
    assert scans == [shard, shard]


def test_changed_shard_is_indexed_anew(shard, tmp_path):
    before = load_index(shard)
    status = os.stat(shard)
    write_shard(tmp_path / "a.tar", [("other", {"jpg": b"j" * 5000, "txt": b"t"})])
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the size tells
    after = load_index(shard)
    assert after.keys() == ["other"]
    assert after.digest != before.digest


def test_side_car_of_another_shard_is_not_trusted(shard, tmp_path, scans):
    load_index(shard)
    renamed = tmp_path / "b.tar"
    os.rename(shard, renamed)
    os.rename(f"{shard}.idx.npz", f"{renamed}.idx.npz")
    load_index(str(renamed))
    assert scans == [shard, str(renamed)]


@pytest.mark.parametrize("keep", [0, 1, 100, -30])
def test_damaged_side_car_is_written_again(shard, scans, caplog, keep):
    expected = values(load_index(shard))
    side_car = f"{shard}.idx.npz"
    with open(side_car, "r+b") as file:
        file.truncate(keep if keep >= 0 else os.path.getsize(side_car) + keep)
    assert values(load_index(shard)) == expected
    assert "damaged" in caplog.text
    assert values(load_index(shard)) == expected
    assert len(scans) == 2


def test_pickle_in_a_side_car_is_never_loaded(shard, tmp_path, scans):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    load_index(shard)
    with open(f"{shard}.idx.npz", "wb") as file:
        np.savez(file, header=np.array([Bomb()], dtype=object))
    load_index(shard)
    with open(f"{shard}.idx.npz", "wb") as file:
        pickle.dump(Bomb(), file)
    load_index(shard)
    assert len(scans) == 3
    assert not (tmp_path / "executed").exists()


def joined_shard(tmp_path):
    parts = [
        write_shard(tmp_path / f"{k}.tar", [(k, {"jpg": b"j", "txt": b"t"})]).read_bytes()
        for k in "ab"
    ]
    path = tmp_path / "c.tar"
    path.write_bytes(b"".join(parts))
    return str(path)


def make_old(path):
    """Take out of a side-car what earlier versions did not write."""
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())
    del header["note"], header["looked_behind_end"]
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def test_a_side_car_that_knows_only_the_first_archive_is_not_believed(tmp_path, scans):
    shard = joined_shard(tmp_path)
    status = os.stat(shard)
    identity = {"version": 1, "name": "c.tar", "size": status.st_size}
    identity["mtime_ns"] = status.st_mtime_ns
    first = build_index(shard, scan_tar(str(tmp_path / "a.tar")).members)
    assert side_car.write_side_car(f"{shard}.idx.npz", first, identity)
    make_old(f"{shard}.idx.npz")
    assert load_index(shard).keys() == ["a", "b"]
    again = load_index(shard)
    assert again.keys() == ["a", "b"]
    assert "holds 2 archives" in again.remark  # said by the new side-car as well
    assert scans == [shard]


def test_an_old_side_car_of_a_usual_shard_is_believed(shard, scans):
    load_index(shard)
    make_old(f"{shard}.idx.npz")
    load_index(shard)
    assert scans == [shard]


def test_a_shard_without_an_end_is_cut_if_its_side_car_says_that_it_held_more(tmp_path):
    members = [(f"k{i}", {"jpg": b"j" * 900, "txt": b"t"}) for i in range(4)]
    shard = str(write_shard(tmp_path / "a.tar", members, mtime=0))
    end = load_index(shard).offsets[-2] - 512
    os.truncate(shard, end)
    damage = read_index(shard).damage
    assert "a.tar' is cut short: it has" in damage
    assert str(end) in damage


def test_a_shard_without_an_end_is_remarked_upon_every_time(tmp_path, scans):
    shard = str(write_shard(tmp_path / "a.tar", [("k", {"jpg": b"j", "txt": b"t"})], mtime=0))
    os.truncate(shard, 4 * 512)
    for _ in range(2):
        index = load_index(shard)
        assert index.num_samples == 1
        assert index.remark.startswith(f"shard {shard!r} has no end marker")
    assert scans == [shard]


def test_closed_folder_falls_back_to_the_cache(shard, cache, scans):
    os.mkdir(f"{shard}.idx.npz")  # nothing can be renamed onto a folder
    load_index(shard)
    load_index(shard)
    assert scans == [shard]
    assert len(os.listdir(cache)) == 1
    assert not [name for name in os.listdir(os.path.dirname(shard)) if name.endswith(".tmp")]


def test_no_place_for_a_side_car_is_no_error(shard, cache, scans):
    os.mkdir(f"{shard}.idx.npz")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"a file where a folder should be")
    assert load_index(shard).num_samples == 5
    assert load_index(shard).num_samples == 5
    assert len(scans) == 2


def test_names_that_are_not_unicode_survive(tmp_path):
    key = b"caf\xe9".decode("utf-8", "surrogateescape")
    index = build_index("x.tar", [Member(f"{key}.txt", 0, 1)])
    assert index.keys() == [key]


def test_shard_without_samples_has_an_empty_index(tmp_path):
    path = str(write_shard(tmp_path / "a.tar", []))
    for index in (load_index(path), load_index(path)):
        assert (index.num_samples, index.keys(), index.samples.tolist()) == (0, [], [])
        assert index.remark == f"shard {path!r} holds no samples"


def test_a_remote_shard_is_scanned_though_its_copy_is_evicted_meanwhile(tmp_path, monkeypatch):
    body = write_shard(tmp_path / "a.tar", [("k", {"jpg": b"j", "txt": b"t"})]).read_bytes()
    folder = tmp_path / "copies"

    def scan(path):
        for copy in folder.glob("*.tar"):
            copy.unlink()
        return scan_tar(path)

    monkeypatch.setattr(index_module, "scan_tar", scan)
    with serve() as server:
        server.files["a.tar"] = body
        store = ShardCache(CacheSettings(folder=str(folder)))
        assert load_index(server.url + "a.tar", store).num_samples == 1


def test_the_index_of_a_remote_file_that_could_change_unseen_is_not_kept(tmp_path, cache):
    body = write_shard(tmp_path / "a.tar", [("k", {"jpg": b"j", "txt": b"t"})]).read_bytes()
    with serve() as server:
        server.files["a.tar"] = body
        server.chunked = {"a.tar"}
        store = ShardCache(CacheSettings(folder=str(tmp_path / "copies")))
        assert load_index(server.url + "a.tar", store).num_samples == 1
        assert not any(cache.glob("*"))
        server.etags["a.tar"] = "1"
        load_index(server.url + "a.tar", store)
        assert any(cache.glob("*"))
