import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dist_siglip.models import DualEncoder, compile_towers
from dist_siglip.models.dual_encoder import unit_rows
from tests.support.tiny_models import ARCHITECTURES, TIMM, VIT, inputs_of, network_of


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


def one_patch_network(kind):
    """A network that sees one patch a picture, and pools nothing but patches."""
    if kind.startswith("open_clip"):
        vision = {**VIT, "image_size": 8, "pool_type": "avg", "final_ln_after_pool": "late" in kind}
        return network_of({**ARCHITECTURES["clip"], "vision_cfg": vision}), 8
    config = {**TIMM, "image_size": 16, "timm_pool": "avg", "timm_proj": "linear"}
    network = network_of({**ARCHITECTURES["siglip"], "vision_cfg": config})
    if kind == "timm map":
        network = network_of(ARCHITECTURES["siglip"])
        network.visual.trunk = VisionTransformer(
            img_size=16,
            patch_size=16,
            num_classes=0,
            global_pool="map",
            class_token=False,
            embed_dim=64,
            depth=1,
            num_heads=2,
        ).eval()
    return network, 16


@pytest.mark.parametrize("kind", ["open_clip", "open_clip late norm", "timm avg", "timm map"])
def test_a_patch_has_the_feature_of_a_picture_of_this_patch_alone(kind):
    network, side = one_patch_network(kind)
    encoder, images = DualEncoder(network), torch.randn(2, 3, side, side)
    found = encoder.encode_patches(images)
    assert found.patch_size == (side, side)
    assert found.features.shape[:2] == (2, 1)
    torch.testing.assert_close(found.features[:, 0], encoder.encode_image(images))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_patches_are_the_tokens_and_have_features_of_length_one(kind):
    encoder = DualEncoder(network_of(ARCHITECTURES[kind]))
    images, _ = inputs_of(ARCHITECTURES[kind])
    found = encoder.encode_patches(images)
    assert torch.equal(found.tokens, encoder.encode_image_tokens(images)[1])
    rows, columns = (side // patch for side, patch in zip((32, 32), found.patch_size, strict=True))
    assert found.tokens.shape[:2] == (3, rows * columns)
    lengths = found.features.norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones(3, rows * columns))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder.encode_patches(images).features.dtype == torch.float32


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_changed_patch_changes_most_at_its_place(kind):
    """The order of the patches is row by row: wrong by a transposition, this fails."""
    encoder = DualEncoder(network_of(ARCHITECTURES[kind]))
    images, _ = inputs_of(ARCHITECTURES[kind], 1)
    before = encoder.encode_patches(images)
    height, width = before.patch_size
    columns = 32 // width
    changed = images.clone()
    changed[:, :, :height, width : 2 * width] += 3  # row 0, column 1
    moved = (encoder.encode_patches(changed).tokens - before.tokens).norm(dim=2)[0]
    assert int(moved.argmax()) == 1 != columns


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


@pytest.mark.parametrize("kind", ["siglip", "clip", "custom_text"])
def test_a_view_of_the_model_s_size_has_the_tokens_of_a_whole_pass(kind):
    torch.manual_seed(1)
    towers = DualEncoder(network_of(ARCHITECTURES[kind]))
    images = torch.randn(3, 3, 32, 32)
    features, tokens = towers.encode_image_tokens(images)
    pooled, of_view = towers.encode_view(images)
    assert torch.equal(of_view, tokens)
    projection = towers.clip.visual.head if kind == "siglip" else towers.clip.visual.proj
    whole = projection(pooled) if kind == "siglip" else pooled @ projection
    assert torch.allclose(unit_rows(whole), features, atol=1e-6)
    small, small_tokens = towers.encode_view(images[..., :16, :16])
    assert small.shape == pooled.shape
    assert small_tokens.shape[1] == (1 if kind == "siglip" else 4)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_hidden_patch_is_replaced_behind_its_embedding_and_keeps_its_position(kind):
    """Pixels of it do not matter; hiding pixels instead gives something else, and is rejected."""
    torch.manual_seed(1)
    towers = DualEncoder(network_of(ARCHITECTURES[kind]))
    patch, per_side = (16, 2) if kind == "siglip" else (8, 4)
    images = torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, per_side**2, dtype=torch.bool)
    mask[0, 1] = mask[1, per_side] = True
    token = torch.randn(64 if kind == "siglip" else 16, requires_grad=True)
    found = towers.encode_view(images, mask, token)[1]
    other = images.clone()
    other[0, :, :patch, patch : 2 * patch] = 0
    other[1, :, patch : 2 * patch, :patch] = 0
    assert torch.allclose(towers.encode_view(other, mask, token)[1], found, atol=1e-6)
    assert not torch.allclose(towers.encode_view(other)[1], found, atol=1e-2)
    # The same token at two places differs by the position.
    both = torch.zeros_like(mask)
    both[:, :2] = True
    rows = towers.encode_view(images, both, token)[1]
    assert not torch.allclose(rows[:, 0], rows[:, 1], atol=1e-3)
    found.sum().backward()
    assert token.grad.any()
