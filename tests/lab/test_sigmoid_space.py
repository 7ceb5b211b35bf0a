"""The run behind the experiments of the sigmoid loss is that of the paper."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.lab.free_embeddings import AUTHORS_SEED, Start, margin_of, train_space
from tests.support.parity import make_rows
from tests.support.reference_lab import margin_and_bias, multimodal_loss

SHORT = Start(num_pairs=6, dimension=4, steps=150, relative_bias=0.3)


def start_rows(start):
    generator = torch.Generator().manual_seed(AUTHORS_SEED + start.seed)
    sizes = (start.num_pairs, start.dimension)
    return [
        F.normalize(torch.randn(*sizes, generator=generator), dim=-1)
        for _ in range(start.num_modalities)
    ]


def first_loss(start):
    return train_space(replace(start, steps=1)).loss


def reference_run(start):
    """The paper's training with autograd through plain softplus, in float64."""
    images, texts = (rows.double().requires_grad_() for rows in start_rows(start))
    log_scale = torch.tensor(start.scale).double().log().requires_grad_()
    bias = torch.tensor(start.relative_bias).double().requires_grad_()
    optimizer = torch.optim.Adam([images, texts, log_scale, bias], lr=0.01)
    sign = 1 - 2 * torch.eye(start.num_pairs).double()
    loss = torch.zeros(())
    for _ in range(start.steps):
        optimizer.zero_grad()
        cosine = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        loss = F.softplus(sign * log_scale.exp() * (cosine - bias)).mean()
        loss.backward()
        optimizer.step()
        for rows in (images, texts):
            rows.data /= rows.data.norm(dim=-1, keepdim=True)
    return loss.item(), log_scale.exp().item(), bias.item()


def test_training_is_the_authors_training():
    space = train_space(SHORT)
    found = (space.loss, space.scale, space.relative_bias)
    assert found == pytest.approx(reference_run(SHORT), rel=1e-4)


@pytest.mark.parametrize("k", [2, 3])
def test_the_loss_is_the_mean_over_all_pairs_of_every_two_modalities(k):
    start = replace(SHORT, num_modalities=k)
    rows = [side.double().tolist() for side in start_rows(start)]
    expected = multimodal_loss(rows, start.scale, start.relative_bias) / start.num_pairs
    assert first_loss(start) == pytest.approx(expected, rel=1e-6)


def test_all_parameterisations_start_at_the_same_loss():
    expected = first_loss(SHORT)
    for change in (
        {"bias_parameterization": "absolute"},
        {"has_adapter": True},
        {"train_scale": False, "train_bias": False},
    ):
        assert first_loss(replace(SHORT, **change)) == pytest.approx(expected, rel=1e-6)


def adapter_reference(start, *, keeps_radial_part):
    """The authors' adapter run: first and third draw, the extended row is what is normalised."""
    generator = torch.Generator().manual_seed(AUTHORS_SEED)
    size = start.num_pairs, start.dimension
    images, _, texts = (
        F.normalize(torch.randn(size, generator=generator), dim=-1).double() for _ in range(3)
    )
    texts.requires_grad_()
    strength = torch.tensor(0.5).double().requires_grad_()
    kept = torch.sigmoid(strength.detach()) ** 2
    log_scale = (start.scale / kept).log().requires_grad_()
    bias = (kept * start.relative_bias - (1 - kept)).requires_grad_()
    optimizer = torch.optim.Adam([texts, log_scale, bias, strength], lr=0.01)
    sign = 1 - 2 * torch.eye(start.num_pairs).double()
    for _ in range(start.steps):
        optimizer.zero_grad()
        delta = torch.sigmoid(strength)
        rest = (1 - delta**2).sqrt().expand(start.num_pairs, 1)
        moving = texts if keeps_radial_part else F.normalize(texts, dim=-1)
        sides = torch.cat([delta * images, rest], 1), torch.cat([delta * moving, -rest], 1)
        cosine = F.normalize(sides[0], dim=-1) @ F.normalize(sides[1], dim=-1).T
        loss = F.softplus(sign * log_scale.exp() * (cosine - bias)).mean()
        loss.backward()
        optimizer.step()
        texts.data /= texts.data.norm(dim=-1, keepdim=True)
    return loss.item(), log_scale.exp().item(), bias.item(), torch.sigmoid(strength).item()


def test_the_adapter_is_trained_as_the_authors_trained_theirs():
    """Adam sees a gradient along the row, which a normalised row does not have."""
    start = replace(SHORT, is_locked=True, has_adapter=True, draws=(0, 2), steps=40)
    space = train_space(start)
    found = (space.loss, space.scale, space.relative_bias, space.delta)
    assert found == pytest.approx(adapter_reference(start, keeps_radial_part=True), rel=1e-4)
    other = adapter_reference(start, keeps_radial_part=False)
    assert found != pytest.approx(other, rel=1e-3)


def test_draws_say_which_matrices_of_the_stream_are_used():
    generator = torch.Generator().manual_seed(AUTHORS_SEED)
    drawn = [F.normalize(torch.randn(6, 4, generator=generator), dim=-1) for _ in range(6)]
    still = replace(SHORT, num_modalities=3, draws=(1, 3, 5), is_locked=True, steps=1)
    assert torch.equal(train_space(still).training.rows[0], F.normalize(drawn[1], dim=-1))
    rows = [drawn[number].double().tolist() for number in (1, 3, 5)]
    expected = multimodal_loss(rows, still.scale, still.relative_bias) / still.num_pairs
    assert train_space(still).loss == pytest.approx(expected, rel=1e-6)


def test_what_is_locked_stays():
    space = train_space(replace(SHORT, is_locked=True, train_scale=False, train_bias=False))
    assert torch.allclose(space.training.rows[0], start_rows(SHORT)[0], atol=1e-7)
    assert (space.scale, space.relative_bias) == pytest.approx((10.0, 0.3), rel=1e-6)
    assert space.delta == 1.0
    assert space.folded == (space.scale, space.relative_bias)


def test_a_folded_adapter_has_the_same_loss():
    space = train_space(replace(SHORT, has_adapter=True))
    rows = [side.double().tolist() for side in space.training.rows]
    without = multimodal_loss(rows, *space.folded) / SHORT.num_pairs
    # The loss was taken before the last step.
    assert without == pytest.approx(space.loss, rel=0.05)
    assert 0 < space.delta < 1


@pytest.mark.parametrize("k", [2, 3])
def test_the_margin_has_one_threshold_for_all_modalities(k):
    rows = list(make_rows("abc"[:k], 7).values())
    expected = margin_and_bias([side.tolist() for side in rows])
    assert margin_of(rows) == pytest.approx(expected, abs=1e-12)


def test_a_star_leaves_out_the_pairs_without_its_hub():
    hub, two = make_rows("ab", 4).values()
    three = -two
    with_hub = [margin_of([hub, other]) for other in (two, three)]
    lowest = min(margin + bias for margin, bias in with_hub)
    highest = max(bias - margin for margin, bias in with_hub)
    expected = ((lowest - highest) / 2, (lowest + highest) / 2)
    assert margin_of([hub, two, three], "star") == pytest.approx(expected)
    assert margin_of([hub, two, three])[0] < expected[0] - 0.01


def test_another_seed_is_another_start():
    assert first_loss(SHORT) != first_loss(replace(SHORT, seed=1))
