"""Embeddings of fewer dimensions: cut, and rotated by PCA."""

import numpy as np
import pytest
import torch

from dist_siglip.cli import main
from dist_siglip.distributed import World
from dist_siglip.errors import UserError
from dist_siglip.evaluation import embed as embed_package
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.embed.rotation import ROTATION_FILE
from tests.support.embedding import COUNTS, build_tiny, expected_rows, load_rows, table_of
from tests.support.shards import write_shards

SETTINGS = {"dtype": "float32", "local_batch_size": 4, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(built):
    return expected_rows(built, range(sum(COUNTS)))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embed(shards, built, out, world=None, **settings):
    return embed_shards(
        table_of(shards), built, out, EmbedSettings(**SETTINGS | settings), world=world
    )


def test_a_cut_is_the_first_columns_of_length_one(tmp_path, shards, built, rows, caplog):
    embed(shards, built, tmp_path, dim=3)
    for name, whole in zip(("img_emb", "text_emb"), rows, strict=True):
        np.testing.assert_allclose(load_rows(tmp_path, name), unit(whole[:, :3]), atol=1e-5)
    assert "a plain cut loses" in caplog.text
    with pytest.raises(UserError, match="dim was 3 and is 4"):
        embed(shards, built, tmp_path, dim=4)


def test_a_rotation_is_along_the_pictures_and_the_same_for_both_sides(
    tmp_path, shards, built, rows
):
    embed(shards, built, tmp_path / "whole", rotate="pca")
    images, texts = (load_rows(tmp_path / "whole", name) for name in ("img_emb", "text_emb"))
    np.testing.assert_allclose(images @ texts.T, rows[0] @ rows[1].T, atol=1e-5)
    moment = images.astype(np.float64).T @ images
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-4)
    assert (np.diff(np.diag(moment)) <= 1e-5).all()
    embed(shards, built, tmp_path / "cut", rotate="pca", dim=2)
    np.testing.assert_allclose(
        load_rows(tmp_path / "cut", "text_emb"), unit(texts[:, :2]), atol=1e-4
    )


def test_ranks_and_other_folders_share_one_rotation(tmp_path, shards, built, monkeypatch):
    embed(shards, built, tmp_path / "one", rotate="pca", dim=2)
    for rank in range(2):
        world = World(rank=rank, world_size=2)
        embed(shards, built, tmp_path / "two", world, rotate="pca", dim=2)
    monkeypatch.setattr(embed_package, "ROTATION_PICTURES", 5)
    embed(shards, built, tmp_path / "few", rotate="pca", dim=2)
    file = str(tmp_path / "one" / ROTATION_FILE)
    embed(shards, built, tmp_path / "texts", rotate=file, dim=2, towers="text")
    texts = load_rows(tmp_path / "one", "text_emb")
    assert (load_rows(tmp_path / "two", "text_emb") == texts).all()
    assert (load_rows(tmp_path / "texts", "text_emb") == texts).all()
    assert not np.allclose(load_rows(tmp_path / "few", "text_emb"), texts, atol=1e-3)
    with pytest.raises(UserError, match="rotate was 'pca' and is"):
        embed(shards, built, tmp_path / "one", rotate=file, dim=2)


def test_what_cannot_be_is_refused_in_one_line(tmp_path, shards, built):
    with pytest.raises(UserError, match=r"dim \(500\) must be 1 to \d+, the width"):
        embed(shards, built, tmp_path / "large", dim=500)
    assert not (tmp_path / "large").exists()
    for settings, named in (
        ({"format": "features", "dim": 2}, r"dim \(2\) must be null with format features"),
        ({"format": "features", "rotate": "pca"}, r"rotate \(pca\) must be null with format"),
        ({"towers": "text", "rotate": "pca"}, "is fitted to pictures, and towers is text"),
    ):
        with pytest.raises(UserError, match=named):
            EmbedSettings(**SETTINGS | settings)
    with pytest.raises(UserError, match=r"rotate \(.*none\) must be pca or a"):
        embed(shards, built, tmp_path / "a", rotate=str(tmp_path / "none"))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        embed(shards, built, tmp_path / "b", rotate=str(damaged))
    embed(shards, built, tmp_path / "mine", rotate="pca")
    with torch.no_grad():
        next(built.encoder.clip.visual.parameters()).add_(1)
    try:
        with pytest.raises(UserError, match="was fitted to another model"):
            embed(shards, built, tmp_path / "c", rotate=str(tmp_path / "mine" / ROTATION_FILE))
    finally:
        with torch.no_grad():
            next(built.encoder.clip.visual.parameters()).sub_(1)


def test_the_command_takes_both(tmp_path, shards, capsys):
    build_tiny(tmp_path)
    words = ["embed", str(tmp_path / "none"), f"--out={tmp_path / 'out'}", "--dim=0"]
    words[1] = str(shards) if isinstance(shards, str) else str(next(iter(shards)))
    assert main([*words, f"--model={tmp_path / 'clip.json'}", "--workers=0"]) == 2
    assert "dim (0) must be at least 1" in capsys.readouterr().err
