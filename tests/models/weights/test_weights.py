import math
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dist_siglip.errors import UserError
from dist_siglip.models import build_dual_encoder
from dist_siglip.models.dual_encoder import DualEncoder
from dist_siglip.models.weights import load_towers, read_weights
from tests.support.tiny_models import ARCHITECTURES, RESNET, TEXT, network_of, write_config


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def scalars_of(weights):
    return weights.logit_scale, weights.logit_bias


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(writer, tmp_path):
    proof = tmp_path / "executed"
    path = tmp_path / "weights.pt"
    content = {"state_dict": {"weight": torch.ones(1)}, "extra": Bomb(proof)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))

    with pytest.raises(UserError, match=r"weights .*weights.pt .* could run code"):
        read_weights(path)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_truncated_file_is_refused(name, tmp_path):
    path = tmp_path / name
    tensors = {"weight": torch.ones(1000)}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-700])

    with pytest.raises(UserError, match=name) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_file_of_another_kind_is_refused(content, tmp_path):
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [{}, torch.ones(2), {"step": 3}, {"state_dict": {}}])
def test_file_without_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"holds no weights|is not a state dict"):
        read_weights(tmp_path / "weights.pt")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        read_weights(tmp_path / "weights.pt")


def test_open_clip_training_checkpoint_is_read(tmp_path):
    network = network_of(ARCHITECTURES["clip"])
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")

    weights = read_weights(tmp_path / "epoch_3.pt")

    assert weights.towers.keys() == network.state_dict().keys() - {"logit_scale"}
    assert scalars_of(weights) == (pytest.approx(1 / 0.07, rel=1e-6), None)


@pytest.mark.parametrize(
    ("bias_name", "bias_value"), [("logit_bias", -14.0), ("relative_bias", 0.7)]
)
def test_own_checkpoint_is_read_with_either_bias(bias_name, bias_value, tmp_path):
    encoder = DualEncoder(network_of(ARCHITECTURES["siglip"]))
    state = {f"towers.{key}": value for key, value in encoder.state_dict().items()}
    state["scale.log_scale"] = torch.tensor([math.log(20.0)])
    state[f"scale.{bias_name}"] = torch.tensor([bias_value])
    path = tmp_path / "step=00000500.ckpt"
    torch.save({"state_dict": state, "global_step": 500}, path)

    built = build_dual_encoder(
        write_config(tmp_path / "tiny.json", ARCHITECTURES["siglip"]), str(path)
    )

    assert built.start_scale == pytest.approx(20.0, rel=1e-6)
    assert built.start_bias == pytest.approx(-14.0, rel=1e-6)
    expected = encoder.state_dict()
    for key, value in built.encoder.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_state_dict_of_a_dual_encoder_is_read(tmp_path):
    encoder = DualEncoder(network_of(ARCHITECTURES["clip"]))
    torch.save(encoder.state_dict(), tmp_path / "towers.pt")

    weights = read_weights(tmp_path / "towers.pt")
    network = network_of(ARCHITECTURES["clip"])
    load_towers(network, weights, tmp_path / "towers.pt")

    assert torch.equal(network.visual.proj, encoder.clip.visual.proj)
    assert scalars_of(weights) == (None, None)


def test_old_names_fit_a_custom_text_tower(tmp_path):
    clip = network_of(ARCHITECTURES["clip"])
    custom = network_of(ARCHITECTURES["custom_text"])
    torch.save(clip.state_dict(), tmp_path / "clip.pt")

    load_towers(custom, read_weights(tmp_path / "clip.pt"), tmp_path / "clip.pt")

    assert torch.equal(custom.text.text_projection, clip.text_projection)


def test_half_precision_file_becomes_fp32(tmp_path):
    network = network_of(ARCHITECTURES["clip"])
    torch.save(network.half().state_dict(), tmp_path / "half.pt")
    fresh = network_of(ARCHITECTURES["clip"])

    load_towers(fresh, read_weights(tmp_path / "half.pt"), tmp_path / "half.pt")

    assert fresh.visual.proj.dtype == torch.float32
    torch.testing.assert_close(fresh.visual.proj, network.visual.proj.float())


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        (
            {"embed_dim": 8, "vision_cfg": RESNET, "text_cfg": TEXT},
            [r"\d+ missing \(visual\.", r"\d+ unexpected \(visual\.", r", \.\.\.\)"],
        ),
        (
            {**ARCHITECTURES["clip"], "embed_dim": 12},
            [r"2 of another shape \(text_projection \(16, 12\) instead of \(16, 8\)"],
        ),
        (
            {**ARCHITECTURES["clip"], "text_cfg": {**TEXT, "width": 32, "context_length": 4}},
            [r"of another shape \(.*positional_embedding \(4, 32\) instead of \(8, 16\)"],
        ),
    ],
)
def test_weights_of_another_model_are_refused(other, parts, tmp_path):
    torch.save(network_of(other).state_dict(), tmp_path / "other.pt")
    network = network_of(ARCHITECTURES["clip"])
    before = {key: value.clone() for key, value in network.state_dict().items()}

    with pytest.raises(UserError) as caught:
        load_towers(network, read_weights(tmp_path / "other.pt"), tmp_path / "other.pt")

    for part in [*parts, "other.pt do not fit the model"]:
        assert caught.match(part)
    assert "\n" not in str(caught.value)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_mobileclip_names_in_another_network_are_reported(tmp_path):
    key = "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"
    torch.save({key: torch.ones(2, 2)}, tmp_path / "mobile.pt")
    with pytest.raises(UserError, match=r"missing .* 1 unexpected \(image_encoder"):
        load_towers(
            network_of(ARCHITECTURES["clip"]),
            read_weights(tmp_path / "mobile.pt"),
            tmp_path / "mobile.pt",
        )


@pytest.mark.parametrize(
    ("scalar", "value", "message"),
    [
        ("logit_scale", torch.ones(2), r"logit_scale \(2,\) of weights .* must be one number"),
        ("logit_bias", torch.ones(1, 2), r"logit_bias \(1, 2\) of weights .* must be one number"),
        ("logit_scale", torch.tensor(1000.0), r"logit_scale \(1000\) .* must be the logarithm"),
        ("state.log_scale", torch.tensor(1000.0), r"log_scale \(1000\) .* must be the logarithm"),
    ],
)
def test_a_scale_or_bias_that_is_no_number_is_refused(scalar, value, message, tmp_path):
    key = "towers.clip.weight" if scalar.startswith("state") else "weight"
    torch.save({key: torch.ones(2), scalar: value}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    "content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{}", "[" * 5000, "nan"]
)
def test_an_index_that_is_none_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"index\.json") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
