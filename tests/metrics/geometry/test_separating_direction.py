"""A plane through the origin: constructed clouds, and Theorem 3.6."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import linear_separability, separating_direction
from dist_siglip.metrics.constructions import constellation_from_code, random_code


def _find(images, texts, **settings):
    return separating_direction(images, texts, torch.arange(len(images)), **settings)


def _cone(count, direction, dim=6):
    points = 0.3 * torch.randn(count, dim)
    points[:, 0] += direction
    return F.normalize(points, dim=1)


@pytest.mark.parametrize("bias", [0.0, 0.05, -0.05])
def test_constellations_about_the_origin_are_separated(bias):
    """Theorem 3.6 applies where the margin is above |relative bias| and N >= D + 2."""
    images, texts = constellation_from_code(
        random_code(60, 40, seed=0), margin=0.08, relative_bias=bias
    )
    found = _find(images, texts)
    assert found.images_above == 60
    assert found.texts_below >= 60 - images.shape[1]
    assert found.separates


def test_opposite_cones_are_separated_by_their_axis():
    found = _find(_cone(50, 2.0), _cone(50, -2.0))
    assert found.separates
    assert float(found.direction.norm()) == pytest.approx(1)
    assert float(found.direction[0]) > 0.8


def test_clouds_apart_in_one_direction_need_an_intercept():
    # Images far out, texts near in, along one ray: no plane through the origin tells them apart.
    angles = torch.linspace(-0.3, 0.3, 40)
    arc = torch.stack([angles.cos(), angles.sin()], dim=1)
    images = F.normalize(F.pad(arc, (0, 1), value=0.2), dim=1)
    texts = F.normalize(F.pad(arc, (0, 1), value=0.6), dim=1)
    assert linear_separability(images, texts, torch.arange(40)) == 1.0
    squeezed = images[:, :2], texts[:, :2]
    found = _find(F.normalize(squeezed[0], dim=1), F.normalize(squeezed[1], dim=1))
    assert not found.separates


def test_overlapping_clouds_are_not_separated():
    found = _find(_cone(200, 0.0), _cone(200, 0.0))
    assert not found.separates
    assert found.images_above + found.texts_below < 0.7 * 400


def test_swapping_the_modalities_turns_the_direction_around():
    images, texts = _cone(30, 1.0), _cone(30, -1.0)
    there, back = _find(images, texts), _find(texts, images)
    assert torch.allclose(there.direction, -back.direction, atol=1e-4)
    assert (there.images_above, there.texts_below) == (back.texts_below, back.images_above)


def test_rows_that_were_not_fitted_are_counted_too():
    images, texts = _cone(300, 2.0), _cone(300, -2.0)
    images[100], texts[200] = texts[100].clone(), images[200].clone()
    found = _find(images, texts, max_pairs=20, seed=1)
    assert found[1:] == (300, 299, 299)


def test_wrong_arguments_are_refused():
    with pytest.raises(UserError, match="max_pairs"):
        _find(torch.eye(2), torch.eye(2), max_pairs=0)
    with pytest.raises(UserError, match="no rank has any pair"):
        _find(torch.eye(2)[:0], torch.eye(2)[:0])
