"""``embed`` as a user calls it."""

import json

import numpy as np
import pytest

from dist_siglip.cli import main
from tests.support.embedding import COUNTS, load_rows
from tests.support.shards import write_shards
from tests.support.tiny_models import ARCHITECTURES, write_config


@pytest.fixture
def words(tmp_path):
    """Shards, a folder and a model: the start of a command."""
    write_shards(tmp_path / "shards", COUNTS)
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    out = tmp_path / "out"
    return ["embed", str(tmp_path / "shards"), "--out", str(out), "--model", model, "--workers=0"]


def test_the_report_as_json_and_as_a_table(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*words, "--json=true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs_per_second"] > 0
    assert (report["shards"], report["kept"], report["samples"]) == (4, 0, 25)
    assert load_rows(tmp_path / "out", "img_emb").dtype == np.float16
    # A model without weights is another one every time.
    assert main([*words, "--out", str(tmp_path / "other")]) == 0
    assert "embedded into" in capsys.readouterr().out
