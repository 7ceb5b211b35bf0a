"""The head equals plain loops, starts as the dual encoder, and sees no padding."""

import pytest
import torch

from dist_siglip.errors import UserError
from dist_siglip.models.reranker import Encoded, FusionConfig, FusionHead, TokenShape
from tests.support import reference_fusion

IMAGE, TEXT = TokenShape(3, 6), TokenShape(4, 5)
DIRECTIONS = ["image_to_text", "text_to_image", "both"]


def rows_of(shape, num_rows, lengths=None):
    """Random rows of float64; text row i has ``lengths[i]`` tokens."""
    features = torch.nn.functional.normalize(torch.randn(num_rows, 7, dtype=torch.float64), dim=1)
    tokens = torch.randn(num_rows, *shape, dtype=torch.float64)
    is_token = torch.ones(num_rows, shape.num_tokens, dtype=torch.bool)
    if lengths is not None:
        is_token = torch.arange(shape.num_tokens) < torch.tensor(lengths)[:, None]
    return Encoded(features, tokens, is_token)


def head_of(direction="both", **sizes):
    """A head in float64 whose match logit is not 0."""
    config = FusionConfig(**{"direction": direction, "width": 8, "heads": 2, "layers": 2, **sizes})
    head = FusionHead(IMAGE, TEXT, config, dual_scale=5.0, dual_bias=-3.0).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_logits_equal_plain_loops(direction):
    head = head_of(direction)
    image, text = rows_of(IMAGE, 3), rows_of(TEXT, 3, lengths=[1, 4, 2])
    state = {name: value.tolist() for name, value in head.state_dict().items()}
    rows = [([c[i].tolist() for c in image], [c[i].tolist() for c in text]) for i in range(3)]
    expected = [reference_fusion.head_logit(state, head.config, *row) for row in rows]
    assert head(image, text).logits.tolist() == pytest.approx(expected, rel=1e-12)
    expected = [reference_fusion.score(state, head.config, *row) for row in rows]
    assert head.scores(image, text).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_changes_nothing(direction):
    head = head_of(direction)
    image, text = rows_of(IMAGE, 2), rows_of(TEXT, 2, lengths=[2, 3])
    tokens = text.tokens.masked_fill(~text.is_token[..., None], 100.0)
    assert torch.equal(head(image, text).logits, head(image, text._replace(tokens=tokens)).logits)
    # The check sees a change where there is a token.
    moved = head(image, text._replace(tokens=text.tokens.flip(2))).logits
    assert not torch.allclose(head(image, text).logits, moved)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_untrained_head_scores_as_the_dual_encoder_does(direction):
    config = FusionConfig(direction=direction, width=8, heads=2, layers=1)
    head = FusionHead(IMAGE, TEXT, config, dual_scale=5.0, dual_bias=-3.0).double()
    image, text = rows_of(IMAGE, 4), rows_of(TEXT, 4)
    alone = 5.0 * (image.features * text.features).sum(dim=1) - 3.0
    assert torch.allclose(head.scores(image, text), alone, rtol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_parameter_gets_a_gradient(direction):
    head = head_of(direction)
    head(rows_of(IMAGE, 4), rows_of(TEXT, 4, lengths=[1, 2, 3, 4])).logits.square().sum().backward()
    without = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_no_pairs_give_no_logits_and_gradients_of_zero():
    head = head_of()
    logits = head(rows_of(IMAGE, 0), rows_of(TEXT, 0)).logits
    assert logits.shape == (0,)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_pairs_do_not_see_each_other():
    head = head_of()
    image, text = rows_of(IMAGE, 3), rows_of(TEXT, 3)
    alone = head(Encoded(*(c[1:2] for c in image)), Encoded(*(c[1:2] for c in text)))
    together = head(image, text)
    assert together.logits[1].item() == pytest.approx(alone.logits.item(), rel=1e-6)
    assert together.features.shape == (3, 24)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"direction": "sideways"}, r"direction \('sideways'\) must be one of image_to_text"),
        ({"width": 6, "heads": 4}, r"width \(6\) must be a positive multiple of heads \(4\)"),
        ({"layers": 0}, r"layers \(0\) of a fusion head must be at least 1"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be in \[0, 1\)"),
        ({"rerank_weight": 0.0}, r"rerank_weight \(0.0\) of a fusion head must be above 0"),
    ],
)
def test_sizes_that_cannot_work_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        FusionHead(IMAGE, TEXT, FusionConfig(**sizes))
