"""``SigLipLoss`` takes the place of open_clip's, in its own trainer and under DDP."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import SigLipLoss as OpenClipLoss

from dist_siglip.errors import UserError
from dist_siglip.losses import LogitScaleBias, SigLipLoss
from dist_siglip.losses.arguments import ids_for
from tests.support.processes import run_ranks


def _arguments(rank=0):
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    images, texts = (F.normalize(side, dim=-1).requires_grad_() for side in features)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    return images, texts, scale, bias


def _losses_and_gradients(loss_module, rank=0):
    arguments = _arguments(rank)
    loss = loss_module(*arguments, output_dict=True)["contrastive_loss"]
    loss.backward()
    return [loss.detach(), *(argument.grad for argument in arguments)]


def _close(ours, theirs):
    return all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_same_value_and_gradients_as_open_clip_in_one_process():
    assert _close(
        _losses_and_gradients(SigLipLoss(True, 0, 1)),
        _losses_and_gradients(OpenClipLoss(True, 0, 1)),
    )


def _beside_open_clip(rank, world_size):
    """Feature gradients arrive complete on each rank; scalars are summed as DDP would."""
    results = {}
    for dist_impl in (None, "bidir", "shift", "gather", "reduce"):
        ours = _losses_and_gradients(SigLipLoss(True, rank, world_size, dist_impl), rank)
        theirs = _losses_and_gradients(OpenClipLoss(True, rank, world_size, "bidir"), rank)
        for value in (*ours, *theirs):
            if value.ndim == 0:
                dist.all_reduce(value)
        results[dist_impl] = _close(ours, theirs)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_same_value_and_gradients_as_open_clip_on_several_ranks(world_size):
    for results in run_ranks(_beside_open_clip, world_size):
        assert all(results.values()), results


def test_positional_call_of_open_clips_trainer():
    """The trainer calls loss(**model_out, output_dict=True) with these four names."""
    images, texts, scale, bias = _arguments()
    output = {
        "image_features": images,
        "text_features": texts,
        "logit_scale": scale,
        "logit_bias": bias,
    }
    losses = SigLipLoss(rank=0, world_size=1)(**output, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    assert torch.equal(losses["contrastive_loss"], SigLipLoss()(images, texts, scale, bias))


def test_wrong_constructor_arguments_are_named():
    with pytest.raises(UserError, match=r"dist_impl \('both'\) must be one of bidir"):
        SigLipLoss(dist_impl="both")
    with pytest.raises(UserError, match="name the same thing"):
        SigLipLoss(dist_impl="bidir", exchange="ring")
    with pytest.raises(UserError, match=r"world_size \(2\) differs from the process group's \(1\)"):
        SigLipLoss(rank=0, world_size=2)(*_arguments())


@pytest.mark.parametrize("parameterization", ["absolute", "relative"])
def test_scale_and_bias_start_where_told(parameterization):
    module = LogitScaleBias(12.5, -3.0, bias_parameterization=parameterization)
    scale, bias = module()
    assert scale.item() == pytest.approx(12.5)
    assert bias.item() == pytest.approx(-3.0)
    assert all(parameter.shape == (1,) for parameter in module.parameters())


def test_relative_bias_is_minus_bias_over_scale():
    relative = LogitScaleBias(10.0, -5.0, bias_parameterization="relative").relative_bias
    assert relative.item() == pytest.approx(0.5)


def test_relative_gradient_follows_the_chain_rule():
    """d/d relative_bias = -scale d/d bias; d/d log_scale = scale d/d scale + bias d/d bias."""
    images, texts, _, _ = _arguments()
    grads = {}
    for name in ("absolute", "relative"):
        module = LogitScaleBias(8.0, -2.0, bias_parameterization=name).double()
        SigLipLoss()(images, texts, *module()).backward()
        grads[name] = {key: value.grad.item() for key, value in module.named_parameters()}
    absolute, relative = grads["absolute"], grads["relative"]
    assert relative["relative_bias"] == pytest.approx(-8.0 * absolute["logit_bias"], rel=1e-6)
    expected = absolute["log_scale"] - 2.0 * absolute["logit_bias"]
    assert relative["log_scale"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("train_scale", [True, False])
@pytest.mark.parametrize("train_bias", [True, False])
@pytest.mark.parametrize("parameterization", ["absolute", "relative"])
def test_scale_and_bias_freeze_separately(parameterization, train_bias, train_scale):
    module = LogitScaleBias(
        bias_parameterization=parameterization, train_scale=train_scale, train_bias=train_bias
    ).double()
    images, texts, _, _ = _arguments()
    SigLipLoss()(images, texts, *module()).backward()
    has_gradient = [parameter.grad is not None for parameter in module.parameters()]
    assert has_gradient == [train_scale, train_bias]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_scale": 0.0}, r"start_scale \(0.0\)"),
        ({"start_scale": float("inf")}, r"start_scale \(inf\)"),
        ({"start_bias": float("nan")}, r"start_bias \(nan\)"),
        ({"bias_parameterization": "rel"}, "must be absolute or relative"),
    ],
)
def test_impossible_start_values_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        LogitScaleBias(**arguments)


@pytest.mark.parametrize("loaded", ["absolute", "relative"])
@pytest.mark.parametrize("saved", ["absolute", "relative"])
def test_either_parameterisation_loads_into_either(saved, loaded):
    source = LogitScaleBias(112.25, -16.5, bias_parameterization=saved)
    state = {f"logits.{name}": value for name, value in source.state_dict().items()}
    names = list(state)
    target = torch.nn.ModuleDict({"logits": LogitScaleBias(bias_parameterization=loaded)})
    target.load_state_dict(state)
    assert list(state) == names  # the caller's dict is left alone
    scale, bias = target["logits"]()
    assert scale.item() == pytest.approx(112.25, rel=1e-6)
    assert bias.item() == pytest.approx(-16.5, rel=1e-6)


def test_there_and_back_is_the_same_number():
    first = LogitScaleBias(37.5, -11.125).state_dict()
    relative = LogitScaleBias(bias_parameterization="relative")
    relative.load_state_dict(first)
    again = LogitScaleBias()
    again.load_state_dict(relative.state_dict())
    for name, value in again.state_dict().items():
        assert torch.allclose(value, first[name], rtol=2**-22)  # two roundings of float32


def test_a_state_without_scale_is_not_guessed():
    state = {"logit_bias": torch.tensor([-10.0])}
    with pytest.raises(RuntimeError, match="relative_bias"):
        LogitScaleBias(bias_parameterization="relative").load_state_dict(state)


def test_duplicates_are_counted_and_ids_asked_for():
    images, texts, scale, bias = _arguments()
    ids = torch.tensor([3, 8, 3, 3, 9])
    loss = SigLipLoss(duplicates="negative")
    assert loss.uses_caption_ids
    assert not SigLipLoss().uses_caption_ids
    counted = loss(images, texts, scale, bias, caption_ids=ids, return_statistics=True)
    assert torch.equal(counted.loss, SigLipLoss()(images, texts, scale, bias))
    assert torch.equal(counted.loss, loss(images, texts, scale, bias, caption_ids=ids))
    assert counted.duplicate_pairs.item() == 6
    pictures = torch.tensor([1, 1, 2, 3, 3])
    with_pictures = {"caption_ids": ids, "picture_ids": pictures, "return_statistics": True}
    assert loss(images, texts, scale, bias, **with_pictures).duplicate_pairs.item() == 10
    assert SigLipLoss()(images, texts, scale, bias, return_statistics=True).duplicate_pairs is None
    assert ids_for(loss, ids, pictures) == {"caption_ids": ids, "picture_ids": pictures}
    assert ids_for(SigLipLoss(), ids, pictures) == {}
    with pytest.raises(UserError, match=r"duplicates \('negative'\) needs caption_ids"):
        loss(images, texts, scale, bias)
    with pytest.raises(UserError, match=r"duplicates \('ignored'\) must be null or one of"):
        SigLipLoss(duplicates="ignored")
