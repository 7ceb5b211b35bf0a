import math

import pytest
import torch
from torch import nn

from dist_siglip.errors import UserError
from dist_siglip.training.optim import (
    OptimConfig,
    ParameterRule,
    build_optimizer,
    learning_rate_factor,
)
from tests.training.optim.test_groups import Trained, names_of


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
        ("cooldown_steps", -1),
        ("cooldown_steps", 5),
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


def test_rules_scale_every_step_of_the_schedule():
    module = nn.ModuleDict({"slow": nn.Linear(2, 2), "fast": nn.Linear(2, 2)})
    rules = {f"slow.{name}": ParameterRule(0.25) for name in ("weight", "bias")}
    config = OptimConfig(learning_rate=0.4, warmup_steps=2)
    optimizer, scheduler = build_optimizer(module, config, total_steps=6, rules=rules)
    for _ in range(5):
        rates = {g["name"].endswith("x 0.25"): g["lr"] for g in optimizer.param_groups}
        assert rates[True] == pytest.approx(rates[False] / 4)
        optimizer.step()
        scheduler.step()


def test_an_optimizer_of_the_users_own_takes_learning_rate_and_decay_from_the_settings():
    config = OptimConfig(
        learning_rate=0.2,
        weight_decay=0.7,
        optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.9),
    )
    optimizer, _ = build_optimizer(nn.Linear(2, 2), config, total_steps=3)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.2, 0.7),
        (0.2, 0.0),
    ]
    assert optimizer.defaults["momentum"] == 0.9


def test_an_optimizer_that_does_not_fit_is_refused():
    config = OptimConfig(optimizer=lambda groups: torch.optim.SGD(groups, momentum=-1))
    with pytest.raises(UserError, match="does not take the parameters: Invalid momentum"):
        build_optimizer(nn.Linear(2, 2), config, total_steps=3)
