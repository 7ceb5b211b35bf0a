"""Optimizers with train() and eval(): what is evaluated, saved and trained on from."""

import pytest
import torch
from lightning.pytorch import Callback

from dist_siglip.errors import UserError
from dist_siglip.models.weights import read_weights
from dist_siglip.models.weights_file import choose_towers
from dist_siglip.training.callbacks import WeightAverage
from dist_siglip.training.optim import OptimConfig
from tests.support.schedule_free import ScheduleFreeSGD
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import batches_of, fit, locked_module

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAME = "towers.clip.visual.trunk.pos_embed"
FREE = OptimConfig(
    learning_rate=0.05, weight_decay=0.0, schedule="constant", optimizer=ScheduleFreeSGD
)
PAIR = OptimConfig(
    learning_rate=0.01,
    weight_decay=0.0,
    schedule="constant",
    optimizer=torch.optim.Muon,
    fallback_optimizer=ScheduleFreeSGD,
)


class Look(Callback):
    """Keeps a weight: after each step, and where it is evaluated; saves at some steps."""

    def __init__(self, folder=None, save_at=()):
        self.folder, self.save_at = folder, save_at
        self.trained, self.evaluated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.trained.append(module.get_parameter(NAME).detach().clone())
        if trainer.global_step in self.save_at:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
            assert torch.equal(module.get_parameter(NAME), self.trained[-1])

    def on_validation_start(self, trainer, module):
        self.evaluated.append(module.get_parameter(NAME).detach().clone())

    def on_validation_end(self, trainer, module):
        if "end" in self.save_at:
            trainer.save_checkpoint(self.folder / "evaluated.ckpt")


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])


def train(model, folder, steps, *, look, optim=FREE, done=0, **settings):
    module = locked_module(model, optim=optim)
    batches = batches_of(20)[done:]
    trainer = fit(module, folder, batches, callbacks=[look], max_steps=steps, **settings)
    return module, trainer


def average_of(trainer, value):
    """x of y and z, by the formula."""
    (part,) = [
        p
        for p in getattr(trainer.optimizers[0], "parts", trainer.optimizers)
        if isinstance(p, ScheduleFreeSGD)
    ]
    parameter = trainer.lightning_module.get_parameter(NAME)
    return value + (1 - 1 / 0.9) * (part.state[parameter]["z"] - value)


@pytest.mark.parametrize("optim", [FREE, PAIR], ids=["alone", "beside Muon"])
def test_the_average_is_evaluated_and_saved_and_training_goes_on_bit_for_bit(
    model, tmp_path, optim
):
    plain, watched = Look(), Look(tmp_path, save_at=(2, 4, "end"))
    train(model, tmp_path, 6, look=plain, optim=optim)
    batches = batches_of(2)
    module, trainer = train(
        model, tmp_path, 6, look=watched, optim=optim, val_batches=batches, val_check_interval=3
    )
    for one, other in zip(plain.trained, watched.trained, strict=True):
        assert torch.equal(one, other)
    expected = average_of(trainer, watched.trained[-1])
    assert torch.allclose(watched.evaluated[-1], expected, atol=1e-6)
    assert not torch.allclose(watched.evaluated[-1], watched.trained[-1], atol=1e-5)
    # What a report or an export after the run sees.
    assert torch.allclose(module.get_parameter(NAME), expected, atol=1e-6)
    saved = torch.load(tmp_path / "evaluated.ckpt", weights_only=True)
    assert torch.allclose(saved["state_dict"][NAME], expected, atol=1e-6)
    assert torch.equal(saved["current_model_state"][NAME], watched.trained[-1])
    towers = read_weights(tmp_path / "evaluated.ckpt").towers
    assert torch.equal(towers["visual.trunk.pos_embed"], saved["state_dict"][NAME])
    raw = choose_towers(saved, tmp_path / "evaluated.ckpt", False)
    assert torch.equal(raw.tensors[NAME], watched.trained[-1])


@pytest.mark.parametrize("at", [4, "evaluated"])
def test_a_resumed_run_is_the_run_bit_for_bit(model, tmp_path, at):
    whole = Look(tmp_path, save_at=(4, "end"))
    validation = {"val_batches": batches_of(2), "val_check_interval": 4}
    train(model, tmp_path, 4, look=whole, **validation)
    path = tmp_path / f"{at}.ckpt"
    uninterrupted = Look()
    train(model, tmp_path, 8, look=uninterrupted)
    resumed = Look()
    train(model, tmp_path, 8, look=resumed, done=4, ckpt_path=path)
    for one, other in zip(uninterrupted.trained[4:], resumed.trained, strict=True):
        assert torch.equal(one, other)


def test_what_does_not_go_together_is_one_line(model, tmp_path, caplog):
    with pytest.raises(UserError, match=r"second set of weights.*WeightAverage"):
        fit(
            locked_module(model, optim=FREE),
            tmp_path,
            batches_of(1),
            callbacks=[WeightAverage()],
            max_steps=1,
        )
    cosine = OptimConfig(optimizer=ScheduleFreeSGD, schedule="cosine")
    train(model, tmp_path, 1, look=Look(), optim=cosine)
    assert "it wants constant" in caplog.text
