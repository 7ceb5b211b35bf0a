"""Indexes of faiss, against an exact search in plain loops."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.embed.nearest_index import (
    NearestIndex,
    build_index,
    exact_nearest,
    read_metrics,
    rescore,
)
from dist_siglip.evaluation.embed.stored_rows import StoredRows
from tests.support.embedding import COUNTS, build_tiny, table_of
from tests.support.shards import write_shards

NUM_ROWS, DIM = 2000, 16


def write_folder(folder, dtype="float16", count=NUM_ROWS):
    """A folder as ``embed`` leaves it, with rows in clusters, of two shards."""
    from safetensors.torch import save_file

    from dist_siglip.evaluation.embed.quantized import RowCodec

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, DIM, generator=generator)
    rows = {}
    for tower in ("image", "text"):
        noise = 0.5 * torch.randn(count, DIM, generator=generator)
        rows[tower] = torch.nn.functional.normalize(
            centres[torch.arange(count) % 40] + noise, dim=1
        )
    folder.mkdir(parents=True)
    settings = {"format": "clip-retrieval", "towers": "both", "dtype": dtype}
    (folder / "embed.json").write_text(json.dumps(settings))
    source = {"shards": ["a.tar", "b.tar"], "samples": [count // 3, count - count // 3]}
    (folder / "source.json").write_text(json.dumps(source))
    tensors = {}
    for tower, name in (("image", "img_emb"), ("text", "text_emb")):
        stored = rows[tower].half().numpy() if dtype == "float16" else rows[tower].numpy()
        if dtype in ("int8", "binary"):
            codec = RowCodec.fit(dtype, rows[tower])
            tensors |= {f"{tower}_offset": codec.offset, f"{tower}_scale": codec.scale}
            stored = codec.encode(rows[tower]).numpy()
        for number, part in enumerate(np.split(stored, [count // 3])):
            (folder / name).mkdir(exist_ok=True)
            np.save(folder / name / f"{name}_{number}.npy", part)
            (folder / "metadata").mkdir(exist_ok=True)
            (folder / "metadata" / f"metadata_{number}.parquet").touch()
    if tensors:
        save_file(tensors, folder / "quantization.safetensors", metadata={"dtype": dtype})
    return rows


def test_an_exact_search_is_that_of_plain_loops_over_all_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_siglip.evaluation.embed.stored_rows.BLOCK_ROWS", 77)
    rows = write_folder(tmp_path / "e", "float32", 300)
    stored = StoredRows(tmp_path / "e")
    queries = rows["text"][:5]
    scores, numbers = exact_nearest(stored, queries, 7)
    for query, best, found in zip(queries, scores, numbers, strict=True):
        products = [float(query.double() @ row.double()) for row in rows["image"]]
        order = sorted(range(300), key=lambda i: -products[i])[:7]
        assert found.tolist() == order
        assert best.tolist() == pytest.approx([products[i] for i in order], abs=1e-6)
    best, found = rescore(stored, queries[0], np.array([5, -1, 9, 5, 2]), 9)
    assert sorted(found.tolist()) == [2, 5, 9]
    assert best.tolist() == sorted(best.tolist(), reverse=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "binary"])
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_pq", "bits"])
def test_what_an_index_finds_is_measured_against_all_rows(tmp_path, kind, dtype):
    pytest.importorskip("faiss", reason="faiss is not installed")
    folder = tmp_path / "e"
    write_folder(folder, dtype)
    if kind in ("ivf_pq", "bits") and dtype == "binary":
        with pytest.raises(UserError, match=rf"index_kind \({kind}\) must be flat or hnsw"):
            build_index(folder, kind)
        return
    build_index(folder, kind)
    metrics = json.loads((folder / "metrics.json").read_text())["index"]
    assert (metrics["kind"], metrics["rows"], metrics["query_tower"]) == (kind, NUM_ROWS, "text")
    assert metrics["bytes"] == (folder / "index" / "index.faiss").stat().st_size
    stored = StoredRows(folder)
    index = NearestIndex.read(stored)
    # recall@10 after scoring again, once more in plain words.
    chosen = np.linspace(0, NUM_ROWS - 1, 256).round().astype(int)
    texts = StoredRows(folder, "text").take(chosen)
    everything = torch.cat(list(stored.blocks())).double().numpy()
    hits = 0
    for text in texts:
        order = np.argsort(-(everything @ text.double().numpy()), kind="stable")[:10]
        listed = index.shortlist(text[None], 100)
        hits += len(set(order) & set(rescore(stored, text, listed[0], 10)[1].tolist()))
    assert metrics["recall@10"] == pytest.approx(
        hits / 2560, abs=0.002 if dtype != "binary" else 0.01
    )
    least = {"flat": 0.999, "hnsw": 0.97, "ivf_pq": 0.6, "bits": 0.6}[kind]
    assert metrics["recall@10"] > (0.6 if dtype == "binary" else least)
    assert metrics["recall@10"] >= metrics["unscored_recall@10"] - 0.001
    if kind in ("ivf_pq", "bits") or dtype == "binary":  # scoring again is what it is for
        assert metrics["recall@10"] > metrics["unscored_recall@10"] + 0.05
    # Of binary rows many have equal scores, of which either may count.
    before = (folder / "index" / "index.faiss").stat().st_mtime_ns
    build_index(folder, kind)
    assert (folder / "index" / "index.faiss").stat().st_mtime_ns == before


def test_small_and_damaged_indexes_are_one_line(tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    folder = tmp_path / "e"
    write_folder(folder, "float16", 60)
    with pytest.raises(UserError, match="trained on at least 1,024 rows, and there are 60"):
        build_index(folder, "ivf_pq")
    build_index(folder, "auto")
    assert json.loads((folder / "index" / "index.json").read_text())["kind"] == "flat"
    file = folder / "index" / "index.faiss"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"garbage" * 50):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"index.faiss cannot be read \(it is damaged\); build"):
            NearestIndex.read(StoredRows(folder))
    other = tmp_path / "other"
    write_folder(other, "float16", 50)
    build_index(other, "flat")
    file.write_bytes((other / "index" / "index.faiss").read_bytes())
    with pytest.raises(UserError, match="holds 50 rows of width 16, not the 60"):
        NearestIndex.read(StoredRows(folder))


def test_an_index_of_other_rows_is_refused_and_built_anew(tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    mine, other = tmp_path / "e", tmp_path / "other"
    write_folder(mine, "float16", 60)
    write_folder(other, "float16", 60)
    stated = json.loads((other / "embed.json").read_text())
    (other / "embed.json").write_text(json.dumps(stated | {"image_tower": "another"}))
    build_index(other, "flat")
    shutil.copytree(other / "index", mine / "index")
    with pytest.raises(UserError, match=r"index.json is not of the rows beside it; build it anew"):
        NearestIndex.read(StoredRows(mine))
    build_index(mine, "flat")
    assert NearestIndex.read(StoredRows(mine)).kind == "flat"
    facts = json.loads((mine / "index" / "index.json").read_text())
    (mine / "index" / "index.json").write_text(json.dumps(facts | {"kind": "[red]flat"}))
    with pytest.raises(UserError, match=r"index.json is not of the rows beside it; build it anew"):
        NearestIndex.read(StoredRows(mine))


def test_what_a_killed_process_left_of_an_index_is_removed(tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    write_folder(tmp_path / "e", "float16", 60)
    (tmp_path / "e" / "index").mkdir()
    left = tmp_path / "e" / "index" / ".index.faiss.0123.tmp"
    left.write_bytes(b"half an index")
    build_index(tmp_path / "e", "flat")
    assert not left.exists()


def test_figures_that_are_none_are_passed_over(tmp_path):
    sound = {"dtype": "int8", "rows": 9, "queries": 3, "query_tower": "text", "recall@1": 1.0}
    content = {
        "rows": sound,
        "index": sound | {"recall@1": "many"},
        "a": 3,
        "b": sound | {"queries": None},
        "c": {"recall@1": 1.0},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert read_metrics(tmp_path) == {"rows": sound}


def test_an_index_opens_no_file_outside_of_its_folder(tmp_path):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    folder = tmp_path / "e"
    write_folder(folder, "float32", 60)
    build_index(folder, "flat")
    rows = StoredRows(folder)
    flat = faiss.IndexFlatIP(16)
    other = faiss.IndexIVFFlat(flat, 16, 2, faiss.METRIC_INNER_PRODUCT)
    vectors = np.concatenate([block.numpy() for block in rows.blocks()])
    other.train(vectors)
    lists = faiss.OnDiskInvertedLists(2, other.code_size, str(tmp_path / "cells"))
    other.replace_invlists(lists)
    other.add(vectors)
    file = folder / "index" / "index.faiss"
    faiss.write_index(other, str(file))
    with pytest.raises(UserError, match=r"index.faiss cannot be read"):
        NearestIndex.read(rows)
    assert faiss.read_index(str(file)).ntotal == 60  # faiss alone would open it


def test_rows_that_a_hostile_index_names_beside_those_there_are_passed_over(tmp_path):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    folder = tmp_path / "e"
    write_folder(folder, "float32", 60)
    build_index(folder, "flat")
    rows = StoredRows(folder)
    flat = faiss.read_index(str(folder / "index" / "index.faiss"))
    other = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    numbers = np.arange(60, dtype=np.int64)
    numbers[1::2] = 10**12
    other.add_with_ids(flat.reconstruct_n(0, 60), numbers)
    faiss.write_index(other, str(folder / "index" / "index.faiss"))
    listed = NearestIndex.read(rows).shortlist(rows.take(np.arange(3)), 60)
    assert {number for row in listed.tolist() for number in row} == {-1, *range(0, 60, 2)}


def test_without_faiss_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    shards = write_shards(tmp_path / "shards", (3,))
    settings = EmbedSettings(workers=0, device="cpu", index="faiss")
    with pytest.raises(UserError, match=r'pip install "dist-siglip\[search\]"$'):
        embed_shards(table_of(shards), build_tiny(tmp_path), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    write_folder(tmp_path / "e", count=30)
    (tmp_path / "e" / "index").mkdir()
    (tmp_path / "e" / "index" / "index.json").write_text('{"kind": "flat"}')
    with pytest.raises(UserError, match="search without the index: --exact true"):
        NearestIndex.read(StoredRows(tmp_path / "e"))


def test_embed_builds_the_index_when_all_shards_are_there(tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    from dist_siglip.distributed import World

    shards, built = write_shards(tmp_path / "shards", COUNTS), build_tiny(tmp_path)
    options = {"workers": 0, "device": "cpu", "towers": "image"}
    out = tmp_path / "out"
    for rank, is_there in ((0, False), (1, True)):
        embed_shards(
            table_of(shards),
            built,
            out,
            EmbedSettings(**options, index="faiss"),
            world=World(rank=rank, world_size=2),
        )
        assert (out / "index" / "index.faiss").exists() == is_there
    metrics = json.loads((out / "metrics.json").read_text())["index"]
    assert (metrics["query_tower"], metrics["recall@1"]) == ("image", 1.0)
    # Another kind later, of the same rows.
    embed_shards(
        table_of(shards), built, out, EmbedSettings(**options, index="faiss", index_kind="hnsw")
    )
    assert json.loads((out / "metrics.json").read_text())["index"]["kind"] == "hnsw"


def test_an_index_waits_for_the_process_that_joins_the_parts(tmp_path, monkeypatch):
    """The parts of another process may appear after this one looked for them."""
    pytest.importorskip("faiss", reason="faiss is not installed")
    from dist_siglip.distributed import World
    from dist_siglip.evaluation.embed.parquet_layouts import SingleFileLayout

    shards, built = write_shards(tmp_path / "shards", (3, 4)), build_tiny(tmp_path)
    settings = EmbedSettings(workers=0, device="cpu", format="parquet", index="faiss")

    def embed(rank):
        world = World(rank=rank, world_size=2)
        embed_shards(table_of(shards), built, tmp_path / "out", settings, world=world)

    finish = SingleFileLayout.finish

    def killed(_):
        raise SystemExit

    def finish_and_see_other_parts(layout):
        finish(layout)
        monkeypatch.setattr(SingleFileLayout, "finish", killed)
        with pytest.raises(SystemExit):  # before it has joined them
            embed(1)
        monkeypatch.setattr(SingleFileLayout, "finish", finish)

    monkeypatch.setattr(SingleFileLayout, "finish", finish_and_see_other_parts)
    embed(0)
    assert not (tmp_path / "out" / "index").exists()
    embed(1)
    assert (tmp_path / "out" / "index" / "index.faiss").exists()


def lose_second_shard(folder, skipped):
    """As a call leaves it that ended after it named the bad samples of a shard."""
    (folder / "metadata" / "metadata_1.parquet").unlink()
    (folder / "left_out").mkdir()
    (folder / "left_out" / "left_out_1.jsonl").write_text("{}\n" * skipped)


def test_a_shard_of_which_no_sample_can_be_used_is_not_missing(tmp_path):
    write_folder(tmp_path / "e", count=60)
    lose_second_shard(tmp_path / "e", 40)
    assert len(StoredRows(tmp_path / "e")) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: (at / "embed.json").unlink(), "has no readable embed.json"),
        (lambda at: (at / "source.json").write_text("[]"), "is damaged: it holds no settings"),
        (lambda at: (at / "source.json").write_text('{"shards": "a"}'), "no list of texts"),
        (lambda at: (at / "source.json").write_text('{"shards": ["a"]}'), "source.json is damaged"),
        (lambda at: (at / "metadata" / "metadata_1.parquet").unlink(), "1 of 2 shards are missing"),
        (lambda at: lose_second_shard(at, 39), "1 of 2 shards are missing"),
        (lambda at: (at / "img_emb" / "img_emb_0.npy").write_bytes(b"PK"), "no readable .npy file"),
        (
            lambda at: np.save(
                at / "img_emb" / "img_emb_0.npy", np.array([[{}]]), allow_pickle=True
            ),
            "no readable .npy file",
        ),
        (
            lambda at: np.save(at / "img_emb" / "img_emb_0.npy", np.ones((20, 3), np.float16)),
            "of width",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_one_line(tmp_path, change, message):
    write_folder(tmp_path / "e", count=60)
    change(tmp_path / "e")
    with pytest.raises(UserError, match=message):
        StoredRows(tmp_path / "e")


def test_more_shards_than_files_may_be_open_are_searched(tmp_path):
    folder, count = tmp_path / "e", 400
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    settings = {"format": "clip-retrieval", "towers": "image", "dtype": "float32"}
    (folder / "embed.json").write_text(json.dumps(settings))
    source = {"shards": [f"{n}.tar" for n in range(count)], "samples": [2] * count}
    (folder / "source.json").write_text(json.dumps(source))
    for number in range(count):
        rows = np.full((2, 3), number, np.float32)
        np.save(folder / "img_emb" / f"img_emb_{number:03d}.npy", rows)
        (folder / "metadata" / f"metadata_{number:03d}.parquet").touch()
    before = len(os.listdir("/proc/self/fd"))
    stored = StoredRows(folder)
    numbers = np.arange(2 * count)[::-1].copy()
    assert (stored.take(numbers)[:, 0].numpy() == numbers // 2).all()
    assert torch.cat(list(stored.blocks()))[:, 2].tolist() == [n // 2 for n in range(2 * count)]
    assert len(os.listdir("/proc/self/fd")) < before + 200


def test_without_pyarrow_a_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "dist_siglip.evaluation.embed.parquet_layouts", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write_folder(tmp_path / "e", count=30)
    with pytest.raises(UserError, match=r'needs pyarrow .*pip install "dist-siglip\[search\]"'):
        StoredRows(tmp_path / "e").place(3)
    stated = json.loads((tmp_path / "e" / "embed.json").read_text())
    (tmp_path / "e" / "embed.json").write_text(json.dumps(stated | {"format": "parquet"}))
    (tmp_path / "e" / "embeddings.parquet").touch()
    with pytest.raises(UserError, match=r'needs pyarrow .*pip install "dist-siglip\[search\]"'):
        StoredRows(tmp_path / "e")
