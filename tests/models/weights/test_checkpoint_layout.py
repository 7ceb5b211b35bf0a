"""Towers inside of the checkpoints of other trainers, and averages beside them."""

import logging

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.weights import load_towers, read_weights
from tests.support.hugging_face import write_folder
from tests.support.tiny_models import ARCHITECTURES, network_of, write_config

KIND = "clip"


@pytest.fixture(scope="module")
def state():
    return network_of(ARCHITECTURES[KIND]).state_dict()


@pytest.fixture(scope="module")
def average(state):
    return {name: value + 1 for name, value in state.items()}


def named(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def towers_in(content, path, average=None):
    torch.save(content, path)
    return read_weights(path, average=average)


def assert_equal(weights, state):
    assert weights.towers.keys() == state.keys() - {"logit_scale"}
    for name, value in weights.towers.items():
        assert torch.equal(value, state[name]), name
    assert weights.logit_scale == pytest.approx(state["logit_scale"].exp().item(), rel=1e-6)


OTHERS = {"criterion.weight": torch.ones(3), "val_metric.total": torch.zeros(())}
LAYOUTS = {
    "as it is": lambda s: s,
    "Lightning": lambda s: {"state_dict": named("model.", s), "epoch": 3},
    "Lightning with foreign keys": lambda s: {"state_dict": {**OTHERS, **named("model.", s)}},
    "two attributes deep": lambda s: {"state_dict": named("student.clip.", s)},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "model_state_dict": lambda s: {"model_state_dict": s, "step": 7},
    "a table in a table": lambda s: {"checkpoint": {"model": named("net.", s)}, "args": [1]},
    "DDP": lambda s: {"state_dict": named("module.", s)},
    "DDP around compile": lambda s: named("module._orig_mod.", s),
    "compile around DDP": lambda s: named("_orig_mod.module.", s),
    "names of parameters in the optimizer": lambda s: {"model": s, "optimizer": {"exp_avg": s}},
    "a moving average": lambda s: named("module.", s) | {"n_averaged": torch.tensor(4)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefix_that_all_towers_share_is_taken_off(layout, state, tmp_path):
    assert_equal(towers_in(LAYOUTS[layout](state), tmp_path / "w.pt"), state)


def test_what_is_left_out_is_named(state, tmp_path, caplog):
    towers_in({"state_dict": {**OTHERS, **named("model.", state)}}, tmp_path / "w.pt")
    assert "the towers are model.*; left out 2 tensors beside them (criterion.weight, val" in (
        caplog.text
    )


def test_towers_of_transformers_below_a_prefix_give_the_same_features(tmp_path):
    model = write_folder(tmp_path / "folder", "siglip")
    plain = build_dual_encoder(f"local-dir:{tmp_path / 'folder'}")
    torch.save({"state_dict": named("net.", model.state_dict())}, tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt")
    load_towers(plain.encoder.clip, read, tmp_path / "w.pt")
    expected = build_dual_encoder(f"local-dir:{tmp_path / 'folder'}").encoder.state_dict()
    for name, value in plain.encoder.state_dict().items():
        assert torch.equal(value, expected[name]), name


AVERAGED = {
    "state_dict_ema": lambda s, a: {"state_dict": s, "state_dict_ema": a},
    "model_ema": lambda s, a: {
        "model": s,
        "model_ema": named("module.", a) | {"n_averaged": torch.tensor(9)},
    },
    "a prefix": lambda s, a: {"state_dict": named("model.", s) | named("ema_model.", a)},
    "a table of callbacks": lambda s, a: {
        "state_dict": named("model.", s),
        "callbacks": {"EMA": {"ema_state_dict": named("model.", a)}},
    },
}


@pytest.mark.parametrize("layout", AVERAGED)
@pytest.mark.parametrize("wanted", [None, False, True])
def test_of_other_trainers_the_weights_come_first_and_the_average_on_request(
    layout, wanted, state, average, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    content = AVERAGED[layout](state, average)
    found = towers_in(content, tmp_path / "w.pt", wanted)
    assert_equal(found, average if wanted else state)
    assert f"weights_average: {'false' if wanted else 'true'} takes" in caplog.text


@pytest.mark.parametrize("prefix", ["towers.clip.", "model."])
@pytest.mark.parametrize("wanted", [None, False, True])
def test_of_averaging_callbacks_the_average_comes_first_and_the_weights_on_request(
    prefix, wanted, state, average, tmp_path
):
    """Lightning's callbacks, and ours, put the average into state_dict."""
    own = {"logits.log_scale": state["logit_scale"][None]} if prefix == "towers.clip." else {}
    both = [named(prefix, tensors) | own for tensors in (average, state)]
    content = {
        "state_dict": both[0],
        "current_model_state": both[1],
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }
    found = towers_in(content, tmp_path / "w.ckpt", wanted)
    expected = state if wanted is False else average
    assert torch.equal(found.towers["visual.proj"], expected["visual.proj"])


@pytest.mark.parametrize(
    ("layout", "wanted", "message"),
    [
        (lambda s: {"state_dict": s}, True, r"weights_average \(True\): .* hold no average"),
        (lambda s: {"ema": s}, False, r"weights_average \(False\): .* hold nothing but an average"),
        (
            lambda s: {"state_dict": named("student.", s) | named("teacher.", s)},
            None,
            r"several pairs of towers \(state_dict/student\.\*, state_dict/teacher\.\*\)",
        ),
        (lambda s: {"first": s, "second": s}, None, r"pairs of towers \(first/\*, second/\*\)"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(layout, wanted, message, state, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        towers_in(layout(state), tmp_path / "w.pt", wanted)
    assert "\n" not in str(caught.value)


def test_an_average_is_taken_where_there_is_nothing_else(state, tmp_path):
    assert_equal(towers_in({"model_ema": state}, tmp_path / "w.pt"), state)


def test_a_tower_alone_is_reported_by_its_names(state, tmp_path):
    images = {name: value for name, value in state.items() if name.startswith("visual.")}
    torch.save({"model": images}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"is not a state dict \(entry 'model'"):
        read_weights(tmp_path / "w.pt")
    torch.save(named("backbone.", images), tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"missing .* unexpected \(backbone\.visual"):
        load_towers(network_of(ARCHITECTURES[KIND]), read, tmp_path / "w.pt")


@pytest.mark.parametrize(("setting", "value"), [("weights_average", True), ("kept_positions", 4)])
def test_a_setting_of_weights_without_weights_is_refused(setting, value, tmp_path):
    model = write_config(tmp_path / "a.json", ARCHITECTURES[KIND])
    with pytest.raises(UserError, match=rf"{setting} \({value}\) is of weights, and there are non"):
        build_dual_encoder(model, **{setting: value})
