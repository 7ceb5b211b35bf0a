"""Training on a device goes as on the CPU: steps, averages, checkpoints, evaluation, batches."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.device_mesh import init_device_mesh

from dist_siglip.data.samples.batch import BatchPieces, ImageTextBatch
from dist_siglip.losses import siglip_loss
from dist_siglip.models import encode_in_micro_batches
from dist_siglip.training.callbacks import SkipBadSteps, WeightAverage
from dist_siglip.training.module.siglip import shard_module
from tests.data.samples.test_loader import loader, take
from tests.support.devices import on_devices
from tests.support.ports import next_port
from tests.support.shards import write_shards
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import batches_of, fit, locked_module

STEPS = 3
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "NODE_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}
ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


class Losses(Callback):
    """Keeps the loss of every step, and the devices of parameters."""

    def __init__(self):
        self.losses, self.devices = [], set()

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].detach())
        self.devices |= {parameter.device.type for parameter in module.parameters()}


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])


def train(model, folder, device, batches=None, callbacks=(), module=None, **settings):
    module = module or locked_module(model)
    losses = Losses()
    trainer = fit(
        module,
        folder,
        batches or batches_of(STEPS),
        accelerator=ACCELERATORS[device],
        callbacks=[losses, *callbacks],
        **settings,
    )
    return module, torch.stack(losses.losses).double().cpu(), losses, trainer


def weights(module):
    return {name: value.detach().double().cpu() for name, value in module.named_parameters()}


def assert_close(ours, theirs, tolerance=1e-4):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=tolerance, rtol=tolerance)


MODULES = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 1},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@on_devices
@pytest.mark.parametrize("name", MODULES)
def test_steps_are_those_of_the_cpu(name, device, model, tmp_path):
    expected, exact, *_ = train(model, tmp_path, "cpu")
    module, losses, seen, _ = train(
        model, tmp_path, device, module=locked_module(model, **MODULES[name])
    )
    assert seen.devices == {device}
    torch.testing.assert_close(losses, exact, atol=1e-4, rtol=1e-4)
    assert_close(weights(module), weights(expected), 1e-3)


@on_devices
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_half_precision_stays_near(precision, device, model, tmp_path):
    _, exact, *_ = train(model, tmp_path, "cpu")
    if precision == "16-mixed" and device == "cuda":
        # The scale of the first steps overflows, and they are skipped.
        _, losses, *_ = train(
            model, tmp_path, device, batches_of(30), [SkipBadSteps()], precision=precision
        )
        assert losses[-1].isfinite()
        return
    _, losses, *_ = train(model, tmp_path, device, precision=precision)
    torch.testing.assert_close(losses, exact, atol=0.2, rtol=0.1)


@on_devices
def test_the_average_of_weights_is_that_of_the_cpu(device, model, tmp_path):
    expected, *_ = train(model, tmp_path, "cpu", callbacks=[WeightAverage(0.6)])
    module, *_ = train(model, tmp_path, device, callbacks=[WeightAverage(0.6)])
    assert_close(weights(module), weights(expected), 1e-3)


@on_devices
def test_a_checkpoint_goes_on_as_if_it_had_not_been_written(device, model, tmp_path):
    batches, half = batches_of(12), tmp_path / "half.ckpt"
    whole, *_ = train(model, tmp_path, device, batches, max_steps=4)
    *_, trainer = train(model, tmp_path, device, batches, max_steps=2)
    trainer.save_checkpoint(half)
    rest, *_ = train(model, tmp_path, device, batches[2:], max_steps=4, ckpt_path=str(half))
    assert_close(weights(rest), weights(whole), 1e-6)


@on_devices
def test_a_checkpoint_of_a_device_is_read_on_a_cpu(device, model, tmp_path):
    module, *_, trainer = train(model, tmp_path, device)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", map_location="cpu", weights_only=True)
    own = module.state_dict()
    assert all(torch.equal(value, own[name].cpu()) for name, value in saved["state_dict"].items())


@on_devices
def test_an_evaluation_in_a_run_is_that_of_the_cpu(device, model, tmp_path):
    found = []
    for where in ("cpu", device):
        module, *_ = train(
            model, tmp_path, where, val_batches=batches_of(2), val_check_interval=STEPS
        )
        found.append(module.last_evaluation.metrics)
    assert found[0].keys() == found[1].keys()
    for name in ("loss", "image_to_text_recall@1", "text_to_image_median_rank", "margin"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-2), name


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_compiled_towers_train_as_those_as_written(model, tmp_path):
    expected, exact, *_ = train(model, tmp_path, "cuda")
    module, losses, *_ = train(
        model, tmp_path, "cuda", module=locked_module(model, compile_towers=True)
    )
    torch.testing.assert_close(losses, exact, atol=1e-3, rtol=1e-3)
    assert_close(weights(module), weights(expected), 1e-2)


@on_devices
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sharded_parameters_have_the_gradients_of_whole_ones(
    precision, micro_batch, device, model, monkeypatch
):
    for name, value in {**ALONE, "MASTER_PORT": str(next_port())}.items():
        monkeypatch.setenv(name, value)
    mesh = init_device_mesh(device, (1,), mesh_dim_names=("shard",))
    (batch,), found = batches_of(1), []
    images = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8)
    for is_sharded in (False, True):
        module = locked_module(model)
        if is_sharded:
            shard_module(module, mesh, precision=precision)
        module.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            features = encode_in_micro_batches(
                module.towers, images.to(device), batch.texts.to(device), micro_batch
            )
        loss = siglip_loss(*features, *module.logits())
        loss.backward()
        gradients = {
            name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().double().cpu()
            for name, p in module.named_parameters()
        }
        found.append({"loss": loss.detach().double().cpu(), **gradients})
    if precision == "32-true":
        assert_close(found[1], found[0], 1e-5)
    ours, theirs = (torch.cat([value.flatten() for value in each.values()]) for each in found[::-1])
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.gpu
def test_pieces_are_joined_on_the_device_without_a_wait():
    def piece(start, rows):
        ids = torch.arange(start, start + rows)
        images = torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8)
        yes = torch.ones(rows, dtype=torch.bool)
        return ImageTextBatch(images, ids[:, None], ids, ids, yes, ~yes)

    pieces = (piece(0, 5), piece(5, 5), piece(10, 2))
    pinned = tuple(
        ImageTextBatch(*(None if f is None else f.pin_memory() for f in each)) for each in pieces
    )
    device = torch.device("cuda", 0)
    BatchPieces(pinned).join(device)  # the allocators have what they need
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = BatchPieces(pinned).join(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, BatchPieces(pieces).join(torch.device("cpu")), strict=True):
        assert ours is theirs is None or torch.equal(ours.cpu(), theirs)


@pytest.mark.gpu
def test_a_loader_for_a_device_hands_over_pinned_pieces_of_the_same_batches(tmp_path):
    shards = write_shards(tmp_path)
    expected = take(loader(shards), 3)
    for batch, fields in zip(loader(shards, workers=2, pin_memory=True), expected, strict=False):
        assert isinstance(batch, BatchPieces)
        assert all(piece.images.is_pinned() for piece in batch.pieces)
        joined = [f for f in batch.join(torch.device("cuda", 0)) if f is not None]
        assert all(torch.equal(a.cpu(), b) for a, b in zip(joined, fields, strict=True))
