import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import DualEncoder
from dist_siglip.models.tuning import (
    LoraSettings,
    TowerConfig,
    add_adapters,
    is_adapter,
    merge_adapters,
    tune_towers,
)
from tests.support.tiny_models import ARCHITECTURES, inputs_of, network_of

KINDS = ("siglip", "clip", "custom_text")


def encoder_of(kind):
    return DualEncoder(network_of(ARCHITECTURES[kind])).eval()


def adapted(kind, **settings):
    """An encoder with adapters in both towers that are no longer zero."""
    encoder = encoder_of(kind)
    for tower in ("image", "text"):
        add_adapters(encoder, tower, LoraSettings(**{"rank": 2, **settings}))
    for name, parameter in encoder.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_starts_as_it_was(kind):
    encoder = encoder_of(kind)
    inputs = inputs_of(ARCHITECTURES[kind])
    before = encoder(*inputs)
    for tower in ("image", "text"):
        add_adapters(encoder, tower, LoraSettings(rank=3))
    for now, then in zip(encoder(*inputs), before, strict=True):
        assert torch.allclose(now, then, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_give_the_same_features_under_the_old_names(kind):
    plain = encoder_of(kind)
    encoder = adapted(kind, alpha=5)
    inputs = inputs_of(ARCHITECTURES[kind])
    live = encoder(*inputs)
    assert merge_adapters(encoder) > 0
    for merged, before, start in zip(encoder(*inputs), live, plain(*inputs), strict=True):
        assert torch.allclose(merged, before, atol=1e-6)
        assert not torch.allclose(merged, start, atol=1e-3)
    assert list(encoder.state_dict()) == list(plain.state_dict())
    assert merge_adapters(encoder) == 0


def test_the_update_is_alpha_over_rank_times_b_a():
    """Reference: Hu et al. 2021, section 4.1, entry by entry."""
    name, rank, alpha = "clip.visual.trunk.blocks.1.mlp.fc1", 2, 5
    start = encoder_of("siglip").state_dict()
    encoder = adapted("siglip", rank=rank, alpha=alpha)
    state = {key: value.double().clone() for key, value in encoder.state_dict().items()}
    a, b = (state[f"{name}.lora_{letter}.default.weight"] for letter in "AB")
    weight = state[f"{name}.base_layer.weight"].clone()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            update = sum(b[row, k] * a[k, column] for k in range(rank))
            weight[row, column] += alpha / rank * update
    merge_adapters(encoder)
    merged = encoder.state_dict()[f"{name}.weight"]
    assert torch.allclose(merged.double(), weight, atol=1e-6)
    assert merged.shape == start[f"{name}.weight"].shape


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_of_a_tower_learn_and_the_other_tower_learns_whole(kind):
    encoder = encoder_of(kind).train()
    rules = tune_towers(
        encoder,
        image_tower=TowerConfig(lora=LoraSettings(rank=2), learning_rate_factor=3.0),
        text_tower=TowerConfig(),
    )
    encoder(*inputs_of(ARCHITECTURES[kind]))[0][:, 0].sum().backward()
    for name, parameter in encoder.named_parameters():
        if name.startswith("clip.visual."):
            assert parameter.requires_grad == is_adapter(name)
            assert (parameter.grad is not None) == is_adapter(name)
            assert (name in rules) == is_adapter(name)
        else:
            assert parameter.requires_grad


def test_unlocked_groups_learn_beside_the_adapters():
    encoder = encoder_of("siglip")
    tower = TowerConfig(lora=LoraSettings(targets=["qkv"]), unlocked_groups=1)
    tune_towers(encoder, image_tower=tower, text_tower=TowerConfig())
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad and "visual" in n}
    assert any("attn_pool" in name for name in trained)
    assert any(is_adapter(name) for name in trained)
    assert all(is_adapter(n) or "attn_pool" in n or ".norm." in n for n in trained)


def test_named_targets_alone_are_adapted():
    encoder = encoder_of("clip")
    add_adapters(encoder, "text", LoraSettings(targets=["in_proj", "mlp.c_proj"]))
    found = {
        name.partition(".lora_")[0] for name, _ in encoder.named_parameters() if ".lora_" in name
    }
    block = "clip.transformer.resblocks.0"
    assert found == {f"{block}.attn.in_proj", f"{block}.mlp.c_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj"]}, r"image_tower.lora.targets \(q_proj\).*it has .*attn.qkv"),
        ({"rank": 0}, r"image_tower.lora.rank \(0\)"),
        ({"alpha": 0}, r"image_tower.lora.alpha \(0\)"),
        ({"dropout": 1.0}, r"image_tower.lora.dropout \(1.0\)"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        add_adapters(encoder_of("siglip"), "image", LoraSettings(**settings))
    assert "\n" not in str(caught.value)


def test_a_tower_without_blocks_of_matrices_says_what_it_has():
    with pytest.raises(UserError, match=r"image_tower.lora.targets \(null\): the tower has no"):
        add_adapters(encoder_of("resnet"), "image", LoraSettings())


def test_a_missing_peft_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"dist-siglip\[lora\]"):
        add_adapters(encoder_of("siglip"), "image", LoraSettings())
