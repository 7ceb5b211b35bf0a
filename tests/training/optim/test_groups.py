import pytest
import torch
from torch import nn

from dist_siglip.models import DualEncoder
from dist_siglip.training.optim.groups import ParameterRule, check_coverage, parameter_groups
from tests.support.tiny_models import ARCHITECTURES, network_of


class Trained(nn.Module):
    """Towers, and a scale and a bias of one element each."""

    def __init__(self, kind="clip"):
        super().__init__()
        self.towers = DualEncoder(network_of(ARCHITECTURES[kind]))
        self.log_scale = nn.Parameter(torch.ones(1))
        self.logit_bias = nn.Parameter(torch.ones(1, 1))


def groups_of(module, weight_decay, **options):
    return parameter_groups(module, learning_rate=0.5, weight_decay=weight_decay, **options)


def names_of(module, group):
    names = {id(p): name for name, p in module.named_parameters()}
    return [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_groups_cover_every_parameter_once_and_spare_scale_bias_and_norms(kind):
    module = Trained(kind)
    decayed, undecayed = groups_of(module, 0.3)

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
    decayed, _ = groups_of(module, 0.3)
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
    assert [group["name"] for group in groups_of(module, 0.1)] == ["decay"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    module = Trained()
    module.towers.requires_grad_(False)
    (group,) = groups_of(module, 0.1)
    assert names_of(module, group) == ["log_scale", "logit_bias"]


def test_shared_parameter_is_listed_once():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    (group,) = groups_of(module, 0.1)
    assert len(group["params"]) == 1


def test_coverage_finds_missing_and_repeated_parameters():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="missing: bias"):
        check_coverage(module, [{"params": [module.weight]}])
    with pytest.raises(RuntimeError, match="list 3 parameters"):
        check_coverage(module, [{"params": [module.weight, module.bias, module.bias]}])
    with pytest.raises(RuntimeError, match="list 3 parameters"):
        check_coverage(module, [{"params": [module.weight, module.bias, torch.ones(1)]}])


def test_rules_set_learning_rate_and_decay_of_single_parameters():
    module = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("a", "b", "c")})
    rules = {
        "a.weight": ParameterRule(0.1, 0.0),
        "a.bias": ParameterRule(0.1, 0.0),
        "b.weight": ParameterRule(0.1),
    }
    groups = groups_of(module, 0.3, rules=rules)
    seen = {
        name: (group["lr"], group["weight_decay"], group["name"])
        for group in groups
        for name in names_of(module, group)
    }
    assert seen == {
        "a.weight": (0.05, 0.0, "decay 0, learning rate x 0.1"),
        "a.bias": (0.05, 0.0, "no_decay, learning rate x 0.1"),
        "b.weight": (0.05, 0.3, "decay, learning rate x 0.1"),
        "b.bias": (0.5, 0.0, "no_decay"),
        "c.weight": (0.5, 0.3, "decay"),
        "c.bias": (0.5, 0.0, "no_decay"),
    }
    check_coverage(module, groups)
