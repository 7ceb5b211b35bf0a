import math

import pytest
import torch
from torch import nn

from dist_siglip.errors import UserError
from dist_siglip.models import DualEncoder
from dist_siglip.models.tuning import TowerConfig, layer_groups, tune_towers
from tests.support.tiny_models import ARCHITECTURES, inputs_of, network_of


def encoder_of(kind):
    return DualEncoder(network_of(ARCHITECTURES[kind])).train()


def trained(encoder):
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


def tune(encoder, image=None, text=None):
    return tune_towers(
        encoder,
        image_tower=TowerConfig(**(image or {})),
        text_tower=TowerConfig(**(text or {})),
    )


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_a_locked_tower_has_no_gradient_and_the_other_has_all_of_its_own(kind):
    encoder = encoder_of(kind)
    assert tune(encoder, image={"locked": True}) == {}
    found = layer_groups(encoder)
    assert trained(encoder) == {name for name in found if found[name].tower == "text"}
    images, texts = inputs_of(ARCHITECTURES[kind])
    image_features, text_features = encoder(images, texts)
    assert not image_features.requires_grad
    assert image_features.grad_fn is None
    text_features.sum().backward()
    assert all(
        p.grad is not None for name, p in encoder.named_parameters() if name in trained(encoder)
    )


def test_running_statistics_and_dropout_of_a_locked_tower_stand_still():
    encoder = encoder_of("resnet")
    tune(encoder, image={"locked": True})
    encoder.train()
    before = {name: b.clone() for name, b in encoder.named_buffers() if "running" in name}
    encoder(*inputs_of(ARCHITECTURES["resnet"]))
    after = dict(encoder.named_buffers())
    assert before
    assert all(torch.equal(b, after[name]) for name, b in before.items())
    assert encoder.clip.transformer.training
    assert not any(m.training for m in encoder.clip.visual.modules())


def test_the_statistics_of_a_tower_that_trains_move():
    encoder = encoder_of("resnet")
    before = {name: b.clone() for name, b in encoder.named_buffers() if "running_mean" in name}
    encoder(*inputs_of(ARCHITECTURES["resnet"]))
    after = dict(encoder.named_buffers())
    assert not any(torch.equal(b, after[name]) for name, b in before.items())


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_last_groups_of_a_locked_tower_train(groups):
    encoder = encoder_of("siglip")  # head, six blocks, stem
    tune(encoder, image={"locked": True, "unlocked_groups": groups})
    found = layer_groups(encoder)
    expected = {n for n, p in found.items() if p.tower == "text" or p.groups_behind < groups}
    assert trained(encoder) == expected
    assert len(expected) < len(found) or groups == 8


def test_learning_rates_fall_with_the_distance_from_the_end():
    encoder = encoder_of("siglip")
    tuned = tune(
        encoder, image={"learning_rate_factor": 0.1, "layer_decay": 0.5, "weight_decay": 0.0}
    )
    trunk = "clip.visual.trunk"
    assert tuned[f"{trunk}.attn_pool.latent"] == (0.1, 0.0)
    assert tuned[f"{trunk}.blocks.5.norm1.weight"] == (0.05, 0.0)
    assert tuned[f"{trunk}.blocks.0.norm1.weight"] == pytest.approx((0.1 * 0.5**6, 0.0))
    assert tuned[f"{trunk}.pos_embed"] == pytest.approx((0.1 * 0.5**7, 0.0))
    assert not any(name.startswith("clip.text.") for name in tuned)


def test_by_default_nothing_departs():
    encoder = encoder_of("clip")
    assert tune(encoder) == {}
    assert trained(encoder) == {name for name, _ in encoder.named_parameters()}
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unlocked_groups": 1}, r"image_tower.unlocked_groups \(1\) needs image_tower.locked"),
        ({"locked": True, "unlocked_groups": -1}, r"\(-1\) must be >= 0"),
        ({"locked": True, "unlocked_groups": 9}, r"\(9\) must be at most 8: the head, 6 blocks"),
        ({"learning_rate_factor": 0.0}, r"image_tower.learning_rate_factor \(0.0\) must be > 0"),
        ({"learning_rate_factor": math.inf}, r"\(inf\) must be > 0"),
        ({"layer_decay": 1.5}, r"image_tower.layer_decay \(1.5\) must be in \(0, 1\]"),
        ({"weight_decay": -1.0}, r"image_tower.weight_decay \(-1.0\) must be >= 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        tune(encoder_of("siglip"), image=settings)


def test_layer_decay_needs_blocks():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = nn.Module()
            self.visual.conv1 = nn.Conv2d(3, 4, 2)

    with pytest.raises(UserError, match="needs a tower of blocks"):
        tune(DualEncoder(Flat()), image={"layer_decay": 0.5})
