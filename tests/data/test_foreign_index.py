import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from dist_siglip.cli import main
from dist_siglip.data.index import read as module
from dist_siglip.data.index.foreign import expected_samples, members_of_idx
from dist_siglip.data.index.read import load_index, read_index
from dist_siglip.data.index.tar_scan import scan_tar
from tests.support.shards import write_shard, write_shards


def write_idx(shard, version="v1.2"):
    """What DALI's wds2idx writes: extension, offset, size and name of each member of a sample."""
    samples = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            words = (extension, member.offset_data, member.size, member.name)
            samples.setdefault(key, []).append(" ".join(map(str, words)))
    path = shard.replace(".tar", ".idx")
    with open(path, "w") as file:
        file.write(f"{version} {len(samples)}\n")
        file.writelines(" ".join(parts) + "\n" for parts in samples.values())
    return path


@pytest.mark.parametrize("mtime", [None, 0])
def test_an_idx_that_agrees_spares_the_scan_and_gives_the_same_index(tmp_path, monkeypatch, mtime):
    options = {} if mtime is None else {"mtime": mtime}
    members = [(f"{i:05d}", {"jpg": b"j" * i, "txt": b"t"}) for i in range(100)]
    shard = str(write_shard(tmp_path / "a.tar", members, **options))
    expected = read_index(shard, rebuild=True)
    os.unlink(f"{shard}.idx.npz")
    write_idx(shard)
    assert members_of_idx(shard) == scan_tar(shard).members
    monkeypatch.setattr(module, "scan_tar", None)  # must not be asked
    assert load_index(shard).digest == expected.digest


def test_gnu_tar_agrees_about_offsets(tmp_path):
    shard = write_shards(tmp_path, (3,))[0]
    done = subprocess.run(
        ["tar", "--list", "--block-num", "--file", shard],
        capture_output=True,
        text=True,
        check=True,
    )
    with tarfile.open(shard) as archive:
        assert len(done.stdout.splitlines()) >= len(archive.getmembers())


def spoil(kind, shard, path):
    lines = Path(path).read_text().splitlines()
    words = lines[1].split()
    if kind == "offset":
        words[1] = str(int(words[1]) + 512)
    elif kind == "size":
        words[2] = str(int(words[2]) - 1)
    elif kind == "name":
        words[3] = "00099.png"
    elif kind == "number":
        words[1] = "x"
    elif kind == "words":
        words.append("more")
    elif kind == "beyond":
        words = lines[-1].split()
        words[1] = str(10**9)
        lines[-1] = " ".join(words)
        words = lines[1].split()
    elif kind == "short":
        del lines[-1]
        lines[0] = f"v1.2 {len(lines) - 1}"
    elif kind == "left out":
        del lines[2]
        lines[0] = f"v1.2 {len(lines) - 1}"
    elif kind == "count":
        lines[0] = "v1.2 9"
    elif kind == "version":
        lines[0] = lines[0].replace("v1.2", "v1.1")
    elif kind == "binary":
        with open(path, "wb") as file:
            file.write(b"v1.2 \xff\xfe")
        return
    lines[1] = " ".join(words)
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")


KINDS = (
    "offset",
    "size",
    "name",
    "number",
    "words",
    "beyond",
    "short",
    "left out",
    "count",
    "version",
    "binary",
)


@pytest.mark.parametrize("mtime", [None, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_an_idx_that_does_not_agree_is_not_believed(tmp_path, kind, mtime):
    members = [(f"{i:06d}", {"png": b"p" * 700, "txt": b"t"}) for i in range(4)]
    options = {} if mtime is None else {"mtime": mtime}
    shard = str(write_shard(tmp_path / "00000.tar", members, **options))
    expected = read_index(shard, rebuild=True)
    os.unlink(f"{shard}.idx.npz")
    spoil(kind, shard, write_idx(shard))
    assert members_of_idx(shard) is None
    assert load_index(shard).digest == expected.digest


def test_an_idx_of_a_shard_that_was_cut_is_not_believed(tmp_path):
    (shard,) = write_shards(tmp_path, (4,))
    write_idx(shard)
    os.truncate(shard, os.path.getsize(shard) // 2)
    assert members_of_idx(shard) is None
    assert read_index(shard).damage


def test_a_count_of_img2dataset_is_compared(tmp_path, caplog, capsys):
    (shard,) = write_shards(tmp_path, (4,))
    stats = tmp_path / "00000_stats.json"
    stats.write_text(json.dumps({"count": 6, "successes": 4}))
    assert expected_samples(shard) == 4
    read_index(shard, rebuild=True)
    assert "img2dataset" not in caplog.text
    stats.write_text(json.dumps({"successes": 5}))
    read_index(shard, rebuild=True)
    assert "holds 4 samples; img2dataset counted 5" in caplog.text
    assert main(["data", "check", shard, "--json=true"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"] == {"damaged shard": 1}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"successes": "4"}', "[" * 5000, '{"successes": -1}']
)
def test_a_count_that_cannot_be_read_is_none(tmp_path, text):
    (shard,) = write_shards(tmp_path, (4,))
    (tmp_path / "00000_stats.json").write_text(text)
    assert expected_samples(shard) is None
