"""``bench checkpoint`` measures where it is told to and leaves nothing there."""

import json

import pytest

from dist_siglip.bench.checkpoint import checkpoint
from dist_siglip.errors import UserError


def test_costs_as_json_and_as_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    settings = {"folder": str(tmp_path), "million_parameters": 0.1, "rounds": 1, "device": "cpu"}
    assert checkpoint(json=True, **settings) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1.2e6 < found["size_bytes"] < 1.3e6  # 12 bytes a parameter
    assert found["write_seconds"] > 0
    assert found["copy_seconds"] > 0
    assert checkpoint(**settings) == 0
    assert "written in the background" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_and_no_rounds_are_named(tmp_path):
    with pytest.raises(UserError, match=r"folder \(.*none\) does not exist"):
        checkpoint(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"rounds \(0\) must be above 0"):
        checkpoint(str(tmp_path), rounds=0)
