"""Rows of a byte or a bit a column, against plain loops."""

import json

import numpy as np
import pytest
import torch

from dist_siglip.distributed import World
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.embed.quantized import (
    QUANTIZATION_FILE,
    RowCodec,
    find_codecs,
    quantized_recall,
    spread,
)
from dist_siglip.evaluation.embed.reading import read_embeddings
from dist_siglip.evaluation.embed.stored_rows import StoredRows
from tests.support.embedding import COUNTS, build_tiny, expected_rows, load_rows, table_of
from tests.support.shards import write_shards

SETTINGS = {"local_batch_size": 4, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(built):
    return expected_rows(built, range(sum(COUNTS)))


def embed(shards, built, out, world=None, **settings):
    settings = EmbedSettings(**SETTINGS | settings)
    return embed_shards(table_of(shards), built, out, settings, world=world)


def unit_rows(count, dim, seed=0):
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + 0.3
    return torch.nn.functional.normalize(rows, dim=1)


def decoded(dtype, calibration, rows):
    """What codes stand for, one number at a time in float64; and the codes or bits."""
    values, codes = np.zeros(rows.shape), np.zeros(rows.shape, dtype=int)
    for column in range(rows.shape[1]):
        seen = [float(each) for each in calibration[:, column]]
        low, high, mean = min(seen), max(seen), sum(seen) / len(seen)
        distance = sum(abs(each - mean) for each in seen) / len(seen)
        for row in range(rows.shape[0]):
            x = float(rows[row, column])
            if dtype == "int8":
                middle, step = (low + high) / 2, (high - low) / 254
                code = max(-127, min(127, round((x - middle) / step)))
                codes[row, column], values[row, column] = code, middle + step * code
            else:
                codes[row, column] = x > mean
                values[row, column] = mean + distance if x > mean else mean - distance
    return values, codes


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_codes_and_what_they_stand_for_are_those_of_plain_loops(dtype):
    calibration, rows = unit_rows(50, 11), unit_rows(20, 11, seed=1)
    codec = RowCodec.fit(dtype, calibration)
    values, codes = decoded(dtype, calibration, rows)
    found = codec.encode(rows).numpy()
    if dtype == "int8":
        assert found.dtype == np.int8
        assert np.abs(found - codes).max() <= 1  # a value between two codes may go either way
        assert (found == codes).mean() > 0.98
        largest = (codec.scale / 2).max().item() * 1.01
        inside = np.abs(found) < 127
        assert np.abs(codec.decode(found).numpy() - rows.numpy())[inside].max() <= largest
    else:
        assert found.shape == (20, 2)
        assert found.dtype == np.uint8
        assert (found == np.packbits(codes.astype(bool), axis=1)).all()
        np.testing.assert_allclose(codec.decode(found).numpy(), values, atol=1e-6)


def test_a_column_that_never_changes_stays_what_it_is():
    rows = torch.tensor([[0.5, 0.1], [0.5, 0.9]])
    for dtype in ("int8", "binary"):
        codec = RowCodec.fit(dtype, rows)
        assert codec.decode(codec.encode(rows).numpy())[:, 0].tolist() == [0.5, 0.5]


def recall_of_loops(queries, items, others, k, own):
    hits = 0
    for number, (query, other) in enumerate(queries):

        def best(against, asked, number=number):
            scores = [float(np.dot(asked, row)) for row in against]
            order = sorted(range(len(scores)), key=lambda i: -scores[i])
            return [i for i in order if not own or i != number][:k]

        hits += len(set(best(items, query)) & set(best(others, other)))
    return hits / (k * len(queries))


@pytest.mark.parametrize("towers", [("image", "text"), ("image",)])
@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_recall_of_quantised_rows_is_that_of_plain_loops(dtype, towers):
    rows = {tower: unit_rows(40, 12, seed) for seed, tower in enumerate(towers)}
    codecs = {tower: RowCodec.fit(dtype, rows[tower]) for tower in towers}
    found = quantized_recall(rows, codecs)
    source = rows["text" if "text" in rows else "image"].double().numpy()
    items = rows["image"].double().numpy()
    values = codecs["image"].decode(codecs["image"].encode(rows["image"]).numpy()).double().numpy()
    for k in (1, 10):
        pairs = [(query, query) for query in source]
        expected = recall_of_loops(pairs, items, values, k, own="text" not in rows)
        assert found[f"recall@{k}"] == pytest.approx(expected, abs=0.51 / 40)
    assert "recall@100" not in found
    assert (found["rows"], found["queries"]) == (40, 40)
    assert ("hamming_recall@1" in found) == (dtype == "binary")
    if dtype == "int8":
        assert found["recall@10"] > 0.95
    else:  # what the bits alone find is less
        assert found["hamming_recall@10"] < found["recall@10"] < 0.999


@pytest.mark.parametrize("form", ["clip-retrieval", "parquet"])
@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_a_folder_holds_the_codes_of_the_features(tmp_path, shards, built, rows, dtype, form):
    embed(shards, built, tmp_path, dtype=dtype, format=form)
    for tower, features in zip(("image", "text"), rows, strict=True):
        expected = RowCodec.fit(dtype, torch.from_numpy(features))
        stored = StoredRows(tmp_path, tower)
        assert len(stored) == sum(COUNTS)
        codes = np.concatenate(list(stored.code_blocks())).astype(int)
        wanted = expected.encode(torch.from_numpy(features)).numpy().astype(int)
        if dtype == "int8":
            assert np.abs(codes - wanted).max() <= 1
        else:
            assert (codes == wanted).mean() > 0.97
        floats = torch.cat(list(stored.blocks())).numpy()
        assert np.abs(floats - features).mean() < (0.01 if dtype == "int8" else 0.3)
        np.testing.assert_allclose(
            stored.take(np.array([24, 0, 7])).numpy(), floats[[24, 0, 7]], rtol=0
        )
    place = stored.place(8)
    assert place == (2, "00002.tar", "000008", 0, "pair number 8")
    metrics = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert (metrics["dtype"], metrics["rows"]) == (dtype, 25)
    assert 0 < metrics["recall@10"] <= 1


def test_ranks_share_one_calibration_and_a_killed_run_keeps_it(tmp_path, shards, built):
    embed(shards, built, tmp_path / "one", dtype="int8")
    for rank in (1, 0):
        embed(shards, built, tmp_path / "two", World(rank=rank, world_size=2), dtype="int8")
    for name in ("img_emb", "text_emb"):
        one, two = (load_rows(tmp_path / each, name) for each in ("one", "two"))
        assert one.dtype == np.int8
        assert (one == two).all()
    before = (tmp_path / "one" / QUANTIZATION_FILE).read_bytes()
    lost = tmp_path / "one" / "metadata" / "metadata_2.parquet"
    lost.unlink()
    embed(shards, built, tmp_path / "one", dtype="int8")
    assert (tmp_path / "one" / QUANTIZATION_FILE).read_bytes() == before
    assert (load_rows(tmp_path / "one", "img_emb") == load_rows(tmp_path / "two", "img_emb")).all()
    with pytest.raises(UserError, match="dtype was 'int8' and is 'binary'"):
        embed(shards, built, tmp_path / "one", dtype="binary")


def test_a_cut_is_quantised_after_it_is_made(tmp_path, shards, built, rows):
    embed(shards, built, tmp_path, dtype="int8", dim=4, towers="image")
    cut = rows[0][:, :4] / np.linalg.norm(rows[0][:, :4], axis=1, keepdims=True)
    floats = torch.cat(list(StoredRows(tmp_path).blocks())).numpy()
    np.testing.assert_allclose(floats, cut, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8", "format": "features"}, "needs format clip-retrieval or parquet"),
        ({"index": "faiss", "format": "features"}, r"index \(faiss\) needs format"),
        ({"index": "faiss", "towers": "text"}, "towers is text"),
        ({"index_kind": "ivf_pq", "dtype": "binary"}, "must be auto, flat or hnsw"),
        ({"index_kind": "bits", "dtype": "binary"}, "must be auto, flat or hnsw"),
        ({"index_kind": "hnsw"}, r"index_kind \(hnsw\) needs an index; give --index faiss"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        EmbedSettings(**settings)


def test_rows_that_are_not_finite_calibrate_nothing(tmp_path):
    broken = unit_rows(4, 3)
    broken[2, 1] = float("nan")
    with pytest.raises(UserError, match="not finite; use precision 32-true"):
        find_codecs(tmp_path, "int8", ["image"], 3, lambda: {"image": broken}, print)
    with pytest.raises(UserError, match="none can be used"):
        find_codecs(tmp_path, "int8", ["image"], 3, lambda: {"image": torch.empty(0, 3)}, print)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_calibration_is_one_line(tmp_path, shards, built):
    embed(shards, built, tmp_path, dtype="int8")
    with pytest.raises(UserError, match=r"must hold one .* floats"):
        read_embeddings(tmp_path, "image")
    path = tmp_path / QUANTIZATION_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"quantization.safetensors cannot be read \("):
        StoredRows(tmp_path)
    path.write_bytes(whole.replace(b'"int8"', b'"bina"'))
    with pytest.raises(UserError, match="is damaged, or of other rows"):
        StoredRows(tmp_path)


def test_row_numbers_are_spread_exactly_where_single_precision_ends():
    assert spread(2**24 + 4, 2).tolist() == [0, 2**24 + 3]
    assert spread(2**40, 3).tolist() == [0, 2**39, 2**40 - 1]


def test_a_calibration_that_was_killed_leaves_its_recall_when_it_goes_on(
    tmp_path, shards, built, monkeypatch
):
    def killed(*_):
        raise SystemExit

    monkeypatch.setattr("dist_siglip.evaluation.embed.note_metrics", killed)
    with pytest.raises(SystemExit):
        embed(shards, built, tmp_path, dtype="int8")
    monkeypatch.undo()
    embed(shards, built, tmp_path, dtype="int8")
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"]["rows"] == 25


def test_a_calibration_needs_no_hard_links(tmp_path, shards, built, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    embed(shards, built, tmp_path, dtype="int8")
    assert (tmp_path / QUANTIZATION_FILE).exists()
