import pytest
import torch
from torch import nn

from dist_siglip.models.tuning import LinearAttention, can_split


def attention_of(batch_first, bias=True):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "of each head"])
def test_output_and_gradients_are_those_of_torch(batch_first, bias, mask):
    layer = attention_of(batch_first, bias)
    rows = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
    length, batch = (5, 4) if batch_first else (4, 5)
    masks = {
        "none": None,
        "causal": torch.full((length, length), -torch.inf).triu(1).double(),
        "of each head": torch.randn(batch * 3, length, length).double(),
    }
    found = []
    expected = layer(rows, rows, rows, need_weights=False, attn_mask=masks[mask])[0]
    expected.square().sum().backward()
    for gradient in (rows.grad, layer.in_proj_weight.grad, layer.out_proj.weight.grad):
        found.append(gradient.clone())
        gradient.zero_()
    split = LinearAttention(layer)
    actual = split(rows, rows, rows, attn_mask=masks[mask])[0]
    actual.square().sum().backward()
    assert torch.allclose(actual, expected, atol=1e-12)
    again = (rows.grad, split.in_proj.weight.grad, split.out_proj.weight.grad)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(again, found, strict=True))


def test_the_way_back_keeps_the_parameters_themselves():
    layer = attention_of(True)
    back = LinearAttention(layer).to_multihead()
    assert {n: id(p) for n, p in back.named_parameters()} == {
        n: id(p) for n, p in layer.named_parameters()
    }
    rows = torch.randn(2, 3, 12, dtype=torch.float64)
    assert torch.equal(back(rows, rows, rows)[0], layer(rows, rows, rows)[0])


def test_attention_between_two_sequences_is_refused():
    split = LinearAttention(attention_of(True))
    rows = torch.randn(2, 3, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="self-attention"):
        split(rows, rows.clone(), rows)


def test_attention_of_other_widths_is_left_alone():
    assert not can_split(nn.MultiheadAttention(12, 3, kdim=8, vdim=8))
    assert not can_split(nn.MultiheadAttention(12, 3, add_bias_kv=True))
