import importlib
import sys

import pytest

from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from dist_siglip.evaluation.embed.shard_job import remove_partial
from tests.support.embedding import build_tiny, table_of
from tests.support.shards import write_shards


@pytest.mark.parametrize("form", ["clip-retrieval", "parquet"])
def test_without_pyarrow_there_is_one_line_and_no_folder(tmp_path, monkeypatch, form):
    table, built = table_of(write_shards(tmp_path / "shards", (1,))), build_tiny(tmp_path)
    module = "dist_siglip.evaluation.embed.parquet_layouts"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'needs pyarrow .*; pip install "dist-siglip\[pack\]"'):
        embed_shards(table, built, tmp_path / "out", EmbedSettings(format=form, device="cpu"))
    assert not (tmp_path / "out").exists()


def test_features_need_no_pyarrow(tmp_path, monkeypatch):
    name = "dist_siglip.evaluation.embed.shard_job"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, name)
    layouts = importlib.import_module(name)
    assert layouts.layout_of("features", tmp_path, [], []).files


def test_only_what_is_half_written_of_the_given_files_goes(tmp_path):
    left, other, whole = (".a.npy.01ab.tmp", ".b.npy.01ab.tmp", "a.npy")
    for name in (left, other, whole):
        (tmp_path / name).write_text("")
    remove_partial([tmp_path / "a.npy", tmp_path / "missing" / "a.npy"])
    assert {path.name for path in tmp_path.iterdir()} == {other, whole}
