import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from dist_siglip.data import tar_scan
from dist_siglip.data.tar_scan import Member, scan_tar
from dist_siglip.errors import UserError
from tests.support.shards import write_shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path, entries, form=tarfile.USTAR_FORMAT, mtime=0):
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), mtime
            archive.addfile(entry, io.BytesIO(data))
    return str(path)


def contents(path):
    data = Path(path).read_bytes()
    return [(m.name, data[m.offset : m.offset + m.size]) for m in scan_tar(path)]


def refuse_tarfile(path, descriptor):
    raise AssertionError("the slow way was taken")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mtime", [1, 1732.25])
def test_common_tars_are_scanned_without_tarfile(tmp_path, monkeypatch, form, mtime):
    monkeypatch.setattr(tar_scan, "_scan_with_tarfile", refuse_tarfile)
    entries = [(f"{i:04d}.jpg", os.urandom(i * 37)) for i in range(200)]
    entries.append(("deep/" + "d" * 80 + "/x.txt", b"prefix field"))
    assert contents(write_tar(tmp_path / "a.tar", entries, FORMATS[form], mtime)) == entries


def test_default_webdataset_writer_is_scanned_without_tarfile(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_scan, "_scan_with_tarfile", refuse_tarfile)
    path = write_shard(tmp_path / "a.tar", [("k1", {"png": b"p", "txt": b"t"})])
    assert contents(path) == [("k1.png", b"p"), ("k1.txt", b"t")]


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_long_and_foreign_names_survive(tmp_path, form):
    entries = [("n" * 300 + ".jpg", b"1"), ("ü" * 120 + ".txt", b"2"), ("plain.txt", b"3")]
    assert contents(write_tar(tmp_path / "a.tar", entries, FORMATS[form])) == entries


def test_links_and_folders_are_left_out(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "d/s.jpg")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        entry = tarfile.TarInfo("d/a.jpg")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    assert contents(path) == [("d/a.jpg", b"abc")]


def test_sizes_above_eight_gigabytes_go_through_tarfile(tmp_path):
    path = tmp_path / "a.tar"
    size = 8**11 + 5
    with open(path, "wb") as file:
        entry = tarfile.TarInfo("big.jpg")
        entry.size = size
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + size + (-size % 512) + 1024)  # sparse on disk
    assert scan_tar(str(path)) == [Member("big.jpg", 512, size)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["c", "n" * 120])
def test_every_cut_is_found(tmp_path, form, name):
    if form == "ustar" and len(name) > 100:
        name = "prefix/" + "n" * 90
    entries = [("a.jpg", b"x" * 700), (name + ".txt", b"caption")]
    whole = Path(write_tar(tmp_path / "a.tar", entries, FORMATS[form])).read_bytes()
    end = max(m.offset for m in scan_tar(str(tmp_path / "a.tar"))) + 512
    cut = tmp_path / "cut.tar"
    for length in {*range(0, end, 100), *range(0, end + 1, 512), end + 100}:
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.tar' is (empty|cut short|damaged)"):
            scan_tar(str(cut))


def test_flipped_header_bit_is_found(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.txt", b"y"), ("b.jpg", b"z")])
    data = bytearray(Path(path).read_bytes())
    data[1024 + 3] ^= 1  # in the name of the second member
    Path(path).write_bytes(data)
    with pytest.raises(UserError, match="damaged or cut short"):
        scan_tar(path)


def test_negative_size_is_refused_and_does_not_loop(tmp_path):
    entry = tarfile.TarInfo("a.jpg")
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base-256: -1024
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "a.tar"
    path.write_bytes(tarfile.TarInfo("z.txt").tobuf() + bytes(header) + bytes(1024))
    with pytest.raises(UserError, match="damaged"):
        scan_tar(str(path))


def test_other_files_are_refused(tmp_path):
    for name, data, message in (
        ("zip.tar", b"PK\3\4" * 500, "damaged"),
        ("gz.tar", gzip.compress(bytes(2048)), "compressed; unpack"),
        ("empty.tar", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            scan_tar(str(tmp_path / name))
