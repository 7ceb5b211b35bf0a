"""Runs with locked towers and learning rates of their own, on one process and on two."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models.tuning import TowerConfig
from dist_siglip.training.module import SigLipModule
from dist_siglip.training.optim import OptimConfig
from tests.support.processes import run_ranks
from tests.support.tiny_models import ARCHITECTURES, write_config
from tests.support.tuning_ranks import batches_of, fit, locked_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
]


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"])


def test_a_locked_tower_stays_and_the_rest_learns(model, tmp_path):
    module = locked_module(model, image_tower=TowerConfig(locked=True))
    before = {name: value.clone() for name, value in module.named_parameters()}
    fit(module, tmp_path, batches_of(2))
    moved = {
        name for name, value in module.named_parameters() if not torch.equal(value, before[name])
    }
    locked = {name for name in before if name.startswith("towers.clip.visual.")}
    assert moved == set(before) - locked
    assert locked


def test_both_towers_locked_train_scale_and_bias_alone(model, tmp_path):
    locked = TowerConfig(locked=True)
    module = locked_module(model, image_tower=locked, text_tower=locked)
    before = {name: value.clone() for name, value in module.named_parameters()}
    fit(module, tmp_path, batches_of(2))
    moved = {
        name for name, value in module.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved == {"logits.log_scale", "logits.logit_bias"}


def test_the_optimizer_has_the_rates_of_the_towers(model, tmp_path):
    module = locked_module(
        model,
        image_tower=TowerConfig(learning_rate_factor=0.1, weight_decay=0.0),
        optim=OptimConfig(learning_rate=0.01, schedule="constant"),
    )
    trainer = fit(module, tmp_path, batches_of(1))
    names = {id(p): name for name, p in module.named_parameters()}
    groups = trainer.optimizers[0].param_groups
    for group in groups:
        for parameter in group["params"]:
            is_image = names[id(parameter)].startswith("towers.clip.visual.")
            assert group["lr"] == pytest.approx(0.001 if is_image else 0.01)
            assert group["weight_decay"] in ((0.0,) if is_image else (0.0, 0.1))
    assert any(group["weight_decay"] == 0.1 for group in groups)
    assert trainer.callback_metrics["train/learning_rate"].item() == pytest.approx(0.01)


def test_a_wrong_setting_names_the_tower(model):
    with pytest.raises(UserError, match=r"text_tower.layer_decay \(0.0\)"):
        SigLipModule(model, text_tower=TowerConfig(layer_decay=0.0))


@pytest.mark.e2e
@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
def test_two_ranks_train_a_locked_model_as_one_process_does(model, tmp_path, tower):
    """Parameters are compared, not only losses; the frozen side travels without a gradient."""
    alone = locked_module(model, **{tower: TowerConfig(locked=True)})
    start = {name: value.clone() for name, value in alone.state_dict().items()}
    fit(alone, tmp_path, batches_of(3))
    ranks = run_ranks(_train_rank, 2, model, tower, str(tmp_path))
    for name, expected in alone.state_dict().items():
        movement = (expected - start[name]).norm()
        for rank in ranks:
            assert (rank[name] - expected).norm() <= 1e-4 * movement, name


def _train_rank(rank, world_size, model, tower, folder):
    module = locked_module(model, **{tower: TowerConfig(locked=True)})
    fit(module, folder, batches_of(3, rank, world_size), rank, world_size)
    return {name: value.clone() for name, value in module.state_dict().items()}
