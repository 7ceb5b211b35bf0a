"""Ranks that are killed at any moment leave nothing half-written, and the rest is done later."""

import json
import multiprocessing
import os
import time
from contextlib import suppress

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

from dist_siglip.distributed import World
from dist_siglip.evaluation.embed import EmbedSettings, embed_shards
from tests.support.embedding import build_tiny, table_of
from tests.support.shards import write_shards

pytestmark = pytest.mark.faults

FORMS = ("clip-retrieval", "parquet", "features")
COUNTS = tuple(1 + n % 4 for n in range(30))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("model"))


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start_ranks(world_size, shards, built, out, settings):
    """Start ranks that share nothing but the folder; they are forked, which takes no time."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(
            target=embed_shards,
            args=(table_of(shards), built, out, settings),
            kwargs={"world": World(rank=rank, world_size=world_size)},
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def num_written(out):
    """Parts that are finished, of any form."""
    patterns = ("metadata/*.parquet", "parts/*.parquet", "features/*.safetensors")
    return sum(len(list(out.glob(pattern))) for pattern in patterns)


def read_all(out):
    """Read everything that has its name: it is whole."""
    for path in out.rglob("[!.]*.*"):
        if path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".parquet":
            parquet.ParquetFile(path).read()
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.is_file():
            json.loads(path.read_text())


@pytest.mark.parametrize("form", FORMS)
def test_killed_again_and_again_the_files_have_the_same_bytes(tmp_path, shards, built, form):
    settings = EmbedSettings(format=form, local_batch_size=2, workers=0, device="cpu")
    embed_shards(table_of(shards), built, tmp_path / "whole", settings)
    out = tmp_path / "out"
    random = np.random.default_rng(0)
    num_killed = 0
    for world_size in (2, 3, 1, 2):
        enough = num_written(out) + random.integers(1, 5)
        ranks = start_ranks(world_size, shards, built, out, settings)
        while num_written(out) < enough and any(rank.is_alive() for rank in ranks):
            time.sleep(0.001)
        for rank in ranks:
            num_killed += rank.is_alive()
            rank.kill()
            rank.join()
        read_all(out)
    for rank in start_ranks(3, shards, built, out, settings):
        rank.join()
        assert rank.exitcode == 0
    assert num_killed >= 2
    assert files_of(out) == files_of(tmp_path / "whole")


def test_all_ranks_may_start_at_once(tmp_path, shards, built):
    settings = EmbedSettings(format="parquet", workers=0, device="cpu")
    embed_shards(table_of(shards), built, tmp_path / "whole", settings)
    ranks = start_ranks(8, shards, built, tmp_path / "out", settings)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 8
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


class KilledError(BaseException):
    """Nothing catches it, as nothing catches a signal."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", range(1, 7))
def test_a_shard_is_done_again_whichever_of_its_files_was_the_last(
    tmp_path, shards, built, monkeypatch, form, call
):
    settings = EmbedSettings(format=form, workers=0, device="cpu")
    table = table_of(shards[:2])
    embed_shards(table, built, tmp_path / "whole", settings)
    embed_shards(table, built, tmp_path / "out", settings, world=World(rank=0, world_size=2))
    synced = []

    def sync(descriptor):
        synced.append(descriptor)
        if len(synced) == call:
            raise KilledError

    with monkeypatch.context() as patch, suppress(KilledError):
        patch.setattr(os, "fsync", sync)
        embed_shards(table, built, tmp_path / "out", settings)
    embed_shards(table, built, tmp_path / "out", settings)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
