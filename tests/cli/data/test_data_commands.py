"""``data index``, ``check``, ``stats`` and ``plan`` on small shards, sound and damaged."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import webdataset

from dist_siglip.cli import main
from tests.support.shards import (
    UNEVEN,
    caption,
    encode,
    jpeg,
    load_index,
    photo,
    picture,
    write_shard,
    write_shards,
)
from tests.support.tiny_models import ARCHITECTURES, write_config

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def run(capsys, *arguments):
    """Exit code and parsed JSON of a command."""
    code = main(["data", *arguments, "--json=true"])
    return code, json.loads(capsys.readouterr().out)


def as_list(shards):
    return json.dumps([str(shard) for shard in shards])


def test_index_leaves_side_cars_and_counts(capsys, tmp_path):
    shards = write_shards(tmp_path / "shards")
    code, found = run(capsys, "index", as_list(shards))
    assert code == 0
    assert (found["shards"], found["samples"], found["members"]) == (6, 37, 74)
    assert all(os.path.exists(f"{shard}.idx.npz") for shard in shards)
    assert main(["data", "index", as_list(shards)]) == 0
    assert "37" in capsys.readouterr().out


def test_index_names_damaged_shards_and_goes_on(capsys, tmp_path):
    shards = write_shards(tmp_path / "shards")
    os.truncate(shards[2], 3000)
    code, found = run(capsys, "index", as_list(shards))
    assert code == 1
    (problem,) = found["damaged"]
    assert "00002.tar' is cut short" in problem
    assert os.path.exists(f"{shards[3]}.idx.npz")


def test_ranks_share_the_shards_to_index(capsys, tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards")
    counts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        counts.append(run(capsys, "index", as_list(shards))[1]["samples"])
    assert counts == [sum(UNEVEN[0::2]), sum(UNEVEN[1::2])]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the file open
@pytest.mark.parametrize("headers", ["pax", "ustar"])
def test_index_finds_the_keys_that_webdataset_finds(tmp_path, headers):
    options = {} if headers == "pax" else {"mtime": 0}
    members = [
        (f"folder.x/{i:04d}", {"jpg": b"j" * i, "txt": caption(i).encode()}) for i in range(200)
    ]
    shard = str(write_shard(tmp_path / "a.tar", members, **options))
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(shard, shardshuffle=False)]
    assert load_index(shard).keys() == theirs


def write_damaged(folder):
    """A shard with one of everything that `data check` looks for, and two damaged ones."""
    good = {"png": encode(picture(0)), "txt": b"a fox"}
    members = [
        ("sound", good),
        ("no-picture", {"txt": b"a"}),
        ("no-caption", {"png": encode(picture(1))}),
        ("junk", {"png": b"junk", "txt": b"a"}),
        ("cut", {"jpg": jpeg(photo(60, 40))[:-400], "txt": b"a"}),
        ("bomb", {"png": encode(picture(1, side=400)), "txt": b"a"}),
        ("empty", {"png": encode(picture(2)), "txt": b" "}),
        ("latin", {"png": encode(picture(2)), "txt": b"caf\xe9"}),
        ("wrong", {"jpg": encode(picture(3)), "txt": b"a"}),
        ("code", {**good, "pkl": b"cos\nsystem\n"}),
        ("../../escape", good),
    ]
    shard = write_shard(folder / "a.tar", members)
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        absolute = tarfile.TarInfo("/absolute.txt")
        absolute.size = 1
        archive.addfile(absolute, io.BytesIO(b"a"))
    (folder / "b.tar").write_bytes(b"")
    cut = write_shard(folder / "c.tar", [("sound", good), ("more", good)])
    os.truncate(cut, os.path.getsize(cut) - 11_000)
    return folder


EXPECTED = {
    "damaged shard": 2,
    "unusual shard": 1,  # that with the link
    "no picture": 2,  # "/absolute" has a caption only
    "no caption": 2,  # the shard that is cut ends with a picture
    "bad picture": 3,
    "bad caption": 2,
    "key in several shards": 1,
    "extension of another format": 1,
    "path outside": 3,
    "link or device": 1,
    "code": 1,
}


def test_check_finds_everything_and_ends_with_one(capsys, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_damaged(folder)
    out = tmp_path / "findings.jsonl"
    options = ("--max_image_pixels=10000", f"--out={out}")
    code, found = run(capsys, "check", str(folder), *options)
    assert code == 1
    assert found["damaged"]
    assert found["findings"] == EXPECTED
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(line["kind"], line["key"]) for line in lines} >= {
        ("bad picture", "bomb"),
        ("bad picture", "cut"),
        ("bad caption", "latin"),
        ("link or device", "link.png"),
        ("code", "code.pkl"),
        ("path outside", "../../escape.png"),
    }
    assert main(["data", "check", str(folder), "--max_image_pixels=10000"]) == 1
    shown = capsys.readouterr().out
    assert "400 x 400 pixels, at most 10000" in shown
    assert "replaced by another sample" in shown


def test_a_remote_shard_out_of_reach_does_not_lose_the_report(capsys, tmp_path):
    shards = [*write_shards(tmp_path / "shards"), "http://127.0.0.1:9/none.tar"]
    once = ("--cache.attempts=1", "--cache.patience_seconds=0")
    code, found = run(capsys, "check", as_list(shards), *once)
    assert (code, found["samples"], found["findings"]) == (75, 37, {"unreachable shard": 1})
    code, found = run(capsys, "index", as_list(shards), *once)
    assert (code, found["samples"], found["damaged"]) == (75, 37, [])
    assert "none.tar cannot be fetched" in found["unreachable"][0]


def test_check_of_sound_shards_ends_with_nought(capsys, tmp_path):
    shards = write_shards(tmp_path / "shards")
    code, found = run(capsys, "check", as_list(shards), "--workers=3")
    assert (code, found["findings"], found["samples"]) == (0, {}, 37)
    assert main(["data", "check", as_list(shards)]) == 0
    assert "nothing" in capsys.readouterr().out


def test_headers_alone_miss_what_only_decoding_finds(capsys, tmp_path):
    shard = write_shard(
        tmp_path / "a.tar", [("k", {"jpg": jpeg(photo(60, 40))[:-400], "txt": b"a"})]
    )
    assert run(capsys, "check", str(shard))[0] == 1
    assert run(capsys, "check", str(shard), "--decode=false")[0] == 0


def test_stats_measure_sizes_captions_and_duplicates(capsys, tmp_path):
    sizes = [(40, 20), (60, 30), (30, 60), (40, 20)]
    members = [
        (
            str(i),
            {
                "jpg": jpeg(photo(*size, seed=i % 3)),
                "txt": ["a", "bb", "cccc", "a"][i].encode(),
            },
        )
        for i, size in enumerate(sizes)
    ]
    shard = write_shard(tmp_path / "a.tar", members)
    code, found = run(capsys, "stats", str(shard))
    assert code == 0
    quantiles = found["quantiles"]
    assert (quantiles["width"][0], quantiles["width"][-1]) == (30, 60)
    assert quantiles["short_side"][3] == np.median([20, 30, 30, 20])
    assert quantiles["aspect_ratio"][0] == 0.5
    assert quantiles["caption_characters"][-1] == 4
    assert found["formats"] == {"jpeg": 4}
    assert found["captions"] == {"distinct": 3, "shared": 2, "most": 2}
    assert found["pictures"] == {"distinct": 3, "shared": 2, "most": 2}
    assert main(["data", "stats", str(shard)]) == 0
    assert "3 distinct; 2 samples share" in capsys.readouterr().out


def test_stats_with_a_model_compare_tokens(capsys, tmp_path):
    texts = ["A red fox.", "a red fox", "...", "a hen", "A Hen!", "-"]
    members = [
        (f"{i}", {"png": encode(picture(i)), "txt": text.encode()}) for i, text in enumerate(texts)
    ]
    shard = str(write_shard(tmp_path / "a.tar", members))
    text_config = {
        **ARCHITECTURES["siglip"]["text_cfg"],
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    model = write_config(tmp_path / "m.json", {**ARCHITECTURES["siglip"], "text_cfg": text_config})
    _, found = run(capsys, "stats", shard)
    assert (found["samples"], found["empty_captions"]) == (6, 0)
    assert found["captions"] == {"distinct": 6, "shared": 0, "most": 1}
    _, found = run(capsys, "stats", shard, f"--model={model}")
    assert (found["samples"], found["bad"], found["empty_captions"]) == (4, 2, 2)
    assert found["captions"] == {"distinct": 2, "shared": 4, "most": 2}


def test_stats_of_a_random_part(capsys, tmp_path):
    shards = write_shards(tmp_path / "shards")
    code, found = run(capsys, "stats", as_list(shards), "--sample=10", "--workers=2")
    assert (code, found["samples"], found["of_samples"]) == (0, 10, 37)


def test_plan_shows_the_slices_that_training_takes(capsys, tmp_path):
    shards = write_shards(tmp_path / "shards")
    options = ("--world_size=2", "--global_batch_size=8", "--block_shards=2", "--seed=3")
    code, found = run(capsys, "plan", as_list(shards), *options, "--steps=4")
    assert code == 0
    assert (found["batches_per_epoch"], found["left_out_per_epoch"]) == (4, 5)
    assert found["local_batch_size"] == 4
    from dist_siglip.data.order.sequence import epoch_order

    order = epoch_order(3, 0, UNEVEN, 2)
    assert found["ranks"][1]["first_sample_ids"] == [*order[4:8], *order[12:16]]
    assert sum(row["samples"] for row in found["ranks"]) == 32
    assert main(["data", "plan", as_list(shards), *options]) == 0
    assert "4 batches an epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "{shards}", "--world_size=3", "--global_batch_size=8"], "must be divisible by"),
        (["plan", "{shards}", "--steps=0"], "steps (0) must be at least 1"),
        (["plan", "{shards}", "--global_batch_size=64"], "at most the number of training samples"),
        (["check", "{shards}/none.tar"], "names a missing file"),
        (["check", "{shards}", "--workers=0"], "workers (0) must be at least 1"),
        (["stats", "{shards}", "--sample=0"], "sample (0) must be at least 1"),
        (["index", "pipe:cat x"], "not a path on this machine"),
        (["order", "{shards}"], "must be one of index, check, stats, plan, pack"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(capsys, tmp_path, arguments, message):
    write_shards(tmp_path / "shards")
    folder = str(tmp_path / "shards")
    assert main(["data", *(a.replace("{shards}", folder) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
