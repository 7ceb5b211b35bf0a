"""Muon for the matrices of blocks, another optimizer for the rest, and what cannot be had."""

import copy
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser

from dist_siglip.errors import UserError
from dist_siglip.models.tuning import lies_in_block
from dist_siglip.runs.checkpoints.sharded import by_name, by_number
from dist_siglip.training.optim import OptimConfig, ParameterRule, build_optimizer
from dist_siglip.training.optim.build import PairedOptimizer
from dist_siglip.training.optim.step_check import skip_where
from tests.support.tiny_models import ARCHITECTURES, network_of

MUON = OptimConfig(
    learning_rate=0.02,
    weight_decay=0.3,
    fallback_learning_rate=1e-3,
    warmup_steps=2,
    optimizer=torch.optim.Muon,
)


def _network():
    torch.manual_seed(3)
    return network_of(ARCHITECTURES["clip"])


def _built(network, config=MUON, **options):
    return build_optimizer(network, config, 10, in_block=lies_in_block, **options)


def _set_gradients(network, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _train(network, optimizer, schedule, steps):
    for step in steps:
        _set_gradients(network, step)
        optimizer.step()
        schedule.step()


def _names(network, groups):
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)] for group in groups for p in group["params"]}


@pytest.mark.parametrize("architecture", ["clip", "custom_text", "siglip"])
def test_matrices_of_blocks_go_to_muon_and_all_else_does_not(architecture):
    network = network_of(ARCHITECTURES[architecture])
    optimizer, _ = _built(network)
    inner, outer = optimizer.parts
    assert (type(inner), type(outer)) == (torch.optim.Muon, torch.optim.AdamW)
    matrices, rest = (_names(network, part.param_groups) for part in (inner, outer))
    assert matrices | rest == {name for name, _ in network.named_parameters()}
    assert not matrices & rest
    assert all(lies_in_block(name) for name in matrices)
    assert {name.rpartition(".")[2] for name in matrices} <= {"weight", "in_proj_weight"}
    shapes = {name: p.ndim for name, p in network.named_parameters()}
    # A matrix that is left is an embedding, a head, or the bias of none.
    left = {name for name in rest if shapes[name] == 2 and lies_in_block(name)}
    assert left == set()
    assert any("embedding" in name or "pos_embed" in name for name in rest)
    assert "logit_scale" in rest


def test_the_pair_steps_as_its_parts_do_alone():
    """Rates, decay and clipping per group, the schedule of both, as with two loops."""
    network, other = _network(), _network()
    optimizer, schedule = _built(network, rules={"visual.proj": ParameterRule(0.5)})
    names = _names(network, optimizer.parts[0].param_groups)
    muon = torch.optim.Muon(
        [p for n, p in other.named_parameters() if n in names], lr=1.0, weight_decay=0.3
    )
    kept = [(n, p) for n, p in other.named_parameters() if n not in names]
    adam = torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": 0.3 if p.ndim >= 2 else 0.0,
                "factor": 0.5 if n == "visual.proj" else 1.0,
            }
            for n, p in kept
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(5):
        share = optimizer.param_groups[0]["lr"] / 0.02
        muon.param_groups[0]["lr"] = 0.02 * share
        for group in adam.param_groups:
            group["lr"] = 1e-3 * share * group["factor"]
        _set_gradients(other, step)
        muon.step()
        adam.step()
        _train(network, optimizer, schedule, [step])
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=name)


def test_a_run_goes_on_from_states_by_name_to_the_bit():
    whole, part = _network(), _network()
    _train(whole, *_built(whole), range(6))
    optimizer, schedule = _built(part)
    _train(part, optimizer, schedule, range(3))
    state = copy.deepcopy(by_name(optimizer.state_dict(), optimizer, part))
    names = {name for group in state["param_groups"] for name in group["params"]}
    assert names == {name for name, _ in part.named_parameters()}
    weights, steps = copy.deepcopy(part.state_dict()), schedule.state_dict()
    resumed = _network()
    resumed.load_state_dict(weights)
    again, its_schedule = _built(resumed)
    again.load_state_dict(by_number(state))
    its_schedule.load_state_dict(steps)
    _train(resumed, again, its_schedule, range(3, 6))
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_skipped_step_changes_nothing():
    network = _network()
    optimizer, schedule = _built(network)
    _train(network, optimizer, schedule, range(2))
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
    _set_gradients(network, 7)
    skip_where(optimizer, torch.tensor(True))
    optimizer.step()
    after = network.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    for number, state in before[1].items():
        assert all(torch.equal(torch.as_tensor(v), after[1][number][k]) for k, v in state.items())


def test_a_closure_is_called_once_and_before_both():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    pair = PairedOptimizer(torch.optim.SGD([a], lr=1.0), torch.optim.SGD([b], lr=1.0))
    calls = []

    def closure():
        pair.zero_grad()
        loss = (a + 2 * b).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert pair.step(closure).item() == 6.0
    assert calls == [6.0]
    assert (a.tolist(), b.tolist()) == ([0.0, 0.0], [-1.0, -1.0])


def _configured(path):
    parser = ArgumentParser()
    parser.add_argument("--optim", type=OptimConfig)
    return parser.instantiate_classes(parser.parse_args([f"--optim.optimizer={path}"])).optim


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_muon_by_its_class_path_has_adamw_beside_it():
    optimizer, _ = _built(_network(), _configured("torch.optim.Muon"))
    assert [type(part) for part in optimizer.parts] == [torch.optim.Muon, torch.optim.AdamW]
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_a_fallback_that_is_named_is_taken_with_any_optimizer():
    config = OptimConfig(fallback_optimizer=torch.optim.SGD)
    optimizer, _ = _built(_network(), config)
    assert [type(part) for part in optimizer.parts] == [torch.optim.AdamW, torch.optim.SGD]


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_what_cannot_be_had_is_one_line():
    network = _network()
    cases = [
        (lambda: _built(network, _configured("torch.optim.LBFGS")), r"optimizer \(LBFGS\) asks"),
        (lambda: _built(network, is_sharded=True), r"\(Muon\) of whole matrices does not go"),
        (
            lambda: _built(network, OptimConfig(fallback_learning_rate=1e-3)),
            r"fallback_learning_rate \(0.001\) needs optimizer torch.optim.Muon",
        ),
        (
            lambda: _built(network.visual.ln_post),
            r"\(Muon\) is for matrices of blocks, and none is trainable",
        ),
        (lambda: OptimConfig(fallback_learning_rate=0.0), r"fallback_learning_rate \(0.0\)"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert " object at 0x" not in str(caught.value)


def test_an_optimizer_that_does_not_fit_is_told_by_its_name():
    config = OptimConfig(optimizer=partial(torch.optim.SGD, momentum=-1))
    with pytest.raises(UserError, match=r"optimizer \(SGD\) does not take .*Invalid momentum"):
        _built(_network(), config)
