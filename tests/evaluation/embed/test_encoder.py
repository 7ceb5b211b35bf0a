import numpy as np
import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.encoding import ShardEncoder, choose_device
from dist_siglip.evaluation.samples import ShardBatch
from tests.support.embedding import COUNTS, build_tiny, expected_rows, load_rows, table_of
from tests.support.shards import write_shards


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"))


def encode(built, precision="32-true", towers="both", dtype="float32", size=3):
    torch.manual_seed(1)
    encoder = ShardEncoder(
        built, towers=towers, dtype=dtype, device=torch.device("cpu"), precision=precision
    )
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
    texts = built.tokenizer(["a hen"] * size)
    batch = ShardBatch(list(range(size)), [["a hen"]] * size, images, texts, {})
    return encoder.encode([batch, batch])


def test_rows_have_length_one_and_the_type_asked_for(built):
    for dtype, tolerance in (("float32", 1e-6), ("float16", 2e-3)):
        rows = encode(built, dtype=dtype)
        for features in (rows.image_features, rows.text_features):
            assert features.dtype == dtype
            assert features.shape == (6, 8)
            lengths = np.linalg.norm(features.astype(np.float64), axis=1)
            np.testing.assert_allclose(lengths, 1, atol=tolerance)


def test_autocast_is_close_to_full_precision_but_not_the_same(built):
    full, mixed = encode(built).image_features, encode(built, "bf16-mixed").image_features
    assert 0 < np.abs(full - mixed).max() < 0.1


def test_a_tower_that_is_not_wanted_gives_nothing(built):
    assert encode(built, towers="image").text_features is None
    assert encode(built, towers="text").image_features is None


def test_no_batches_give_no_rows(built):
    encoder = ShardEncoder(
        built,
        towers="both",
        dtype="float16",
        device=torch.device("cpu"),
        precision="32-true",
    )
    rows = encoder.encode([ShardBatch([], [], None, None, {4: "bad"})])
    assert rows.image_features.shape == rows.text_features.shape == (0, 8)
    assert rows.problems == {4: "bad"}


def test_a_device_that_is_not_there_is_an_error():
    for name in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match=rf"device \({name}\) cannot be used; give auto, cpu"):
            choose_device(name, 0)


def test_each_rank_of_a_node_gets_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert [choose_device("auto", rank).index for rank in range(5)] == [0, 1, 2, 3, 0]
    assert choose_device("cuda:2", 1) == torch.device("cuda", 2)


@pytest.mark.gpu
def test_a_gpu_gives_the_rows_of_the_cpu(tmp_path):
    built = build_tiny(tmp_path)
    images, texts = expected_rows(built, range(sum(COUNTS)))
    shards = write_shards(tmp_path / "shards", COUNTS)
    settings = EmbedSettings(dtype="float32", device="cuda", local_batch_size=4)
    embed_shards(table_of(shards), built, tmp_path / "out", settings)
    np.testing.assert_allclose(load_rows(tmp_path / "out", "img_emb"), images, atol=1e-4)
    np.testing.assert_allclose(load_rows(tmp_path / "out", "text_emb"), texts, atol=1e-4)
