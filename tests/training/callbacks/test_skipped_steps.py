"""A skipped step is written down with the names of its samples."""

import json

import pytest

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.training.callbacks.skip_bad_steps import SkippedStep, SkippedStepLog
from tests.support.shards import write_shards


def skipped(**changes):
    whole = {
        "step": 7,
        "loss": float("nan"),
        "norm": float("nan"),
        "sample_ids": [0, 30, 1],
        "bad_ids": [30],
        "scale": None,
    }
    return SkippedStep(**{**whole, **changes})


def test_samples_are_named_by_shard_and_key(tmp_path):
    shards = write_shards(tmp_path)
    table = build_pair_table(shards, image_extensions=("png",))
    log = SkippedStepLog(tmp_path / "skipped.jsonl", table)
    text = log.append(skipped())
    line = json.loads((tmp_path / "skipped.jsonl").read_text())
    (first, key0), (other, key30), (_, key1) = (table.name(i) for i in (0, 30, 1))
    assert line["samples"] == {first: [key0, key1], other: [key30]}
    assert line["not_finite"] == [f"{other}/{key30}"]
    assert (line["step"], line["loss"], line["grad_norm"]) == (7, "nan", "nan")
    assert text == (
        f"loss is not finite; 1 of 3 samples gave features that are not, first {other}/{key30}"
    )


def test_a_sample_whose_shard_is_gone_is_named_by_its_number(tmp_path):
    shards = write_shards(tmp_path / "shards")
    table = build_pair_table(shards, image_extensions=("png",))
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    SkippedStepLog(tmp_path / "skipped.jsonl", table).append(skipped())
    line = json.loads((tmp_path / "skipped.jsonl").read_text())
    named = [key for keys in line["samples"].values() for key in keys]
    assert sorted(named) == ["sample 0", "sample 1", "sample 30"]


@pytest.mark.parametrize(
    ("changes", "reason", "is_search"),
    [
        ({}, "loss is not finite", False),
        ({"loss": 1.0}, "gradient is not finite", False),
        ({"loss": 1.0, "scale": 256.0}, "gradient is not finite", True),
        ({"loss": 1.0, "scale": 1.0}, "gradient is not finite", False),
        ({"scale": 256.0}, "loss is not finite", False),
        ({"loss": 1.0, "norm": 12.0, "scale": 256.0}, "gradient norm 12 is a spike", False),
    ],
)
def test_the_reason_is_told_from_loss_norm_and_scale(changes, reason, is_search):
    step = skipped(**changes)
    assert (step.reason, step.is_search_for_scale) == (reason, is_search)
