"""Alignment, uniformity and cross-uniformity: closed forms, autograd, arguments; and their sum."""

import math

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dist_siglip.errors import UserError
from dist_siglip.losses import (
    ClipLoss,
    SigLipLoss,
    WeightedLoss,
    alignment_loss,
    cross_uniformity_loss,
    siglip_loss,
    softmax_loss,
    uniformity_loss,
)
from dist_siglip.metrics import uniformity


def _features(num_rows=6, width=4, dtype=torch.float64):
    both = torch.randn(2, num_rows, width, dtype=torch.float64)
    return [F.normalize(side, dim=-1).to(dtype).requires_grad_() for side in both]


SCALARS = (torch.tensor(5.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64))


def test_gradients_pass_gradcheck():
    images, texts = _features()
    check = torch.autograd.gradcheck
    assert check(alignment_loss, (images, texts))
    assert check(lambda rows: uniformity_loss(rows, chunk_rows=4), (images,))
    assert check(lambda u, v: cross_uniformity_loss(u, v, chunk_rows=4), (images, texts))


def test_opposite_points_are_four_apart():
    images, _ = _features()
    assert alignment_loss(images, -images).item() == pytest.approx(4.0)
    assert alignment_loss(images, images).item() == 0


def test_rows_that_are_one_point_are_as_uneven_as_can_be():
    one = F.normalize(torch.ones(5, 3), dim=-1).requires_grad_()
    loss = uniformity_loss(one)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert one.grad.abs().max() < 1e-5  # there is no direction to move in


def test_two_opposite_points_reach_minus_eight():
    pair = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity_loss(pair).item() == pytest.approx(-8.0)


def test_orthogonal_rows_reach_minus_four():
    """Also the limit for rows spread evenly over a sphere of high dimension."""
    assert uniformity_loss(torch.eye(9)).item() == pytest.approx(-4.0)
    generator = torch.Generator().manual_seed(0)
    spread = F.normalize(torch.randn(300, 2000, generator=generator), dim=-1)
    assert uniformity_loss(spread).item() == pytest.approx(-4.0, abs=0.02)


def test_a_simplex_is_as_far_apart_as_its_corners():
    """n corners have cosine -1/(n-1), squared distance 2 n/(n-1)."""
    corners = torch.eye(5, dtype=torch.float64) - 1 / 5
    assert uniformity_loss(F.normalize(corners, dim=-1)).item() == pytest.approx(-2 * 2 * 5 / 4)


def test_the_loss_is_the_metric():
    images, _ = _features(20)
    assert uniformity_loss(images).item() == pytest.approx(uniformity(images.detach()), rel=1e-12)


def test_matching_pairs_do_not_count_for_cross_uniformity():
    images = torch.eye(4)
    assert cross_uniformity_loss(images, images).item() == pytest.approx(-4.0)
    # Every text on the spot of the wrong image: one of the three wrong ones is at distance 0.
    shifted = images.roll(1, dims=0)
    expected = math.log((1 + 2 * math.exp(-4)) / 3)
    assert cross_uniformity_loss(images, shifted).item() == pytest.approx(expected)


def test_features_without_unit_length_have_their_own_distance():
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert uniformity_loss(rows).item() == pytest.approx(-2 * 10)


def test_a_second_backward_gives_the_same_gradients():
    images, texts = _features()
    loss = uniformity_loss(images) + cross_uniformity_loss(images, texts)
    first = torch.autograd.grad(loss, (images, texts), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (images, texts))
    for one, three in zip(first, second, strict=True):
        assert torch.allclose(3 * one, three, rtol=1e-14)


@pytest.mark.parametrize("name", ["uniformity_loss", "cross_uniformity_loss"])
def test_second_order_gradients_are_refused_not_wrong(name):
    images, texts = _features()
    both = {
        "uniformity_loss": lambda: uniformity_loss(images),
        "cross_uniformity_loss": lambda: cross_uniformity_loss(images, texts),
    }
    with pytest.raises(RuntimeError, match=f"{name} has first-order gradients only"):
        torch.autograd.grad(both[name](), images, create_graph=True)


def test_wrong_arguments_are_named():
    images, texts = (side.detach() for side in _features())
    with pytest.raises(UserError, match=r"features \(6,\) must be \(B, D\)"):
        uniformity_loss(images[:, 0])
    with pytest.raises(UserError, match=r"uniformity_loss compares different rows .* have 1"):
        uniformity_loss(images[:1])
    with pytest.raises(UserError, match=r"cross_uniformity_loss compares .* pass at least 2"):
        cross_uniformity_loss(images[:0], texts[:0])
    with pytest.raises(UserError, match=r"chunk_rows \(0\)"):
        cross_uniformity_loss(images, texts, chunk_rows=0)
    with pytest.raises(UserError, match=r"must both be \(B, D\)"):
        alignment_loss(images, texts[:3])


@pytest.mark.parametrize("loss", [alignment_loss, cross_uniformity_loss])
def test_a_row_that_is_not_finite_is_named(loss):
    images, texts = (side.detach() for side in _features())
    images[4, 0] = torch.inf
    with pytest.raises(UserError, match=r"rank 0: image_features row 4 is not finite"):
        loss(images, texts)
    with pytest.raises(UserError, match=r"rank 0: features row 4 is not finite"):
        uniformity_loss(images)


@pytest.mark.parametrize(
    ("base", "base_loss"), [(ClipLoss, softmax_loss), (SigLipLoss, siglip_loss)]
)
def test_weighted_loss_is_the_sum_of_its_terms(base, base_loss):
    images, texts = _features()
    expected = (
        base_loss(images, texts, *SCALARS)
        + 0.3 * alignment_loss(images, texts)
        + 0.2 * (uniformity_loss(images) + uniformity_loss(texts))
        + 0.7 * cross_uniformity_loss(images, texts)
    )
    loss = WeightedLoss(base(), alignment=0.3, uniformity=0.4, cross_uniformity=0.7)
    assert torch.allclose(loss(images, texts, *SCALARS), expected, rtol=1e-14)


def test_yaml_chooses_losses_by_class_path():
    parser = ArgumentParser()
    parser.add_subclass_arguments(torch.nn.Module, "loss")
    base = {"class_path": "dist_siglip.losses.ClipLoss", "init_args": {"exchange": "ring"}}
    weights = {"base": base, "cross_uniformity": 0.5}
    config = {"class_path": "dist_siglip.losses.WeightedLoss", "init_args": weights}
    loss = parser.instantiate_classes(parser.parse_object({"loss": config})).loss
    assert isinstance(loss, WeightedLoss)
    assert isinstance(loss.base, ClipLoss)
    assert (loss.base.exchange, loss.cross_uniformity, loss.alignment) == ("ring", 0.5, 1.0)


@pytest.mark.parametrize("kernel", ["triton", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_is_never_waited_for(dtype, kernel, monkeypatch):
    """Fake CUDA tensors have no numbers: whatever would read one on the host raises."""
    if kernel == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        kernels = "dist_siglip.losses.kernels"
        monkeypatch.setattr(f"{kernels}.pair_terms._triton_obstacle", lambda *_: "")
        monkeypatch.setattr(f"{kernels}.triton_terms.launch", lambda *_, **__: None)
    with FakeTensorMode():
        images, texts = (
            torch.empty(10, 8, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
        )
        scale = torch.tensor(5.0, device="cuda", requires_grad=True)
        base = ClipLoss(chunk_rows=4, kernel=kernel, check_finite=False)  # its check needs a driver
        loss = WeightedLoss(base, 1, 1, 1, chunk_rows=4, kernel=kernel)(images, texts, scale, None)
        assert loss.device.type == "cuda"
        assert loss.requires_grad
        with pytest.raises(DataDependentOutputException):
            loss.item()


def test_weight_zero_leaves_the_base_alone():
    images, texts = _features(1)  # one pair: uniformity would refuse it
    loss = WeightedLoss(SigLipLoss(), alignment=0, uniformity=0)
    expected = siglip_loss(images, texts, *SCALARS)
    assert torch.equal(loss(images, texts, *SCALARS), expected)


def test_caption_ids_reach_a_base_that_uses_them():
    images, texts = _features()
    ids = torch.tensor([1, 1, 2, 3, 4, 5])
    loss = WeightedLoss(SigLipLoss(duplicates="positive"), alignment=0, uniformity=0)
    assert loss.uses_caption_ids
    expected = siglip_loss(images, texts, *SCALARS, caption_ids=ids)
    assert torch.equal(loss(images, texts, *SCALARS, caption_ids=ids), expected)
    counted = loss(images, texts, *SCALARS, caption_ids=ids, return_statistics=True)
    assert torch.equal(counted.loss, expected)
    assert counted.duplicate_pairs.item() == 2
    assert not WeightedLoss(ClipLoss()).uses_caption_ids
    pictures = torch.tensor([1, 2, 2, 3, 4, 5])
    assert loss.uses_picture_ids
    with_pictures = {"caption_ids": ids, "picture_ids": pictures, "return_statistics": True}
    assert loss(images, texts, *SCALARS, **with_pictures).duplicate_pairs.item() == 4
    assert loss.duplicates == "positive"


def test_the_base_says_whether_it_uses_the_bias():
    assert WeightedLoss(SigLipLoss()).uses_logit_bias
    assert not WeightedLoss(ClipLoss()).uses_logit_bias


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["alignment", "uniformity", "cross_uniformity"])
def test_impossible_weights_are_refused(name, weight):
    with pytest.raises(UserError, match=rf"{name} \({weight}\) must be a finite weight"):
        WeightedLoss(SigLipLoss(), **{name: weight})
