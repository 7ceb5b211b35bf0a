"""NaFlex towers: features of timm, of transformers and of the fixed tower; padding is not seen."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from dist_siglip.data import Preprocessing, evaluation_transform
from dist_siglip.data.samples.patches import pack_pictures, patch_mask, unpack
from dist_siglip.errors import UserError
from dist_siglip.evaluation.samples import ShardCollator, ShardSample
from dist_siglip.models import build_dual_encoder, compile_towers, naflex
from dist_siglip.models.architecture import siglip_trunk
from dist_siglip.models.build import tower_fingerprint, with_num_patches
from dist_siglip.models.dual_encoder import check_micro_batch
from dist_siglip.models.naflex import resized_positions
from tests.support.naflex import FIXED, GRIDS, SIDE, packed_of, state_of, write_models
from tests.support.tiny_models import ARCHITECTURES, write_config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("naflex"))


@pytest.fixture(scope="module")
def fixed(models):
    return build_dual_encoder(*models)


@pytest.fixture(scope="module")
def flex(models):
    built = build_dual_encoder(*models, num_patches=64)
    built.encoder.eval()
    return built


def coordinates_of(packed):
    """Row and column of each patch, as timm takes them."""
    patches, shapes = unpack(packed)
    found = torch.zeros(*patches.shape[:2], 2, dtype=torch.long)
    for own, (rows, columns) in zip(found, shapes.tolist(), strict=True):
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        own[: rows * columns] = grid.reshape(-1, 2)
    return found


def timm_features(trunk, packed, coordinates=None):
    inputs = {
        "patches": unpack(packed)[0],
        "patch_coord": coordinates_of(packed) if coordinates is None else coordinates,
        "patch_valid": patch_mask(packed),
    }
    return trunk(inputs)


def test_features_are_those_of_timm_at_six_grids_and_rows_and_columns_are_not_swapped(flex):
    visual, packed = flex.encoder.clip.visual, packed_of()
    assert visual.trunk.embeds.pos_embed_interp_mode == "bilinear"
    with torch.no_grad():
        found, theirs = visual(packed), timm_features(visual.trunk, packed)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)
    # What swaps them in positions alone is right on squares.
    swapped = packed.clone()
    swapped[:, 0, :4] = packed[:, 0, [2, 3, 0, 1]]
    with torch.no_grad():
        differences = (visual(swapped) - found).abs().amax(dim=1)
    for grid, difference in zip(GRIDS, differences.tolist(), strict=True):
        assert (difference == 0) if grid[0] == grid[1] else (difference > 1e-2), grid


@torch.no_grad()
def test_a_square_of_the_learned_grid_gives_the_features_and_tokens_of_the_fixed_tower(fixed, flex):
    fixed.encoder.eval()
    images = torch.randn(3, 3, 64, 64)
    features, tokens = fixed.encoder.encode_image_tokens(images)
    packed = pack_pictures(images, SIDE)
    assert torch.equal(flex.encoder.encode_image(images), features)
    assert torch.equal(flex.encoder.encode_image(packed), features)
    assert torch.equal(flex.encoder.encode_image_tokens(packed)[0], features)
    assert torch.equal(flex.encoder.encode_image_tokens(packed)[1], tokens)
    assert flex.encoder.image_token_shape(flex.image_size) == (64, 64)
    assert (flex.image_size, flex.patches) == (64, (SIDE, 64))


@torch.no_grad()
def test_more_padding_and_other_neighbours_change_nothing(flex):
    packed = packed_of()
    features, tokens = flex.encoder.encode_image_tokens(packed)
    for row, (rows, columns) in enumerate(GRIDS):
        number = rows * columns
        alone, own = flex.encoder.encode_image_tokens(packed[row : row + 1, : 1 + number])
        torch.testing.assert_close(alone[0], features[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(own[0], tokens[row, :number], rtol=0, atol=1e-4)
    longer = F.pad(packed, (0, 0, 0, 57))
    found = flex.encoder.encode_image(longer[[3, 0, 5]])
    torch.testing.assert_close(found, features[[3, 0, 5]], rtol=0, atol=1e-5)


def with_nan_in_padding(packed):
    broken = packed.clone()
    broken[:, 1:][~patch_mask(packed)] = float("nan")
    return broken


def test_what_padding_holds_reaches_neither_features_nor_gradients(flex):
    packed = packed_of()
    broken = with_nan_in_padding(packed).requires_grad_()
    features = flex.encoder.encode_image(broken)
    assert torch.equal(features, flex.encoder.encode_image(packed))
    weights = torch.linspace(-1, 1, features.numel()).reshape(features.shape)
    (features * weights).sum().backward()
    mask = patch_mask(packed)
    assert not broken.grad[:, 1:][~mask].any()
    assert broken.grad[:, 1:][mask].abs().sum(dim=1).all()
    # timm's own forward pass does not set padding to 0.
    trunk = flex.encoder.clip.visual.trunk
    assert timm_features(trunk, with_nan_in_padding(packed)).isnan().any()


def test_a_tower_without_its_masks_is_rejected(flex, monkeypatch):
    """The comparisons above need both masks, that of attention and that of pooling."""
    packed = packed_of()
    trunk = flex.encoder.clip.visual.trunk
    with torch.no_grad():
        expected = flex.encoder.encode_image(packed)
        head = trunk.forward_head
        monkeypatch.setattr(trunk, "forward_head", lambda rows, patch_valid: head(rows))
        pooled = flex.encoder.encode_image(packed)
        monkeypatch.undo()
        for block in trunk.blocks:
            own = block.forward
            monkeypatch.setattr(
                block, "forward", lambda rows, own=own, **_: own(rows), raising=True
            )
        attended = flex.encoder.encode_image(packed)
    padded = [rows * columns < 64 for rows, columns in GRIDS]
    for broken in (pooled, attended):
        differs = (broken - expected).abs().amax(dim=1) > 1e-3
        assert differs.tolist() == padded


def interpolated(grid, rows, columns):
    resized = F.interpolate(
        grid.permute(0, 3, 1, 2), size=(rows, columns), mode="bilinear", antialias=True
    )
    return resized.flatten(2).transpose(1, 2)[0]


def test_positions_are_those_of_an_anti_aliased_bilinear_resize():
    line = torch.tensor([0.0, 1.0, 4.0, 9.0]).reshape(1, 4, 1, 1)
    for size, expected in (
        (3, [0.3, 2.5, 7.5]),
        (2, [(3 * 1 + 4) / 7, (1 + 3 * 4 + 3 * 9) / 7]),  # (3, 3, 1, 0) / 7, (0, 1, 3, 3) / 7
        (6, [0, 0.5, (5 + 4) / 6, (1 + 5 * 4) / 6, 6.5, 9]),
        (4, [0, 1, 4, 9]),
    ):
        found = resized_positions(line, torch.tensor([[size, 1]]), size)[0, :, 0]
        assert found.tolist() == pytest.approx(expected, abs=1e-6), size
    torch.manual_seed(0)
    grid = torch.randn(1, 16, 16, 5)
    grids = [(16, 16), (8, 8), (4, 16), (16, 4), (5, 9), (7, 8), (1, 40), (40, 1), (33, 17)]
    places = max(math.prod(each) for each in grids)
    found = resized_positions(grid, torch.tensor(grids), places)
    assert torch.equal(found[0, :256], grid.reshape(256, 5))
    for own, (rows, columns) in zip(found, grids, strict=True):
        expected = interpolated(grid, rows, columns)
        torch.testing.assert_close(own[: rows * columns], expected, rtol=0, atol=2e-6)


def test_a_gradient_reaches_every_position_and_weight_as_in_timm(flex):
    trunk, packed = flex.encoder.clip.visual.trunk, packed_of()
    weights = torch.randn(len(GRIDS), 64)
    grids = []
    for features in (
        lambda: flex.encoder.clip.visual(packed),
        lambda: timm_features(trunk, packed),
    ):
        trunk.zero_grad()
        (features() * weights).sum().backward()
        grids.append({name: each.grad.clone() for name, each in trunk.named_parameters()})
    trunk.zero_grad()
    ours, theirs = grids
    for name, value in theirs.items():
        error = (ours[name] - value).norm() / value.norm()
        assert error < 1e-4, name


def test_weights_of_either_form_become_the_other_and_come_back(models, fixed, flex, tmp_path):
    tensors = {**state_of(flex), "logit_scale": torch.tensor(2.0), "logit_bias": torch.tensor(-3.0)}
    torch.save(tensors, tmp_path / "flex.pt")
    again = build_dual_encoder(models[0], str(tmp_path / "flex.pt"))
    for name, value in state_of(fixed).items():
        assert torch.equal(state_of(again)[name], value), name
    # An architecture that names timm's NaFlex tower, as open_clip 4 has it, sees one size if asked.
    named = {**FIXED, "vision_cfg": {**flex.architecture["vision_cfg"]}}
    model = write_config(tmp_path / "named.json", named)
    assert build_dual_encoder(model, str(tmp_path / "flex.pt")).patches == (SIDE, 256)
    square = build_dual_encoder(model, str(tmp_path / "flex.pt"), image_size=64)
    assert square.patches is None
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = fixed.encoder.eval().encode_image(images)
        assert torch.equal(square.encoder.eval().encode_image(images), expected)


def test_towers_that_timm_has_by_name_become_naflex_towers_of_their_sizes(tmp_path):
    """The config of ViT-B-16-SigLIP names a tower and no size."""
    architecture = {
        **ARCHITECTURES["siglip"],
        "embed_dim": 768,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
        },
    }
    changed = naflex.change_form(architecture, "m", setting="num_patches (9)")
    vision = changed["vision_cfg"]
    sizes = [vision[name] for name in ("width", "layers", "head_width", "mlp_ratio", "patch_size")]
    assert sizes == [768, 12, 64, 4, 16]
    assert vision["norm_kwargs"] == {"eps": 1e-6}
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_siglip_224", num_classes=0)
        ours = timm.create_model(**siglip_trunk(vision))
    assert ours.embeds.pos_embed.shape == (1, 14, 14, 768)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    for name, value in ours.state_dict().items():
        if not name.startswith("embeds."):
            assert value.shape == shapes[name], name
    back = naflex.change_form(changed, "m", setting="image_size (224)")["vision_cfg"]
    assert back == {**vision, "timm_model_name": "vit_base_patch16_siglip_224"}


def test_gradient_checkpointing_and_compilation_change_nothing(models, flex):
    packed = packed_of()
    weights = torch.randn(len(GRIDS), 64)
    found = []
    for checkpointing, compiled in ((False, False), (True, False), (False, True)):
        built = build_dual_encoder(*models, num_patches=64, gradient_checkpointing=checkpointing)
        if compiled:
            compile_towers(built.encoder, backend="aot_eager")
        features = built.encoder.encode_image(packed)
        (features * weights).sum().backward()
        trunk = built.encoder.clip.visual.trunk
        found.append((features, trunk.embeds.pos_embed.grad, trunk.embeds.proj.weight.grad))
    for variant in found[1:]:
        for value, expected in zip(variant, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_reads_shapes_exactly(models):
    """Grids of 1 x 300 and 300 x 1: neither number is a bfloat16."""
    packed = packed_of([(1, 300), (300, 1)], num_patches=310)
    built = build_dual_encoder(*models, num_patches=310)
    with torch.no_grad():
        expected = built.encoder.encode_image(packed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = built.encoder.encode_image(packed)
        pure = built.encoder.bfloat16().encode_image(packed.bfloat16())
    for found in (mixed, pure):
        assert (found * expected).sum(dim=1).min() > 0.99


def test_fingerprints_know_the_budget(flex):
    other = with_num_patches(flex, 32)
    assert other.patches == (SIDE, 32)
    assert tower_fingerprint(flex, "image") != tower_fingerprint(other, "image")
    assert tower_fingerprint(flex, "text") == tower_fingerprint(other, "text")


def refused(act, match):
    with pytest.raises(UserError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_what_no_naflex_tower_can_be_is_refused_in_one_line(models, fixed, flex, tmp_path):
    build = build_dual_encoder
    clip = write_config(tmp_path / "clip.json", ARCHITECTURES["clip"])
    resnet = write_config(tmp_path / "resnet.json", ARCHITECTURES["resnet"])
    for model in (clip, resnet):
        refused(lambda m=model: build(m, num_patches=16), r"num_patches \(16\) needs a ViT of timm")
    refused(lambda: build(models[0], num_patches=0), r"num_patches \(0\) must be a whole number")
    both = {"num_patches": 16, "image_size": 64}
    refused(lambda: build(models[0], **both), "set one of them to null")
    dropping = {"num_patches": 16, "patch_dropout": 0.5}
    refused(lambda: build(models[0], **dropping), "patch_dropout leaves out padding")
    prefixed = {**FIXED, "embed_dim": 768}
    prefixed["vision_cfg"] = {
        "image_size": 256,
        "timm_model_name": "naflexvit_base_patch16_gap",
        "timm_pool": "avg",
        "timm_proj": "none",
    }
    path = write_config(tmp_path / "gap.json", prefixed)
    with torch.device("meta"):
        refused(lambda: build(path), "needs one learned grid of positions and no tokens beside")
    refused(lambda: with_num_patches(fixed, 4), "this model sees one size, 64; leave it out")
    refused(lambda: with_num_patches(flex, 0), r"num_patches \(0\) must be a whole number")
    for patches, budget, size, match in (
        (None, 64, None, r"micro_batch_patches \(64\) is of pictures of any shape"),
        (flex.patches, 64, 2, "set one of them to null"),
        (flex.patches, 0, None, r"must be at least 1, and at least the longest"),
    ):
        refused(lambda each=(patches, budget, size): check_micro_batch(*each), match)
    check_micro_batch(flex.patches, 64, None)
    check_micro_batch(None, None, 2)


@torch.no_grad()
def test_a_rank_without_rows_has_a_grey_picture_to_encode(flex):
    transform = evaluation_transform(Preprocessing.of(flex))
    grey = transform(Image.new("RGB", (16, 16), (128, 128, 128)))
    bad = ShardSample(7, problem="cannot be decoded")
    batch = ShardCollator(flex.tokenizer, most_texts=1, placeholder=grey)([bad])
    assert (batch.sample_ids, batch.images.shape) == ([], (1, 65, 192))
    assert flex.encoder.encode_image(batch.images).isfinite().all()


def test_a_tower_is_built_without_values_as_with_them(models, flex):
    with torch.device("meta"):
        empty = build_dual_encoder(*models, num_patches=64)
    assert empty.awaits_weights
    assert empty.patches == flex.patches
    shapes = [
        {name: value.shape for name, value in state_of(each).items()} for each in (empty, flex)
    ]
    assert shapes[0] == shapes[1]
    assert all(value.is_meta for value in empty.encoder.parameters())
