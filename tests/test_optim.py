import math
import typing

import pytest
import torch
from torch import nn

from dist_siglip.errors import UserError
from dist_siglip.models import DualEncoder
from dist_siglip.optim import (
    OptimConfig,
    Schedule,
    build_optimizer,
    check_coverage,
    learning_rate_factor,
    parameter_groups,
)
from tests.support.tiny_models import ARCHITECTURES, network_of


class Trained(nn.Module):
    """Towers, and a scale and a bias of one element each."""

    def __init__(self, kind="clip"):
        super().__init__()
        self.towers = DualEncoder(network_of(ARCHITECTURES[kind]))
        self.log_scale = nn.Parameter(torch.ones(1))
        self.logit_bias = nn.Parameter(torch.ones(1, 1))


def names_of(module, group):
    names = {id(p): name for name, p in module.named_parameters()}
    return [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_groups_cover_every_parameter_once_and_spare_scale_bias_and_norms(kind):
    module = Trained(kind)
    decayed, undecayed = parameter_groups(module, 0.3)

    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)
    together = names_of(module, decayed) + names_of(module, undecayed)
    assert sorted(together) == sorted(name for name, _ in module.named_parameters())
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert {"log_scale", "logit_bias"} <= set(names_of(module, undecayed))
    norms = [
        f"{name}.{kind_of_weight}"
        for name, child in module.named_modules()
        if isinstance(child, nn.LayerNorm | nn.BatchNorm2d)
        for kind_of_weight in ("weight", "bias")
    ]
    assert norms
    assert set(norms) <= set(names_of(module, undecayed))
    assert any("attn" in name for name in names_of(module, decayed))


def test_groups_equal_those_of_open_clip():
    module = Trained("clip")
    decayed, _ = parameter_groups(module, 0.3)
    expected = [
        name
        for name, p in module.named_parameters()
        if not (
            p.ndim < 2
            or name == "logit_bias"
            or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        )
    ]
    assert names_of(module, decayed) == expected
    assert "towers.clip.positional_embedding" in expected


def test_word_that_contains_ln_decays():
    module = nn.ModuleDict({"bulletin_kiln": nn.Linear(2, 2, bias=False)})
    assert [group["name"] for group in parameter_groups(module, 0.1)] == ["decay"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    module = Trained()
    module.towers.requires_grad_(False)
    (group,) = parameter_groups(module, 0.1)
    assert names_of(module, group) == ["log_scale", "logit_bias"]


def test_shared_parameter_is_listed_once():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    (group,) = parameter_groups(module, 0.1)
    assert len(group["params"]) == 1


def test_coverage_finds_missing_and_repeated_parameters():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="missing: bias"):
        check_coverage(module, [{"params": [module.weight]}])
    with pytest.raises(RuntimeError, match="list 3 parameters"):
        check_coverage(module, [{"params": [module.weight, module.bias, module.bias]}])
    with pytest.raises(RuntimeError, match="list 3 parameters"):
        check_coverage(module, [{"params": [module.weight, module.bias, torch.ones(1)]}])


def test_decay_moves_only_what_decays():
    module = Trained()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    optimizer, _ = build_optimizer(module, config, total_steps=3)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    for name, parameter in module.named_parameters():
        factor = 0.95 if name in names_of(module, optimizer.param_groups[0]) else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_optimizer_has_the_settings_and_is_fused():
    config = OptimConfig(learning_rate=2e-3, beta1=0.8, beta2=0.9, epsilon=1e-6)
    optimizer, _ = build_optimizer(Trained(), config, total_steps=10)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["fused"] is True
    assert OptimConfig().beta2 == 0.95


def test_scheduler_follows_the_factor_and_resumes():
    config = OptimConfig(learning_rate=0.5, warmup_steps=3, min_learning_rate_fraction=0.1)

    def rates(num_steps, state=None):
        optimizer, scheduler = build_optimizer(nn.Linear(2, 2), config, total_steps=8)
        if state is not None:
            optimizer.load_state_dict(state[0])
            scheduler.load_state_dict(state[1])
        seen = []
        for _ in range(num_steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen, (optimizer.state_dict(), scheduler.state_dict())

    expected = [
        0.5 * learning_rate_factor(step, warmup_steps=3, total_steps=8, min_fraction=0.1)
        for step in range(8)
    ]
    first, state = rates(5)
    rest, _ = rates(3, state)
    assert first + rest == pytest.approx(expected)


@pytest.mark.parametrize("schedule", typing.get_args(Schedule))
def test_schedule_at_start_warm_up_end_middle_and_end(schedule):
    def at(step):
        return learning_rate_factor(
            step, warmup_steps=10, total_steps=110, schedule=schedule, min_fraction=0.2
        )

    constant = schedule == "constant"
    assert at(0) == pytest.approx(0.1)
    assert at(9) == 1.0
    assert at(10) == 1.0
    assert at(60) == pytest.approx(1.0 if constant else 0.6)
    assert at(110) == pytest.approx(1.0 if constant else 0.2)
    assert at(1000) == at(110)
    assert all(at(step) >= at(step + 1) for step in range(10, 110))


def test_cosine_is_a_cosine():
    value = learning_rate_factor(25, warmup_steps=0, total_steps=100)
    assert value == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    quarter = learning_rate_factor(25, warmup_steps=0, total_steps=100, schedule="linear")
    assert quarter == pytest.approx(0.75)


def test_no_warm_up_starts_at_the_top():
    assert learning_rate_factor(0, warmup_steps=0, total_steps=5) == 1.0


def test_warm_up_longer_than_the_run_warns(caplog):
    build_optimizer(nn.Linear(1, 1), OptimConfig(warmup_steps=100), total_steps=2)
    assert "warmup_steps (100)" in caplog.text
    assert learning_rate_factor(1, warmup_steps=100, total_steps=2) == 0.02


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", 0.0),
        ("weight_decay", -1.0),
        ("warmup_steps", -1),
        ("schedule", "cosin"),
        ("min_learning_rate_fraction", 1.5),
    ],
)
def test_wrong_setting_is_refused_by_name_and_value(setting, value):
    with pytest.raises(UserError, match=rf"^{setting} \({value}\) must be "):
        OptimConfig(**{setting: value})


def test_nothing_to_train_and_no_steps_are_refused():
    module = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"total_steps \(0\)"):
        build_optimizer(module, OptimConfig(), total_steps=0)
    with pytest.raises(UserError, match="no parameter is trainable"):
        build_optimizer(module.requires_grad_(False), OptimConfig(), total_steps=1)
