import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

import pytest

from dist_siglip.data.index import tar_scan
from dist_siglip.data.index.tar_scan import DamagedTarError, Member, scan_tar
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
    return [(m.name, data[m.offset : m.offset + m.size]) for m in scan_tar(path).members]


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
    assert scan_tar(str(path)).members == [Member("big.jpg", 512, size)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["c", "n" * 120])
def test_every_cut_is_found(tmp_path, form, name):
    if form == "ustar" and len(name) > 100:
        name = "prefix/" + "n" * 90
    entries = [("a.jpg", b"x" * 700), (name + ".txt", b"caption")]
    whole = Path(write_tar(tmp_path / "a.tar", entries, FORMATS[form])).read_bytes()
    first, last = scan_tar(str(tmp_path / "a.tar")).members
    end_of_first, cut = first.offset + 1024, tmp_path / "cut.tar"
    for length in {*range(0, last.offset + 512, 100), *range(0, last.offset + 1, 512)}:
        cut.write_bytes(whole[:length])
        if length == end_of_first:
            assert_unfinished(cut, entries[:1])
        else:
            with pytest.raises(UserError, match=r"cut\.tar' is (empty|cut short|damaged)"):
                scan_tar(str(cut))
    for length in (last.offset + 512, last.offset + 600):
        cut.write_bytes(whole[:length])
        assert_unfinished(cut, entries)


def assert_unfinished(path, entries):
    found = scan_tar(str(path))
    assert contents(path) == entries
    assert not found.has_end
    assert "has no end marker, as if its writer was interrupted" in found.note


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["a", "n" * 90])
def test_archives_behind_one_another_are_read_on(tmp_path, form, name):
    entries = [(f"{part}{name}{i}.txt", b"%d" % i) for part in "xyz" for i in range(3)]
    parts = [
        Path(write_tar(tmp_path / "p.tar", entries[i : i + 3], FORMATS[form])).read_bytes()
        for i in (0, 3, 6)
    ]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(parts[0] + parts[1] + bytes(3 << 20) + parts[2])
    assert contents(joined) == entries
    assert "holds 3 archives, one behind the other" in scan_tar(str(joined)).note
    joined.write_bytes(parts[0] + parts[1] + parts[1][:-9000])  # the last one is cut
    with pytest.raises(DamagedTarError, match="cut short") as info:
        scan_tar(str(joined))
    assert [member.name for member in info.value.members[:6]] == [n for n, _ in entries[:6]]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shift", [0, 1, 512])
def test_bytes_behind_the_end_are_damage(tmp_path, form, shift):
    entries = (
        [("a" * 110 + ".jpg", b"x"), ("a.txt", b"y")] if form != "ustar" else [("a.txt", b"y")]
    )
    path = tmp_path / "a.tar"
    write_tar(path, entries, FORMATS[form])
    with path.open("ab") as file:
        file.write(bytes(shift) + b"\1" + os.urandom(4999))
    with pytest.raises(DamagedTarError, match="5000 bytes behind its end are no member") as info:
        scan_tar(str(path))
    assert [member.name for member in info.value.members] == [name for name, _ in entries]


@pytest.mark.parametrize("zeros", [0, 512, 10_240, 5 << 20])
def test_zeros_behind_the_end_are_normal_and_cheap(tmp_path, monkeypatch, zeros):
    path = tmp_path / "a.tar"
    write_tar(path, [("a.txt", b"y")])
    with path.open("ab") as file:
        file.write(bytes(zeros))
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: read.append(n) or pread(fd, n, at))
    assert scan_tar(str(path)).note == ""
    assert len(read) <= 4 + zeros / (1 << 20)
    with path.open("r+b") as file:
        file.truncate(1 << 34)  # a hole
    assert scan_tar(str(path)).note == ""


def test_members_that_are_no_plain_files_are_counted_with_the_remedy(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            archive.add(tmp_path / name, name)
    found = scan_tar(str(tmp_path / "a.tar"))
    assert [member.name for member in found.members] == ["a.jpg"]
    assert "a member that is no plain file" in found.note
    assert "'b.jpg' (a hard link to 'a.jpg')" in found.note
    assert "--hard-dereference" in found.note


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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\3\4" * 500, "is a zip archive"),
        (gzip.compress(bytes(2048)), r"compressed \(gzip\); write it unpacked: zcat"),
        (bz2.compress(bytes(2048)), r"compressed \(bzip2\).*: bzcat"),
        (lzma.compress(bytes(2048)), r"compressed \(xz\).*: xzcat"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), r"compressed \(zstd\).*: zstdcat"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"", "empty"),
        (b"not a tar" * 500, "damaged or cut short"),
    ],
    ids=["zip", "gzip", "bzip2", "xz", "zstd", "git lfs", "empty", "other"],
)
def test_other_files_are_called_what_they_are(tmp_path, data, message):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        scan_tar(str(tmp_path / "a.tar"))


def test_a_member_named_like_a_compressed_file_is_a_member(tmp_path):
    entries = [("BZhang.jpg", b"1"), ("PK\3\4.txt", b"2")]
    assert contents(write_tar(tmp_path / "a.tar", entries)) == entries
