"""FSDP2 and DDP on two and more ranks against one process: losses, norms and parameters."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from dist_siglip.errors import UserError
from dist_siglip.models.tuning import LoraSettings, TowerConfig
from dist_siglip.training.module.siglip import shard_module
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import start_of, train, train_cases, worst_error
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.torchrun import pretend_torchrun
from tests.support.tuning_ranks import batches_of, fit, locked_module

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

CASES = {
    "plain": {},
    "gradient checkpointing": {"module": {"gradient_checkpointing": True}},
    "micro-batches": {"module": {"micro_batch_size": 1}},
    "locked image tower": {"module": {"image_tower": TowerConfig(locked=True)}},
    "adapters": {"module": {"text_tower": TowerConfig(lora=LoraSettings(rank=2))}},
}


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])


def test_two_ranks_train_as_one_process_does(model, tmp_path):
    """Losses of all steps, the last gradient norm, and every parameter, to 1e-4 of its movement."""
    sharded = [{**case, "shard": {}} for case in CASES.values()]
    ranks = run_ranks(train_cases, 2, model, str(tmp_path), sharded)
    for number, (name, case) in enumerate(CASES.items()):
        alone = train(model, tmp_path, case)
        start = start_of(model, case)
        for rank in (0, 1):
            found = ranks[rank][number]
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5), name
            assert found["norm"] == pytest.approx(alone["norm"], rel=1e-4), name
        assert worst_error(ranks[0][number]["state"], alone["state"], start) < 1e-4, name


def test_copies_on_two_nodes_of_shards_on_two_ranks_train_as_one_process_does(model, tmp_path):
    alone = train(model, tmp_path, {})
    ranks = run_ranks(_train_on_nodes, 4, model, str(tmp_path))
    for found in ranks:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["mesh"] == {"replicate": 2, "shard": 2}
    assert worst_error(ranks[0]["state"], alone["state"], start_of(model, {})) < 1e-4


def _train_on_nodes(rank, world_size, model, folder):
    meshes = []
    own = FullyShardedStrategy._mesh

    def two_ranks_a_node(self):
        import os

        os.environ["LOCAL_WORLD_SIZE"] = "2"
        mesh = own(self)
        meshes.append(dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)))
        return mesh

    FullyShardedStrategy._mesh = two_ranks_a_node
    found = train(model, folder, {"shard": {"shard_within": "node"}}, rank, world_size)
    return {**found, "mesh": meshes[0]}


def test_a_wrong_gradient_would_be_noticed(model, tmp_path):
    """The comparison rejects parameters that are only almost those of one process."""
    alone = train(model, tmp_path, {})
    short = train(model, tmp_path, {}, num_steps=2)
    assert worst_error(short["state"], alone["state"], start_of(model, {})) > 1e-2


def test_a_run_goes_on_under_other_strategies_and_worlds(model, tmp_path):
    """DDP, FSDP2 to one file, FSDP2 on 3 ranks to a folder, 1 process: as without interruption."""
    folder = str(tmp_path)
    uninterrupted = train(model, folder, {}, num_steps=8)
    starts = [(2, None), (2, {"checkpoint": "full"}), (3, {"checkpoint": "sharded"}), (1, None)]
    checkpoint, losses = None, []
    for number, (world_size, sharding) in enumerate(starts):
        save = str(tmp_path / f"step-{number}.ckpt")
        case = {"shard": sharding, "start": checkpoint, "save": save, "done": 2 * number}
        # The learning rate is constant, so a start may name its own last step.
        arguments = (model, folder, [case], 2 * number + 2)
        found = (
            train_cases(0, 1, *arguments)
            if world_size == 1
            else run_ranks(train_cases, world_size, *arguments)[0]
        )[0]
        losses += found["losses"]
        checkpoint = save
    assert losses == pytest.approx(uninterrupted["losses"], rel=1e-4)
    error = worst_error(found["state"], uninterrupted["state"], start_of(model, {}))
    assert error < 1e-3


def test_one_rank_is_refused(model, tmp_path):
    (message,) = run_ranks(_refusal, 1, model, str(tmp_path), "ours")
    assert "shards a model over ranks and there is one" in message
    assert "\n" not in message


def test_the_strategy_of_lightning_is_refused_with_ours_named(model, tmp_path):
    (message,) = run_ranks(_refusal, 1, model, str(tmp_path), "of Lightning")
    assert "use the class dist_siglip.training.strategies.FullyShardedStrategy" in message


def _refusal(rank, world_size, model, folder, whose):
    """In a process of its own: launchers change the environment, and groups outlive their end."""
    pretend_torchrun(rank, world_size)
    strategy = (
        FullyShardedStrategy()
        if whose == "ours"
        else ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    )
    try:
        fit(locked_module(model), folder, batches_of(1), strategy=strategy)
    except UserError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(("setting", "value"), [("shard_within", "rack"), ("checkpoint", "half")])
def test_an_unknown_setting_is_named(setting, value):
    with pytest.raises(UserError, match=rf"strategy.{setting} \({value}\) must be"):
        FullyShardedStrategy(**{setting: value})


def test_a_loss_with_parameters_is_refused(model):
    module = locked_module(model)
    module.loss.weight = torch.nn.Parameter(torch.ones(1))
    mesh = SimpleNamespace(mesh_dim_names=("shard",))
    with pytest.raises(UserError, match=r"loss.weight is none of them"):
        shard_module(module, mesh)
