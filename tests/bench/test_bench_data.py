"""``bench data``: every baseline delivers the same kind of batches, and the table adds up."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from dist_siglip.bench import data as bench_data
from dist_siglip.bench.data import (
    BASELINES,
    Streaming,
    batches,
    write_parquet_copies,
    write_photo_shards,
)
from dist_siglip.cli import main

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # webdataset leaves a shard open
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_photo_shards(tmp_path_factory.mktemp("photos") / "a b", (96, 80), 40, 2)


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_deliver_normalised_pictures_and_tokens(shards, baseline):
    streaming = Streaming(
        shards=tuple(shards), image_size=32, crop_scale=(0.9, 1.0), local_batch_size=8, workers=1
    )
    stream = batches(baseline, streaming)
    images, texts = next(stream)
    stream.close()
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32
    assert -3 < images.min() < 0 < images.max() < 3
    assert texts.shape == (8, 77)
    assert texts.dtype == torch.int64


def test_parquet_copies_hold_the_pairs_of_the_tars(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data, "find_spec", lambda name: None)
    copies = write_parquet_copies(shards, tmp_path)
    assert list(copies) == ["ours, Parquet", "ours, Parquet in snappy"]
    streaming = Streaming(
        shards=tuple(shards),
        image_size=32,
        crop_scale=(0.9, 1.0),
        local_batch_size=8,
        workers=1,
        parquet=copies,
    )
    found = []
    for baseline in ("ours", *copies):
        stream = batches(baseline, streaming)
        found.append(next(stream))
        stream.close()
    for images, texts in found[1:]:
        assert torch.equal(images, found[0][0])
        assert torch.equal(texts, found[0][1])


OPTIONS = (
    "--image_size=32",
    "--local_batch_size=4",
    "--rounds=1",
    "--seconds=0.05",
    "--workers=[1]",
)


def test_the_ratio_is_over_open_clip(shards, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["bench", "data", f"--shards={json.dumps(shards)}", "--json=true", *OPTIONS]) == 0
    rows = json.loads(capsys.readouterr().out)
    paper = rows.pop()
    assert [row["contestant"] for row in rows] == list(BASELINES)
    assert paper["contestant"] == "ours, 8 ranks on paper"
    assert paper["workers"] == 64
    assert paper["images_per_second"] == pytest.approx(64 * rows[1]["images_per_second"])
    theirs = rows[0]["images_per_second"]
    assert theirs > 0
    for row in rows:
        assert row["ratio"] == pytest.approx(row["images_per_second"] / theirs)
    assert main(["bench", "data", f"--shards={json.dumps(shards)}", *OPTIONS]) == 0
    assert "images/s of training loaders" in capsys.readouterr().out


def test_without_loader_processes_seconds_are_of_the_processor(shards, capsys, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(bench_data, "time", SimpleNamespace(process_time=lambda: next(ticks) / 8))
    options = [*OPTIONS[:-2], "--seconds=0.5", "--workers=[0]", "--json=true"]
    assert main(["bench", "data", f"--shards={json.dumps(shards)}", *options]) == 0
    *rows, paper = json.loads(capsys.readouterr().out)
    assert [row["images_per_second"] for row in rows] == [24.0] * 3  # batches of 4 at 3 of 8 ticks
    assert paper["images_per_second"] == 64 * 24.0


def test_one_thread_computes_while_it_is_timed_and_as_many_as_before_after(
    shards, capsys, monkeypatch
):
    seen = []

    def count_threads(*arguments):
        seen.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(bench_data, "_images_per_second", count_threads)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["bench", "data", f"--shards={json.dumps(shards)}", *OPTIONS]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--ranks=0", "ranks (0) must be at least 1"),
        ("--rounds=0", "rounds (0) must be at least 1"),
        ("--seconds=0", "seconds (0.0) must be in (0, 1000000]"),
        ("--workers=[]", "workers ([]) must be one number or more, each at least 0"),
        ("--pictures=3", "pictures (3) must be at least two batches"),
        ("--shards=none.tar", "names a missing file"),
        ("--workers=[3]", "shards (2) must be at least one for each of 3 loader processes"),
    ],
)
def test_settings_that_cannot_work_are_one_line(shards, capsys, option, message):
    arguments = [f"--shards={json.dumps(shards)}", *OPTIONS, option]
    assert main(["bench", "data", *arguments]) == 2
    assert message in capsys.readouterr().err
