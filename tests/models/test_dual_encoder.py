import pytest
import torch

from dist_siglip.models import DualEncoder, compile_towers
from dist_siglip.models.dual_encoder import unit_rows
from tests.support.tiny_models import ARCHITECTURES, inputs_of, network_of


def test_features_have_length_one_and_are_fp32_under_autocast():
    encoder = DualEncoder(network_of(ARCHITECTURES["siglip"]))
    images, texts = inputs_of(ARCHITECTURES["siglip"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = encoder(images, texts)
    for rows in features:
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)


def test_unit_rows_keeps_float64_and_zero_rows():
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64))
    assert rows.tolist() == [[0.6, 0.8], [0.0, 0.0]]
    assert rows.dtype == torch.float64


def test_forward_is_both_encoders():
    encoder = DualEncoder(network_of(ARCHITECTURES["clip"]))
    images, texts = inputs_of(ARCHITECTURES["clip"])
    image_features, text_features = encoder(images, texts)
    assert torch.equal(image_features, encoder.encode_image(images))
    assert torch.equal(text_features, encoder.encode_text(texts))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_state_dict_loads_strictly_into_another(kind):
    first, second = (DualEncoder(network_of(ARCHITECTURES[kind])) for _ in range(2))
    second.load_state_dict(first.state_dict(), strict=True)
    inputs = inputs_of(ARCHITECTURES[kind])
    for a, b in zip(first(*inputs), second(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.e2e
# The compiler looks at .grad of every input, the outputs of uncompiled layers included.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_compiled_towers_keep_names_and_features(kind):
    encoder = DualEncoder(network_of(ARCHITECTURES[kind]))
    inputs = inputs_of(ARCHITECTURES[kind])
    keys = list(encoder.state_dict())
    before = encoder(*inputs)
    calls = []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    compile_towers(encoder, backend=backend)
    after = encoder(*inputs)

    assert len(calls) >= 2
    assert list(encoder.state_dict()) == keys
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)
