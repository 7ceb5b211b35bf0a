"""Ten thousand shards are looked at once on a node, not once on each of its ranks."""

import os
from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningModule, Trainer

from dist_siglip.cli.run import start_point
from dist_siglip.cli.run.start_point import check_data_once_per_node
from dist_siglip.errors import UserError
from dist_siglip.training.datamodule import ImageTextDataModule
from tests.support.processes import run_ranks
from tests.support.shards import write_shards
from tests.support.torchrun import pretend_torchrun


def _looks_at_shards(patch):
    """Paths of shards that are asked for from now on, by ``os.stat`` and what is built on it."""
    looks = []
    for name in ("stat", "lstat"):
        plain = getattr(os, name)

        def look(path, *arguments, _plain=plain, **settings):
            if str(path).endswith(".tar"):
                looks.append(str(path))
            return _plain(path, *arguments, **settings)

        patch.setattr(os, name, look)
    return looks


def _check(rank, world_size, shards, cache):
    pretend_torchrun(rank, world_size)
    os.environ["XDG_CACHE_HOME"] = cache
    with pytest.MonkeyPatch.context() as patch:
        looks = _looks_at_shards(patch)
        trainer = Trainer(
            devices=world_size, accelerator="cpu", strategy="ddp", logger=False, barebones=True
        )
        data = ImageTextDataModule(shards, global_batch_size=4)
        try:
            check_data_once_per_node(trainer, LightningModule(), data)
        except UserError as error:
            return str(error), len(looks)
        return data.tables.of("train_shards").fingerprint, len(looks)


def test_the_first_rank_of_a_node_looks_at_the_shards_and_the_others_do_not(tmp_path):
    shards, cache = str(tmp_path / "shards"), str(tmp_path / "cache")
    write_shards(tmp_path / "shards", [3, 5])
    (first, looks), (second, none) = run_ranks(_check, 2, shards, cache)
    assert first == second
    assert looks >= 2
    assert none == 0


def test_ranks_refuse_shards_together(tmp_path):
    missing = str(tmp_path / "none.tar")
    (first, _), (second, none) = run_ranks(_check, 2, missing, str(tmp_path / "cache"))
    assert first == second
    assert "none.tar" in first
    assert none == 0


def test_a_process_that_lightning_starts_takes_over_the_tables(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", [3, 5])
    data = [ImageTextDataModule(str(tmp_path / "shards"), global_batch_size=4) for _ in range(2)]
    parent = SimpleNamespace(num_devices=2, num_nodes=1, local_rank=0, strategy=None)
    variable = f"{start_point._FOUND}_SHARDS"
    monkeypatch.setenv(variable, "")
    check_data_once_per_node(parent, None, data[0])
    _, _, handed = os.environ[variable].partition(" ")
    monkeypatch.setenv(variable, f"{os.getppid()} {handed}")
    looks = _looks_at_shards(monkeypatch)
    check_data_once_per_node(SimpleNamespace(**{**vars(parent), "local_rank": 1}), None, data[1])
    assert looks == []
    # One that names other shards looks for itself; that ranks differ is found later.
    other = ImageTextDataModule(str(tmp_path / "shards" / "*.tar"), global_batch_size=4)
    other.tables.take_over(data[0].tables.files())
    assert other.tables.files() == {}
    assert data[1].tables.of("train_shards").counts == data[0].tables.of("train_shards").counts
