import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyarrow import parquet

from dist_siglip.data.samples.transforms import Preprocessing, evaluation_transform
from dist_siglip.distributed import World
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.embed.shard_job import sample_keys, shard_jobs
from tests.support.embedding import COUNTS, build_tiny, expected_rows, load_rows, table_of
from tests.support.shards import caption, encode, picture, write_shard, write_shards

FP32 = EmbedSettings(dtype="float32", local_batch_size=4, workers=0, device="cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"))


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_rows_are_the_features_of_each_sample_alone(tmp_path, shards, built):
    report = embed_shards(table_of(shards), built, tmp_path, FP32)
    images, texts = expected_rows(built, range(sum(COUNTS)))
    np.testing.assert_allclose(load_rows(tmp_path, "img_emb"), images, atol=1e-6)
    np.testing.assert_allclose(load_rows(tmp_path, "text_emb"), texts, atol=1e-6)
    assert (report.shards, report.kept, report.samples, report.left_out) == (4, 0, 25, 0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_patch_tokens_are_those_of_each_picture_alone(tmp_path, shards, kind):
    model = build_tiny(tmp_path, kind)
    with_tokens = replace(FP32, tokens=True, towers="image")
    embed_shards(table_of(shards), model, tmp_path / "out", with_tokens)
    found = load_rows(tmp_path / "out", "token_emb")
    transform = evaluation_transform(Preprocessing.of(model))
    mean, std = (torch.tensor(each)[:, None, None] for each in (model.mean, model.std))
    for number in range(sum(COUNTS)):
        pixels = (transform(picture(number)) / 255 - mean) / std
        with torch.no_grad():
            expected = model.encoder.eval().encode_patches(pixels[None]).tokens
        assert found[number].shape == expected.shape[1:]
        np.testing.assert_allclose(found[number], expected[0].numpy(), atol=1e-5)
    images, _ = expected_rows(model, range(sum(COUNTS)))
    np.testing.assert_allclose(load_rows(tmp_path / "out", "img_emb"), images, atol=1e-6)


def test_a_tower_without_patch_tokens_is_refused(tmp_path, shards):
    model = build_tiny(tmp_path, "resnet")
    with pytest.raises(UserError, match="gives no patch tokens"):
        embed_shards(table_of(shards), model, tmp_path / "out", replace(FP32, tokens=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["siglip", "hf"])
def test_towers_of_timm_and_of_transformers_give_the_features_of_each_sample(
    tmp_path, shards, kind
):
    model = build_tiny(tmp_path, kind)
    settings = EmbedSettings(dtype="float32", local_batch_size=5, workers=2, device="cpu")
    embed_shards(table_of(shards), model, tmp_path / "out", settings)
    images, texts = expected_rows(model, range(sum(COUNTS)))
    np.testing.assert_allclose(load_rows(tmp_path / "out", "img_emb"), images, atol=1e-6)
    np.testing.assert_allclose(load_rows(tmp_path / "out", "text_emb"), texts, atol=1e-6)


def test_a_full_disk_is_one_line_and_costs_one_shard(tmp_path, shards, built, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    embed_shards(table_of(shards), built, tmp_path, FP32)
    before = files_of(tmp_path)
    (tmp_path / "metadata" / "metadata_3.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=r"cannot be written: No space left.*start again"):
            embed_shards(table_of(shards), built, tmp_path, FP32)
    assert not list(tmp_path.rglob(".*.tmp"))
    embed_shards(table_of(shards), built, tmp_path, FP32)
    assert files_of(tmp_path) == before


def test_a_damaged_file_is_an_error_that_names_it(tmp_path, shards, built):
    embed_shards(table_of(shards), built, tmp_path, FP32)
    (tmp_path / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"metadata_1.parquet is no readable Parquet file; delete"):
        embed_shards(table_of(shards), built, tmp_path, FP32)


def test_metadata_name_every_row(tmp_path, shards, built):
    embed_shards(table_of(shards), built, tmp_path, FP32)
    rows = parquet.read_table(tmp_path / "metadata" / "metadata_2.parquet").to_pylist()
    assert rows[3] == {
        "image_path": "000011",
        "caption": caption(11),
        "shard": "00002.tar",
        "place": 3,
    }
    assert [row["image_path"] for row in rows] == [f"{i:06d}" for i in range(8, 20)]


def test_half_precision_is_what_is_written_by_default(tmp_path, shards, built):
    embed_shards(table_of(shards), built, tmp_path, EmbedSettings(workers=0, device="cpu"))
    images, _ = expected_rows(built, range(sum(COUNTS)))
    rows = load_rows(tmp_path, "img_emb")
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, images, atol=1e-3)


def test_loader_processes_change_nothing(tmp_path, shards, built):
    for workers in (0, 2):
        settings = EmbedSettings(local_batch_size=4, workers=workers, device="cpu")
        embed_shards(table_of(shards), built, tmp_path / str(workers), settings)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_writes_its_own_folder(tmp_path, shards, built, tower):
    settings = EmbedSettings(towers=tower, workers=0, device="cpu")
    embed_shards(table_of(shards), built, tmp_path, settings)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "embed.json",
        "source.json",
        "metadata",
        "img_emb" if tower == "image" else "text_emb",
    }


def test_bad_samples_are_left_out_and_named(tmp_path, built):
    members = [
        (f"{i:06d}", {"png": encode(picture(i)), "txt": caption(i).encode()}) for i in range(6)
    ]
    members[2][1]["png"] = b"no picture"
    members[4][1]["txt"] = b" "
    shard = str(write_shard(tmp_path / "a.tar", members))
    out = tmp_path / "out"
    settings = EmbedSettings(dtype="float32", workers=0, device="cpu", max_bad_fraction=0.5)
    report = embed_shards(table_of([shard]), built, out, settings)
    assert (report.samples, report.left_out) == (6, 2)
    images, texts = expected_rows(built, [0, 1, 3, 5])
    np.testing.assert_allclose(load_rows(out, "img_emb", (6,)), images, atol=1e-6)
    np.testing.assert_allclose(load_rows(out, "text_emb", (6,)), texts, atol=1e-6)
    rows = parquet.read_table(out / "metadata" / "metadata_0.parquet").to_pylist()
    assert [(row["image_path"], row["place"]) for row in rows] == [
        ("000000", 0),
        ("000001", 1),
        ("000003", 3),
        ("000005", 5),
    ]
    lines = (out / "left_out" / "left_out_0.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["shard"], first["key"], first["place"]) == ("a.tar", "000002", 2)
    assert "no JPEG, PNG or WebP" in first["reason"]
    assert (second["key"], second["reason"]) == ("000004", "caption is empty")


def test_incomplete_samples_that_are_skipped_shift_no_key(tmp_path, built):
    members = [
        (f"{i:06d}", {"png": encode(picture(i)), "txt": caption(i).encode()}) for i in range(4)
    ]
    del members[1][1]["png"]
    shard = str(write_shard(tmp_path / "a.tar", members))
    table = table_of([shard], on_damage="skip", max_bad_fraction=0.5)
    report = embed_shards(table, built, tmp_path / "out", FP32)
    assert (report.samples, report.left_out) == (3, 0)
    rows = parquet.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet").to_pylist()
    assert [(row["image_path"], row["place"]) for row in rows] == [
        ("000000", 0),
        ("000002", 1),
        ("000003", 2),
    ]
    images, _ = expected_rows(built, [0, 2, 3])
    np.testing.assert_allclose(load_rows(tmp_path / "out", "img_emb", (4,)), images, atol=1e-6)


def test_a_shard_that_changed_meanwhile_is_an_error(tmp_path, built):
    shards = write_shards(tmp_path / "shards", (3,))
    table = table_of(shards)
    write_shards(tmp_path / "shards", (2,))
    with pytest.raises(UserError, match=r"changed since the start; start again"):
        sample_keys(table, shard_jobs(table)[0])


def test_a_shard_without_rows_has_no_files_and_is_finished(tmp_path, built):
    members = [("a", {"png": b"no picture", "txt": b"a hen"})]
    write_shard(tmp_path / "0.tar", members)
    paths = [str(tmp_path / "0.tar"), *write_shards(tmp_path / "sound", (2,))]
    settings = EmbedSettings(workers=0, device="cpu", max_bad_fraction=0.5)
    for kept in (0, 2):
        report = embed_shards(table_of(paths), built, tmp_path / "out", settings)
        assert (report.kept, report.samples, report.left_out) == (kept, 3, 1)
    names = {path.name for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".jsonl"}
    assert names == {
        "embed.json",
        "source.json",
        "img_emb_1.npy",
        "text_emb_1.npy",
        "metadata_1.parquet",
    }


def test_too_many_bad_samples_are_an_error(tmp_path, built):
    members = [(str(i), {"png": b"no picture", "txt": b"a hen"}) for i in range(3)]
    shard = str(write_shard(tmp_path / "a.tar", members))
    for _ in range(2):  # also when all files are there
        with pytest.raises(UserError, match=r"exceeded: 3 of 3 samples cannot be used, listed in"):
            embed_shards(table_of([shard]), built, tmp_path / "out", FP32)


def test_finished_shards_are_kept(tmp_path, shards, built):
    embed_shards(table_of(shards), built, tmp_path, FP32)
    before = files_of(tmp_path)
    (tmp_path / "metadata" / "metadata_1.parquet").unlink()  # what a killed call leaves
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_2.*")}
    report = embed_shards(table_of(shards), built, tmp_path, FP32)
    assert (report.kept, report.samples) == (3, 25)
    assert files_of(tmp_path) == before
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_2.*")}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_shards_and_write_the_same_files(tmp_path, shards, built, world_size):
    embed_shards(table_of(shards), built, tmp_path / "one", FP32)
    for rank in range(world_size):
        world = World(rank=rank, world_size=world_size)
        report = embed_shards(table_of(shards), built, tmp_path / "many", FP32, world=world)
        assert report.shards == len(COUNTS[rank::world_size])
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")


def test_another_model_needs_another_folder(tmp_path, shards, built):
    embed_shards(table_of(shards), built, tmp_path / "out", FP32)
    other = build_tiny(tmp_path)
    other.encoder.clip.visual.proj.data[0, 0] += 1
    with pytest.raises(
        UserError, match=r"holds other embeddings: image_tower was '\w+' and is '\w+'"
    ):
        embed_shards(table_of(shards), other, tmp_path / "out", FP32)


def test_other_shards_need_another_folder(tmp_path, shards, built):
    embed_shards(table_of(shards), built, tmp_path, FP32)
    with pytest.raises(UserError, match=r"holds other embeddings: shards was"):
        embed_shards(table_of(shards[:2]), built, tmp_path, FP32)


def test_a_folder_of_something_else_is_refused(tmp_path, shards, built):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds 'thesis.tex' and no embed.json"):
        embed_shards(table_of(shards), built, tmp_path, FP32)


def test_numbers_that_are_not_finite_are_an_error(tmp_path, shards):
    broken = build_tiny(tmp_path)
    broken.encoder.clip.visual.proj.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"image tower gives numbers that are not finite"):
        embed_shards(table_of(shards), broken, tmp_path / "out", FP32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_batch_size": 0}, r"local_batch_size \(0\) must be at least 1"),
        ({"tokens": True, "towers": "text"}, r"tokens \(true\) needs .* not text"),
        ({"tokens": True, "format": "parquet"}, r"tokens \(true\) needs format clip-retrieval"),
        ({"tokens": True, "dtype": "int8"}, "tokens .* needs rows of float16 or float32, not int8"),
        ({"workers": -1}, r"workers \(-1\) must be at least 0"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction \(2.0\) must be in \[0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        EmbedSettings(**options)
