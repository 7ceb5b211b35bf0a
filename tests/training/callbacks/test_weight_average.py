import pytest
import torch
from lightning.pytorch import Callback

from dist_siglip.errors import UserError
from dist_siglip.training.callbacks import WeightAverage
from tests.support.tiny_models import ARCHITECTURES, write_config
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


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"start_step": -1}, {"every_steps": 0}])
def test_a_wrong_setting_is_named(settings):
    with pytest.raises(UserError, match=rf"WeightAverage.{next(iter(settings))} \("):
        WeightAverage(**settings)


def test_a_sharded_model_is_refused(model, tmp_path):
    module = locked_module(model)
    module._device_mesh = object()
    with pytest.raises(UserError, match="cannot average a sharded model"):
        WeightAverage().setup(None, module, "fit")
