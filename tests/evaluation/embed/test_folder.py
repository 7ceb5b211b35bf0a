import json

import pytest

from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed import claim_folder


def test_a_folder_is_claimed_once_and_found_again(tmp_path):
    for _ in range(2):
        claim_folder(tmp_path / "out", {"model": "a", "shards": "b"})
    assert json.loads((tmp_path / "out" / "embed.json").read_text()) == {
        "model": "a",
        "shards": "b",
    }


def test_every_difference_is_named(tmp_path):
    claim_folder(tmp_path, {"model": "a", "dtype": "float16"})
    message = r"dtype was 'float16' and is 'float32'; model was 'a' and is 'b'; give a new folder"
    with pytest.raises(UserError, match=message):
        claim_folder(tmp_path, {"model": "b", "dtype": "float32"})


def test_a_damaged_manifest_is_an_error(tmp_path):
    for content in ("{", "[1]"):
        (tmp_path / "embed.json").write_text(content)
        with pytest.raises(UserError, match=r"embed.json is damaged; give a new folder"):
            claim_folder(tmp_path, {"model": "a"})


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "out").write_text("")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(UserError, match=r"cannot be used: Not a directory"):
            claim_folder(out, {"model": "a"})
