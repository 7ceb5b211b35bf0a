import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from dist_siglip.errors import UserError
from dist_siglip.training.callbacks import WeightAverage
from dist_siglip.training.callbacks.weight_average import PairedTensors, move_towards
from tests.support.meta_device import MetaStrategy
from tests.support.tiny_models import ARCHITECTURES, network_of, write_config
from tests.support.tuning_ranks import batches_of, fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]
NAME = "towers.clip.visual.trunk.pos_embed"


class Keep(Callback):
    """Keeps a weight after every step, and what a checkpoint holds at the end."""

    def __init__(self, path=None):
        self.path, self.weights, self.saved = path, [], None

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append(module.get_parameter(NAME).detach().double().clone())

    def on_train_end(self, trainer, module):
        if self.path:
            trainer.save_checkpoint(self.path)
            self.saved = torch.load(self.path, weights_only=True)


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])


def train(model, folder, num_steps, done=0, start=None, path=None, decay=0.6):
    module, keep = locked_module(model), Keep(path)
    batches = batches_of(num_steps + 8)[done:]
    callbacks = [WeightAverage(decay=decay), keep]
    fit(module, folder, batches, ckpt_path=start, callbacks=callbacks, max_steps=num_steps)
    return module, keep


def test_the_average_is_that_of_the_formula(model, tmp_path):
    module, keep = train(model, tmp_path, 4, path=tmp_path / "a.ckpt")
    average = keep.weights[0]  # torch begins with the weights of the first step that counts
    for weight in keep.weights[1:]:
        average = 0.6 * average + 0.4 * weight
    saved = keep.saved
    assert torch.allclose(saved["state_dict"][NAME].double(), average, atol=1e-6)
    assert torch.equal(saved["current_model_state"][NAME].double(), keep.weights[-1])
    assert not torch.allclose(average, keep.weights[-1], atol=1e-4)
    assert torch.allclose(module.get_parameter(NAME).double(), average, atol=1e-6)


def test_a_run_goes_on_from_its_weights_and_its_average(model, tmp_path):
    _, whole = train(model, tmp_path, 4, path=tmp_path / "whole.ckpt")
    train(model, tmp_path, 2, path=tmp_path / "half.ckpt")
    half = str(tmp_path / "half.ckpt")
    _, rest = train(model, tmp_path, 4, done=2, start=half, path=tmp_path / "rest.ckpt")
    for state in ("state_dict", "current_model_state"):
        for name, value in whole.saved[state].items():
            assert torch.allclose(rest.saved[state][name], value, atol=1e-6), (state, name)


class Mixed(LightningModule):
    """Weights of two dtypes, and a buffer of whole numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2).bfloat16()
        self.register_buffer("positions", torch.arange(50))

    def training_step(self, batch, batch_idx):
        return self.second(self.first(batch).bfloat16()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Devices(Callback):
    """Keeps the devices of the average and of the weights after every step."""

    def __init__(self, averager):
        self.averager, self.found = averager, []

    def on_train_batch_end(self, trainer, module, *_):
        average = self.averager._average_model.module
        self.found.append(
            [{p.device.type for p in each.parameters()} for each in (average, module)]
        )


def train_mixed(averager, *others, **settings):
    torch.manual_seed(0)
    module = Mixed()
    trainer = Trainer(
        **{"accelerator": "cpu", "max_steps": 3, **settings},
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[averager, *others],
    )
    batches = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, torch.utils.data.DataLoader(list(batches), batch_size=None))
    return module


def test_the_average_is_updated_on_the_device_of_the_weights():
    """A copy to the host or a read would raise: the device of this run holds no values."""
    ours = WeightAverage()
    devices = Devices(ours)
    train_mixed(ours, devices, strategy=MetaStrategy(), accelerator="auto")
    assert devices.found == [[{"meta"}, {"meta"}]] * 3
    theirs = EMAWeightAveraging()
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called"):
        train_mixed(theirs, Devices(theirs), strategy=MetaStrategy(), accelerator="auto")


@pytest.mark.parametrize(("start_step", "every_steps"), [(0, 1), (1, 1), (0, 2)])
def test_the_average_is_that_of_lightning(start_step, every_steps):
    ours = train_mixed(WeightAverage(0.6, start_step, every_steps))
    theirs = train_mixed(
        EMAWeightAveraging(
            decay=0.6, update_starting_at_step=start_step, update_every_n_steps=every_steps
        )
    )
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        tolerance = 1e-2 if value.dtype == torch.bfloat16 else 1e-6
        assert torch.allclose(value.float(), expected[name].float(), atol=tolerance), name
    # Lightning averages whole numbers, too, and cuts off what is behind the point.
    assert torch.equal(ours.positions, torch.arange(50))


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"start_step": -1}, {"every_steps": 0}])
def test_a_wrong_setting_is_named(settings):
    with pytest.raises(UserError, match=rf"WeightAverage.{next(iter(settings))} \("):
        WeightAverage(**settings)


def test_a_sharded_model_is_refused(model, tmp_path):
    module = locked_module(model)
    module._device_mesh = object()
    with pytest.raises(UserError, match="cannot average a sharded model"):
        WeightAverage().setup(None, module, "fit")


def test_the_causal_mask_of_a_text_tower_stays_a_mask():
    """Half way from -inf to -inf is not a number."""
    average, module = (network_of(ARCHITECTURES["clip"]) for _ in range(2))
    assert average.attn_mask.isinf().any()
    before = average.text_projection.clone()
    move_towards(PairedTensors(average, module), 0.25)
    assert torch.equal(average.attn_mask, module.attn_mask)
    expected = before.lerp(module.text_projection, 0.25)
    torch.testing.assert_close(average.text_projection, expected)


def mixed_pair():
    average, module = Mixed(), Mixed()
    return average, module, PairedTensors(average, module)


def test_tensors_are_found_once_and_looked_up_at_every_step(monkeypatch):
    average, module, pairs = mixed_pair()
    monkeypatch.setattr(Mixed, "state_dict", None)  # asking again would raise
    for _ in range(2):
        for old, new in pairs:
            assert (old.shape, old.dtype) == (new.shape, new.dtype)
        # A buffer that is set anew is another tensor.
        module.positions = module.positions + 1
        move_towards(pairs, 0.5)
        assert torch.equal(average.positions, module.positions)
    found = {id(new) for _, new in pairs}
    assert found == {id(each) for each in (*module.parameters(), module.positions)}


def test_what_changes_the_set_is_noticed():
    """A layer in another's place, a new buffer, a parameter that is taken away."""
    average, module, pairs = mixed_pair()
    for each in (average, module):
        each.first = torch.nn.Linear(3, 5)
        each.register_buffer("more", torch.ones(2))
        each.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
        each.second.bias = None
    assert [id(new) for _, new in pairs] == [
        id(each) for each in (module.positions, module.more, *module.parameters())
    ]
    assert {id(old) for old, _ in pairs} == {
        id(each) for each in (average.positions, average.more, *average.parameters())
    }


def test_tied_weights_move_once():
    average, module = (torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in "ab")) for _ in "ab")
    for each, value in ((average, 0.0), (module, 1.0)):
        each[1].weight = each[0].weight
        torch.nn.init.constant_(each[0].weight, value)
    move_towards(PairedTensors(average, module), 0.25)
    assert torch.equal(average[1].weight, torch.full((2, 2), 0.25))
