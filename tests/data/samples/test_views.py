"""Further views of a picture: what they show, and that nothing else changes for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_siglip.data import PairCollator, PairDataset, StreamPosition
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.samples.batch import BatchPieces
from dist_siglip.data.samples.dataset import seeded_generators
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import ViewRule, ViewTransform, training_transform
from tests.support.shards import jpeg, photo, tiny_inputs, tokenize, write_shards

RULE = ViewRule(global_scale=(0.4, 1.0), local_views=3, local_size=8, local_scale=(0.05, 0.4))


def dataset_of(shards, rule):
    inputs = tiny_inputs()
    views = None if rule is None else ViewTransform(rule, inputs, scaled_decode=True)
    return PairDataset(
        build_pair_table(shards, image_extensions=("png",)),
        training_transform(inputs, (0.5, 1.0)),
        seed=3,
        pictures=PicturePolicy(),
        views=views,
    )


def test_samples_with_views_are_those_without_and_views_are_their_own(tmp_path):
    shards = write_shards(tmp_path)
    plain, with_views = dataset_of(shards, None), dataset_of(shards, RULE)
    fewer = dataset_of(shards, replace(RULE, local_views=0))
    seen = []
    for number in range(4):
        at = StreamPosition(sample_id=number, epoch=0, position=number)
        ours, theirs = with_views[at], plain[at]
        assert torch.equal(ours.image, theirs.image)
        assert (ours.caption, ours.draw) == (theirs.caption, theirs.draw)
        assert (theirs.view, theirs.local_views) == (None, None)
        assert ours.view.shape == (3, 16, 16)
        assert ours.local_views.shape == (3, 3, 8, 8)
        assert ours.view.dtype == ours.local_views.dtype == torch.uint8
        assert fewer[at].local_views is None
        assert fewer[at].view.shape == (3, 16, 16)
        again = with_views[at]
        assert torch.equal(again.view, ours.view)
        assert torch.equal(again.local_views, ours.local_views)
        seen.append(ours)
    batch = PairCollator(tokenize)(seen)
    assert batch.views.shape == (4, 3, 16, 16)
    assert batch.local_views.shape == (4, 3, 3, 8, 8)
    joined = BatchPieces((batch, batch)).join(torch.device("cpu"))
    assert torch.equal(joined.local_views, torch.cat([batch.local_views] * 2))
    bare = PairCollator(tokenize)([plain[StreamPosition(sample_id=0, epoch=0, position=0)]])
    assert bare.views is None
    assert BatchPieces((bare, bare)).join(torch.device("cpu")).views is None


def ramp(size=(80, 60)):
    """A picture whose red tells the column and whose green tells the row."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def still(rule):
    """Views without their changes of colour, flip and blur."""
    transform = ViewTransform(rule, tiny_inputs(), scaled_decode=False)
    transform._change = transform._change_local = lambda image: image
    return transform


def area(view):
    """Share of the ramp that a view shows, by the colours at its corners."""
    spans = [(view[c].float().max() - view[c].float().min()) / 255 for c in (0, 1)]
    return (spans[0] * spans[1]).item()


def test_views_keep_the_shares_of_the_area_that_the_rule_says():
    transform, areas, local = still(RULE), [], []
    with seeded_generators(1):
        for _ in range(40):
            view, views = transform(ramp())
            areas.append(area(view))
            local += [area(each) for each in views]
    assert 0.3 < min(areas) < 0.6 < 0.75 < max(areas) <= 1.0
    assert 0.02 < min(local) < 0.1
    assert 0.25 < max(local) < 0.45


@pytest.mark.parametrize("size", [(640, 480), (64, 48)])
def test_a_jpeg_decoded_at_a_scale_gives_views_near_those_in_full(size):
    data = jpeg(photo(*size))
    found = []
    for scaled in (True, False):
        transform = ViewTransform(RULE, tiny_inputs(), scaled_decode=scaled)
        picture = EncodedPicture(data, PicturePolicy())
        with seeded_generators(2):
            found.append(transform(picture))
    for ours, theirs in zip(*found, strict=True):
        assert (ours.float() - theirs.float()).abs().mean() < 8


def test_colours_flips_and_blur_are_drawn_from_the_generators_of_torch():
    transform = ViewTransform(RULE, tiny_inputs(), scaled_decode=False)
    kinds = set()
    for seed in range(12):
        with seeded_generators(seed):
            view, _ = transform(ramp())
        is_grey = torch.equal(view[0], view[1])
        is_flipped = not is_grey and view[0, 8, 0] > view[0, 8, -1]
        kinds.add("grey" if is_grey else "flipped" if is_flipped else "as it was")
    assert kinds == {"grey", "flipped", "as it was"}
