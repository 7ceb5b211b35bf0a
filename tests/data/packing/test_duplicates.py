import json

import numpy as np
from PIL import Image

from dist_siglip.data.packing.duplicates import Duplicates, report_duplicates, thumbnail_hash
from dist_siglip.data.packing.table import Columns
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.urls import expand_shards
from tests.support.packing import packed, write_table
from tests.support.shards import encode, jpeg, photo


def test_what_occurs_twice_is_counted_and_listed(tmp_path):
    first, other = photo(160, 120, 1), photo(160, 120, 2)
    files = {
        "0.png": encode(first),
        "1.png": encode(first),  # the same bytes
        "2.jpg": jpeg(first.resize((80, 60)), quality=80),  # alike
        "3.png": encode(other),
        "4.png": encode(Image.new("RGB", (30, 30), "red")),
        "5.png": encode(Image.new("RGB", (40, 40), "blue")),  # flat: alike to nothing
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    captions = ["a hen", "a hen", "a hen ", "a fox", "red", "a fox"]
    rows = [{"image": name, "caption": text} for name, text in zip(files, captions, strict=True)]
    table = write_table(tmp_path / "t.csv", rows)
    packed(table, tmp_path / "out", None, Columns(), samples_per_shard=4)
    out = tmp_path / "duplicates.jsonl"
    shards = expand_shards(str(tmp_path / "out"))
    found = report_duplicates(shards, out, PicturePolicy(), workers=2)
    assert found == Duplicates(pictures=2, alike=2, captions=5, pairs=2)
    lines = [json.loads(line) for line in out.read_text().splitlines()]

    def keys(*numbers):
        return [f"{number:09d}" for number in numbers]

    assert lines == [
        {"same": "picture", "samples": 2, "keys": keys(0, 1)},
        {"same": "alike", "samples": 2, "keys": keys(0, 2)},
        {"same": "caption", "samples": 3, "keys": keys(0, 1, 2)},
        {"same": "caption", "samples": 2, "keys": keys(3, 5)},
        {"same": "pair", "samples": 2, "keys": keys(0, 1)},
    ]


def test_the_hash_of_a_thumbnail_is_where_it_gets_brighter():
    values = np.random.default_rng(0).integers(0, 256, (8, 9)).astype(np.uint8)
    wanted = 0
    for row in range(8):
        for column in range(8):
            wanted = wanted * 2 + int(values[row, column + 1] > values[row, column])
    found = thumbnail_hash(Image.fromarray(values).convert("RGB"))
    assert found % 2**64 == wanted
