"""FSDP2 and DDP on two and more ranks against one process: losses, norms and parameters."""

from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from dist_siglip.errors import UserError
from dist_siglip.losses import MatryoshkaLoss, siglip_loss
from dist_siglip.models import build, compile_towers
from dist_siglip.models.tuning import LoraSettings, TowerConfig, block_names
from dist_siglip.objectives import Captioning
from dist_siglip.training.callbacks import WeightAverage
from dist_siglip.training.module.encoding import encode_with_terms
from dist_siglip.training.module.placement import shard_module
from dist_siglip.training.strategies import FullyShardedStrategy
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import (
    count_live_gradients,
    start_of,
    train,
    train_cases,
    worst_error,
)
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.torchrun import pretend_torchrun
from tests.support.tuning_ranks import batches_of, fit, locked_module, weights_beside

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

# Scale and bias of the shorter prefix are parameters of the loss.
PREFIXES = MatryoshkaLoss([8, 3], separate_logits=True)
CASES = {
    "plain": {},
    "a loss that learns": {"module": {"loss": PREFIXES}},
    "gradient checkpointing": {"module": {"gradient_checkpointing": True}},
    "micro-batches": {"module": {"micro_batch_size": 1}},
    "locked image tower": {"module": {"image_tower": TowerConfig(locked=True)}},
    "micro-batches of one tower": {
        "module": {"image_tower": TowerConfig(locked=True), "micro_batch_size": 1}
    },
    "adapters": {"module": {"text_tower": TowerConfig(lora=LoraSettings(rank=2))}},
    # Of little weight, or clipping by the norm of both would leave others nothing to move by.
    "objective": {"objective": {"weight": 0.05}},
    "objective in micro-batches": {
        "objective": {"weight": 0.05, "start": 1},
        "module": {"micro_batch_size": 1},
    },
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


RECEIVED = {
    "DDP": {},
    "DDP with an average": {"trainer": {"callbacks": [WeightAverage(decay=0.5)]}},
    "FSDP2": {"shard": {}, "module": {"loss": PREFIXES}},
    "weights of a file": {"module": {"pretrained": "beside"}, "shard": {}},
    "adapters, which start at random": {
        "module": {"pretrained": "beside", "text_tower": TowerConfig(lora=LoraSettings(rank=2))}
    },
}


def test_the_first_rank_builds_the_model_and_the_others_receive_it(model, tmp_path):
    """Nothing is read or allocated on them, and they train as if it were."""
    weights = weights_beside(model)
    cases = [
        {**case, "module": {**case.get("module", {})}, "receives": True}
        for case in RECEIVED.values()
    ]
    for case in cases:
        if "pretrained" in case["module"]:
            case["module"]["pretrained"] = weights
    ranks = run_ranks(_receive, 2, model, str(tmp_path), cases)
    assert [reads for _, reads in ranks] == [2, 0]
    for number, name in enumerate(RECEIVED):
        alone = train(model, tmp_path, {**cases[number], "shard": None})
        start = start_of(model, cases[number])
        for found, _ in ranks:
            assert found[number]["losses"] == pytest.approx(alone["losses"], rel=1e-5), name
        assert worst_error(ranks[0][0][number]["state"], alone["state"], start) < 1e-4, name


def _receive(rank, world_size, model, folder, cases):
    """What was trained, and how often a file of weights was read."""
    reads, own = [], build.read_weights

    def counting(*args, **settings):
        reads.append(args)
        return own(*args, **settings)

    build.read_weights = counting
    found = train_cases(rank, world_size, model, folder, cases)
    return found, len(reads)


# World size, ranks a node, module: two rows a rank can be micro-batches.
NODES = {"plain": (4, 2, {}), "micro-batches": (2, 1, {"micro_batch_size": 1})}


@pytest.mark.parametrize("case", list(NODES))
def test_copies_on_two_nodes_train_as_one_process_does(model, tmp_path, case):
    world_size, per_node, settings = NODES[case]
    alone = train(model, tmp_path, {})
    ranks = run_ranks(_train_on_nodes, world_size, model, str(tmp_path), per_node, settings)
    for found in ranks:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["mesh"] == {"replicate": 2, "shard": per_node}
    assert worst_error(ranks[0]["state"], alone["state"], start_of(model, {})) < 1e-4


def test_gradients_are_whole_for_one_block_at_a_time(model, tmp_path):
    for ours, together in run_ranks(_live_gradients, 2, model, str(tmp_path)):
        assert ours["most"] == max(ours["blocks"])
        assert together["most"] > 3 * max(ours["blocks"])
        assert ours["losses"] == pytest.approx(together["losses"], rel=1e-6)


def _live_gradients(rank, world_size, model, folder):
    """With ours, and with micro-batches that go backward together."""
    return [
        count_live_gradients(model, folder, rank, world_size, together=together)
        for together in (False, True)
    ]


def _train_on_nodes(rank, world_size, model, folder, per_node, settings):
    meshes = []
    own = FullyShardedStrategy._mesh

    def two_ranks_a_node(self):
        import os

        os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
        mesh = own(self)
        meshes.append(dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)))
        return mesh

    FullyShardedStrategy._mesh = two_ranks_a_node
    case = {"shard": {"shard_within": "node"}, "module": settings}
    found = train(model, folder, case, rank, world_size)
    return {**found, "mesh": meshes[0]}


def test_blocks_are_gathered_in_bfloat16_and_translated_without_breaks(model):
    """Sums, shards, scale and bias stay in float32; towers translated as a whole would break.

    Blocks of a decoder are like those of towers.
    """
    ((ours, whole),) = run_ranks(_look_inside, 1, model)
    assert ours == {
        "gathered": {torch.bfloat16},
        "shards": {torch.float32},
        "gradients": {torch.float32},
        "logits": {torch.float32},
        "breaks": 0,
    }
    assert whole["breaks"] > 0


def _look_inside(rank, world_size, model):
    """Of blocks translated and then sharded, and of towers translated before."""
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    own = nn.Module.compile
    nn.Module.compile = partialmethod(own, backend="eager")
    (batch,), found = batches_of(1), []
    for by_block in (True, False):
        torch._dynamo.reset()
        counters.clear()
        module, dtypes = locked_module(model, objectives=[Captioning(layers=1)]), set()
        if not by_block:
            compile_towers(module.towers, backend="eager")
        shard_module(module, mesh, precision="bf16-mixed", compile_blocks=by_block)
        for part in (module.towers, module.by_name["captioning"]):
            part.get_submodule(block_names(part)[0]).register_forward_pre_hook(
                lambda block, *_, dtypes=dtypes: dtypes.update(p.dtype for p in block.parameters())
            )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images, terms = encode_with_terms(module.towers, module.by_name, batch, 0, 4)
            texts = module.towers.encode_text(batch.texts)
        logits = module.logits()
        loss = siglip_loss(images, texts, *logits)
        (loss + terms["captioning"]["caption_loss"].total).backward()
        shards = list(module.parameters())
        found.append(
            {
                "gathered": dtypes,
                "shards": {p.dtype for p in shards},
                "gradients": {p.grad.dtype for p in shards},
                "logits": {value.dtype for value in logits},
                "breaks": sum(counters["graph_break"].values()),
            }
        )
    return found


def test_patches_of_sharded_towers_are_those_of_whole_ones(model):
    for difference in run_ranks(_patch_difference, 2, model):
        assert difference < 1e-6


def _patch_difference(rank, world_size, model):
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))
    module, images = locked_module(model), batches_of(1)[0].images
    with torch.no_grad():
        whole = module.towers.encode_patches(images)
        shard_module(module, mesh)
        found = module.towers.encode_patches(images)
    assert found.patch_size == whole.patch_size
    pairs = zip(found[:2], whole[:2], strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def test_a_wrong_gradient_would_be_noticed(model, tmp_path):
    """The comparison rejects parameters that are only almost those of one process."""
    alone = train(model, tmp_path, {})
    short = train(model, tmp_path, {}, num_steps=2)
    assert worst_error(short["state"], alone["state"], start_of(model, {})) > 1e-2


def test_a_run_goes_on_under_other_strategies_and_worlds(model, tmp_path):
    """DDP, FSDP2 to one file, FSDP2 on 3 ranks to a folder, 1 process: as without interruption."""
    folder = str(tmp_path)
    late = {"objective": {"weight": 0.05, "start": 3}}  # inside of the second start
    late["module"] = {"loss": PREFIXES}
    uninterrupted = train(model, folder, late, num_steps=8)
    starts = [(2, None), (2, {"checkpoint": "full"}), (3, {"checkpoint": "sharded"}), (1, None)]
    checkpoint, losses = None, []
    for number, (world_size, sharding) in enumerate(starts):
        save = str(tmp_path / f"step-{number}.ckpt")
        place = {"start": checkpoint, "save": save, "done": 2 * number}
        case = {**late, **place, "shard": sharding}
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
    error = worst_error(found["state"], uninterrupted["state"], start_of(model, late))
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


def test_parameters_of_what_is_unknown_are_refused(model):
    module = locked_module(model)
    module.more = torch.nn.Linear(1, 1)
    mesh = SimpleNamespace(mesh_dim_names=("shard",))
    with pytest.raises(UserError, match=r"more.weight is none of them"):
        shard_module(module, mesh)
