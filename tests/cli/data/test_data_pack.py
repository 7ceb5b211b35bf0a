"""``data pack`` as a process: killed and started again, and what it prints."""

import json
import signal

import pytest

from dist_siglip.cli import main
from dist_siglip.cli.data.shards import pack
from dist_siglip.errors import UserError
from tests.support.forked_runs import start
from tests.support.shards import caption, encode, picture

COUNT = 60


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of pictures large enough that packing takes a while."""
    folder = tmp_path_factory.mktemp("pictures")
    data = encode(picture(0, side=700))
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(data)
    lines = [json.dumps({"image": f"{i}.png", "caption": caption(i)}) for i in range(COUNT)]
    (folder / "table.jsonl").write_text("\n".join(lines))
    return folder / "table.jsonl"


def start_packing(table, out, workers):
    words = ["data", "pack", table, out, f"--workers={workers}"]
    words += ["--samples_per_shard=4", "--resize_short_side=40"]
    return start(words, out.with_name("said.txt"))


def shards_of(out):
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


@pytest.mark.faults
def test_killed_and_started_again_the_shards_have_the_same_bytes(table, tmp_path):
    pack(str(table), str(tmp_path / "whole"), samples_per_shard=4, resize_short_side=40)
    out = tmp_path / "out"
    for workers, number in ((1, 3), (2, 9)):
        process = start_packing(table, out, workers)
        goal = out / f"{number:05d}.tar"
        assert process.wait_until(goal.exists), process.said()
        process.signal(signal.SIGKILL)
        assert process.wait() == [-signal.SIGKILL]
        assert number < len(shards_of(out)) < COUNT // 4
    process = start_packing(table, out, 2)
    assert process.wait() == [0], process.said()
    assert "Traceback" not in process.said()
    assert shards_of(out) == shards_of(tmp_path / "whole")
    assert [path.name for path in out.glob(".*")] == [".lock"]


def test_shards_that_were_named_but_not_recorded_are_taken_over(table, tmp_path):
    out = tmp_path / "out"
    pack(str(table), str(out), samples_per_shard=20, resize_short_side=40)
    before = shards_of(out)
    manifest = json.loads((out / "pack.json").read_text())
    nothing = dict.fromkeys(manifest["progress"], 0) | {"finished": False}
    (out / "pack.json").write_text(json.dumps(manifest | {"progress": nothing}))
    pack(str(table), str(out), samples_per_shard=20, resize_short_side=40)
    assert shards_of(out) == before
    assert [path.name for path in out.glob(".*")] == [".lock"]


def test_the_report_as_json_and_as_a_table(table, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = str(tmp_path / "a folder with a name that is longer than a terminal is wide" / "out")
    assert pack(str(table), out, caption_column=["caption"], json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seconds"] > 0
    assert (report["shards"], report["rows"], report["samples"], report["skipped"]) == (
        1,
        60,
        60,
        0,
    )
    assert pack(str(table), out) == 0
    assert f"packed into: {out}\n" in capsys.readouterr().out
    assert pack(str(table), out, caption_column=["caption"], json=True, duplicates=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["shared_pictures"], report["shared_alike"], report["shared_pairs"]) == (60, 0, 0)
    with open(f"{out}/pack_duplicates.jsonl", encoding="utf-8") as file:
        (group,) = map(json.loads, file)
    assert (group["same"], len(group["keys"])) == ("picture", 60)


def test_formats_are_packed_checked_and_counted_if_they_are_named(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i, kind in enumerate(("gif", "bmp", "tiff", "png")):
        (folder / f"{i}.{kind}").write_bytes(encode(picture(i), kind.upper()))
        (folder / f"{i}.txt").write_text(caption(i))
    formats = "--formats=[png, gif, bmp, tiff]"
    assert main(["data", "pack", str(folder), str(out), formats, "--json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 4
    assert main(["data", "check", str(out), formats, "--json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == {}
    assert main(["data", "check", str(out), "--json=true"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"] == {"no picture": 3}
    assert main(["data", "stats", str(out), formats, "--json=true"]) == 0
    kinds = json.loads(capsys.readouterr().out)["formats"]
    assert kinds == {"bmp": 1, "gif": 1, "png": 1, "tiff": 1}
    assert pack(str(folder), str(tmp_path / "fewer")) == 0  # the others are no pictures here


def test_too_many_unreadable_pictures_are_an_error_that_names_the_list(table, tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\nnone.png,a hen\n")
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used, listed in .*_skipped\.jsonl"):
        pack(str(tmp_path / "t.csv"), str(tmp_path / "out"))
