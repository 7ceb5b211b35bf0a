"""The sigmoid loss between several modalities: which are compared, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.losses import multimodal_sigmoid_loss, siglip_loss
from dist_siglip.losses.research.modalities import edges_of


def _scalars(scale, relative_bias):
    return torch.tensor([scale, -scale * relative_bias], dtype=torch.float64).unbind()


SCALARS = _scalars(5.0, 0.4)


def _features(num_modalities=3, num_rows=5, width=4):
    sides = torch.randn(num_modalities, num_rows, width, dtype=torch.float64)
    return [F.normalize(side, dim=-1).requires_grad_() for side in sides]


@pytest.mark.parametrize("graph", ["complete", "star"])
def test_two_modalities_are_the_sigmoid_loss(graph):
    images, texts = _features(2)
    expected = siglip_loss(images, texts, *SCALARS)
    loss = multimodal_sigmoid_loss([images, texts], *SCALARS, graph=graph)
    assert torch.allclose(loss, expected, rtol=1e-15)


def test_gradients_pass_gradcheck():
    def loss(*tensors):
        return multimodal_sigmoid_loss(tensors[:3], *tensors[3:])

    scalars = [value.clone().requires_grad_() for value in SCALARS]
    assert torch.autograd.gradcheck(loss, (*_features(), *scalars))


def test_the_order_of_modalities_matters_only_to_a_star():
    one, two, three = _features()
    turned = [two, three, one]
    complete = multimodal_sigmoid_loss([one, two, three], *SCALARS)
    assert torch.allclose(complete, multimodal_sigmoid_loss(turned, *SCALARS), rtol=1e-14)
    star = multimodal_sigmoid_loss([one, two, three], *SCALARS, graph="star")
    assert not torch.allclose(star, multimodal_sigmoid_loss(turned, *SCALARS, graph="star"))


@pytest.mark.parametrize("num_modalities", [2, 3, 6])
def test_every_two_modalities_are_compared_once(num_modalities):
    complete = edges_of("complete", num_modalities)
    assert len(set(map(frozenset, complete))) == len(complete)
    assert len(complete) == num_modalities * (num_modalities - 1) // 2
    assert edges_of("star", num_modalities) == [(0, n) for n in range(1, num_modalities)]


def test_modalities_of_a_regular_simplex_are_judged_alike():
    """Construction 2 of Bangachev et al.: equal samples, modalities apart by equal angles.

    With features (delta x, sqrt(1 - delta^2) w_a), w_a the corners of a simplex, the loss is that
    of x itself with scale delta^2 t and relative bias (r + (1 - delta^2) / (k - 1)) / delta^2.
    """
    k, delta, scale, relative_bias = 4, 0.6, 20.0, 0.1
    samples = _features(1)[0].detach()
    corners = F.normalize(torch.eye(k, dtype=torch.float64) - 1 / k, dim=-1)
    features = [
        torch.cat([delta * samples, (1 - delta**2) ** 0.5 * corner.expand(len(samples), k)], dim=1)
        for corner in corners
    ]
    loss = multimodal_sigmoid_loss(features, *_scalars(scale, relative_bias))
    absorbed = (relative_bias + (1 - delta**2) / (k - 1)) / delta**2
    equal = siglip_loss(samples, samples, *_scalars(scale * delta**2, absorbed))
    assert torch.allclose(loss, equal, rtol=1e-12)


def test_wrong_arguments_are_named():
    one, two, three = (side.detach() for side in _features())
    with pytest.raises(UserError, match=r"graph \('ring'\) must be one of complete, star"):
        multimodal_sigmoid_loss([one, two], *SCALARS, graph="ring")
    with pytest.raises(UserError, match="features holds 1 modalities; pass at least 2"):
        multimodal_sigmoid_loss([one], *SCALARS)
    with pytest.raises(UserError, match=r"modality 2 is torch.float64 \(4, 4\) but modality 0"):
        multimodal_sigmoid_loss([one, two, three[:4]], *SCALARS)
    with pytest.raises(UserError, match=r"modality 1 is torch.float32"):
        multimodal_sigmoid_loss([one, two.float()], *SCALARS)


def test_second_order_gradients_are_refused_not_wrong():
    features = _features()
    loss = multimodal_sigmoid_loss(features, *SCALARS)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(loss, features, create_graph=True)
