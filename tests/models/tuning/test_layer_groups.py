import open_clip
import pytest
import timm
from torch import nn

from dist_siglip.models import DualEncoder
from dist_siglip.models.tuning import layer_groups
from tests.support.tiny_models import ARCHITECTURES, network_of


def groups_of(encoder, tower):
    """Parameter names by how many groups are behind them."""
    groups = {}
    for name, place in layer_groups(encoder).items():
        if place.tower == tower:
            groups.setdefault(place.groups_behind, []).append(name)
    return dict(sorted(groups.items()))


def test_every_parameter_has_a_place_and_towers_are_told_apart():
    for architecture in ARCHITECTURES.values():
        encoder = DualEncoder(network_of(architecture))
        found = layer_groups(encoder)
        assert list(found) == [
            *[n for n, _ in encoder.named_parameters() if n.startswith("clip.visual.")],
            *[n for n, _ in encoder.named_parameters() if not n.startswith("clip.visual.")],
        ]
        assert {n for n, p in found.items() if p.tower == "image"} == {
            f"clip.visual.{n}" for n, _ in encoder.clip.visual.named_parameters()
        }


def test_a_vit_of_open_clip_has_stem_blocks_and_head():
    model = open_clip.create_model("ViT-B-32")
    image, text = (groups_of(DualEncoder(model), tower) for tower in ("image", "text"))
    assert list(image) == list(text) == list(range(14))  # head, 12 blocks, stem
    assert image[0] == [
        "clip.visual.proj",
        "clip.visual.ln_post.weight",
        "clip.visual.ln_post.bias",
    ]
    assert all("resblocks.11." in name for name in image[1])
    assert all("resblocks.0." in name for name in text[12])
    assert set(text[0]) == {"clip.text_projection", "clip.ln_final.weight", "clip.ln_final.bias"}
    assert set(text[13]) == {"clip.positional_embedding", "clip.token_embedding.weight"}
    assert "clip.visual.conv1.weight" in image[13]


def test_a_siglip_pools_in_its_head():
    encoder = DualEncoder(network_of(ARCHITECTURES["siglip"]))
    image = groups_of(encoder, "image")
    assert list(image) == list(range(8))  # test_vit has six blocks
    assert any("attn_pool" in name for name in image[0])
    assert not any("attn_pool" in name for behind in range(1, 8) for name in image[behind])
    assert "clip.visual.trunk.patch_embed.proj.weight" in image[7]
    text = groups_of(encoder, "text")
    assert "clip.text.text_projection.weight" in text[0]
    assert "clip.text.token_embedding.weight" in text[2]


class Wrapped(nn.Module):
    """A timm trunk where open_clip has it."""

    def __init__(self, name):
        super().__init__()
        self.clip = nn.Module()
        self.clip.visual = nn.Module()
        self.clip.visual.trunk = timm.create_model(name, num_classes=0)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_blocks_of_timm_are_those_of_its_own_groups(name):
    encoder = Wrapped(name)
    trunk = encoder.clip.visual.trunk
    theirs = timm.models.group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    found = layer_groups(encoder)
    pairs = {}  # our number -> theirs, for the parameters inside blocks
    for parameter, group in theirs.items():
        place = found[f"clip.visual.trunk.{parameter}"]
        if (
            any(c in f".{parameter}" for c in (".blocks.", ".layer"))
            and "downsample" not in parameter
        ):
            pairs.setdefault(place.groups_behind, set()).add(group)
    assert len(pairs) > 1
    assert all(len(groups) == 1 for groups in pairs.values())
    order = [groups.pop() for _, groups in sorted(pairs.items())]
    assert order == sorted(order, reverse=True)


def test_a_resnet_of_open_clip_goes_block_by_block():
    image = groups_of(DualEncoder(network_of(ARCHITECTURES["resnet"])), "image")
    assert list(image) == list(range(6))  # attention pool, one block in each of 4 layers, stem
    assert all("attnpool" in name for name in image[0])
    assert all(".layer4." in name for name in image[1])
    assert "clip.visual.conv1.weight" in image[5]
