"""Stopped and resumed on other ranks and loader processes: the batches of an uninterrupted run.

Every chain of starts goes on twice inside one epoch and across epochs; compared are sample ids,
pixels after augmentation, and captions of every global batch, in order.
"""

import json

import pytest
import torch

from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.training.datamodule import TrainSource
from tests.support.processes import run_ranks
from tests.support.resume_ranks import shout_at_random, train_to
from tests.support.shards import UNEVEN, encode, picture, write_shard, write_shards

LAST = 11  # steps of 8 samples; 37 samples make four steps an epoch
# (ranks, loader processes of each, trained to step) of each start.
CHAINS = {
    "ranks 1-2-1-4, workers 3-1-2-0": ((1, 3, 1), (2, 1, 3), (1, 2, 6), (4, 0, LAST)),
}

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Data modules by name."""
    shards = write_shards(tmp_path_factory.mktemp("shards"))
    bad = write_captioned(tmp_path_factory.mktemp("captioned"))
    return {
        "one source": {"train_shards": shards},
        "mixture": {
            "train_sources": [
                TrainSource(name="even", shards=shards[::2], weight=3.0),
                TrainSource(name="odd", shards=shards[1::2], weight=1.0),
            ]
        },
        # Captions and stages that draw, and samples that are bad or left out.
        "captions and stages": {
            "train_shards": bad,
            "captions": CaptionRule(members=("json",), pick="random"),
            "stages": [shout_at_random],
            "max_bad_fraction": 0.5,
        },
    }


def write_captioned(folder):
    """Shards whose samples have three captions each; every seventh has a bad picture."""
    paths, first = [], 0
    for number, count in enumerate(UNEVEN):
        members = [
            (
                f"{i:06d}",
                {
                    "png": b"bad" if i % 7 == 3 else encode(picture(i)),
                    "json": json.dumps({"caption": [f"{i} {word}" for word in "abc"]}).encode(),
                },
            )
            for i in range(first, first + count)
        ]
        paths.append(str(write_shard(folder / f"{number:05d}.tar", members)))
        first += count
    return paths


def global_batches(by_rank):
    """Join the parts of all ranks, batch by batch."""
    return [
        tuple(torch.cat(parts) for parts in zip(*of_ranks, strict=True))
        for of_ranks in zip(*by_rank, strict=True)
    ]


def train(starts, settings, folder):
    """Run a chain of starts; return the global batches of each data module."""
    seen, checkpoint = {name: [] for name in settings}, None
    for world_size, workers, step in starts:
        ranks = run_ranks(
            train_to,
            world_size,
            step,
            workers,
            settings,
            str(folder),
            checkpoint,
        )
        for name in settings:
            seen[name] += global_batches([rank[name] for rank in ranks])
        checkpoint = step
    return seen


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    return train([(1, 0, LAST)], settings, tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("chain", CHAINS)
def test_resumed_runs_see_the_batches_of_an_uninterrupted_one(
    chain, settings, uninterrupted, tmp_path
):
    resumed = train(CHAINS[chain], settings, tmp_path)
    for name, expected in uninterrupted.items():
        assert len(expected) == len(resumed[name]) == LAST
        for step, (ours, theirs) in enumerate(zip(resumed[name], expected, strict=True)):
            for part, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                assert torch.equal(a, b), f"{name}, step {step}, part {part}"


def test_the_batches_that_are_compared_differ_among_themselves(settings, uninterrupted):
    batches = uninterrupted["one source"]
    assert not torch.equal(batches[0][0], batches[4][0])  # the first batches of two epochs
    assert not torch.equal(batches[0][1], batches[1][1])
