"""Pictures of any shape become patches: sizes, order of values, padding, crops, normalisation."""

import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from dist_siglip.data import ImageNormalizer, evaluation_transform, training_transform
from dist_siglip.data.samples.patches import (
    PatchBudget,
    pack_pictures,
    patch_mask,
    target_grid,
    unpack,
    unpack_pictures,
)
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import Preprocessing, at_length
from dist_siglip.errors import UserError
from tests.support.shards import photo, tiny_inputs

LENGTHS = (128, 256, 576, 784, 1024)


def bisected(height, width, patch, budget, tolerance=1e-5):
    """Rows and columns by big_vision's bisection, in float64."""

    def grid(zoom):
        return [max(1, math.ceil(side * zoom / patch)) for side in (height, width)]

    low, high = 1e-6, 100.0
    while high - low >= tolerance:
        middle = (low + high) / 2
        if math.prod(grid(middle)) <= budget:
            low = middle
        else:
            high = middle
    return tuple(grid(low))


@pytest.mark.parametrize(
    ("picture", "grids"),
    [
        ((224, 224), ((11, 11), (16, 16), (24, 24), (28, 28), (32, 32))),
        ((512, 512), ((11, 11), (16, 16), (24, 24), (28, 28), (32, 32))),
        ((480, 640), ((9, 12), (14, 18), (21, 27), (24, 32), (27, 36))),
        ((333, 500), ((9, 14), (13, 19), (19, 29), (23, 34), (26, 39))),
        ((1080, 1920), ((8, 15), (12, 21), (18, 32), (21, 37), (24, 42))),
        ((2200, 1700), ((12, 10), (18, 14), (27, 21), (32, 24), (36, 28))),
        ((100, 1000), ((4, 32), (5, 50), (8, 72), (9, 87), (10, 100))),
    ],
)
def test_sizes_are_those_of_the_table(picture, grids):
    assert tuple(target_grid(*picture, 16, length) for length in LENGTHS) == grids


@pytest.mark.parametrize(
    ("picture", "patch", "budget", "size"),
    [
        ((48, 48), 3, 121, (33, 33)),
        ((112, 109), 7, 225, (105, 105)),
        ((176, 176), 11, 64, (88, 88)),
        ((256, 64), 16, 12, (96, 32)),
        ((256, 64), 8, 15, (56, 16)),
        ((63, 241), 16, 16, (32, 128)),
        ((16, 512), 16, 16, (16, 256)),
    ],
)
def test_sizes_are_those_that_big_vision_tests(picture, patch, budget, size):
    assert tuple(side * patch for side in target_grid(*picture, patch, budget)) == size


def test_sizes_are_those_of_a_bisection_and_keep_to_the_budget():
    draw = random.Random(0)
    num_different = 0
    for _ in range(1500):
        height, width = draw.randint(1, 4000), draw.randint(1, 4000)
        patch, budget = draw.choice((8, 14, 16)), draw.choice((1, 2, 7, *LENGTHS))
        rows, columns = target_grid(height, width, patch, budget)
        assert rows * columns <= budget
        assert (rows, columns) == bisected(height, width, patch, budget, 1e-12)
        # The original stops 1e-5 before the limit: a side may then be one short of it.
        num_different += (rows, columns) != bisected(height, width, patch, budget)
        # One more step of the zoom exceeds the budget, or the largest zoom.
        zoom = min(rows * patch / height, columns * patch / width)
        grown = (math.floor(side * zoom / patch + 1e-9) + 1 for side in (height, width))
        assert zoom >= 100 or math.prod(grown) > budget
    assert num_different <= 3


def test_a_tiny_picture_is_enlarged_a_hundred_times_at_most():
    assert target_grid(1, 1, 16, 1024) == bisected(1, 1, 16, 1024) == (7, 7)
    assert target_grid(3, 2, 16, 1024) == bisected(3, 2, 16, 1024) == (19, 13)


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (5, 2), (1, 300)])
def test_a_patch_is_row_column_colour_and_patches_go_row_by_row(rows, columns):
    side = 4
    pixels = torch.randint(0, 256, (2, 3, rows * side, columns * side), dtype=torch.uint8)
    packed = pack_pictures(pixels, side, rows * columns + 3)
    patches, shapes = unpack(packed)
    assert packed.dtype == torch.uint8
    assert shapes.tolist() == [[rows, columns]] * 2
    for row in range(rows):
        for column in range(columns):
            own = pixels[1, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            expected = [
                own[c, y, x].item() for y in range(side) for x in range(side) for c in range(3)
            ]
            assert patches[1, row * columns + column].tolist() == expected
    mask = patch_mask(packed)
    assert mask.sum(dim=1).tolist() == [rows * columns] * 2
    assert not patches[~mask].any()
    for found, picture in zip(unpack_pictures(packed), pixels, strict=True):
        assert torch.equal(found[0], picture)


def test_pictures_that_are_not_packed_have_no_padding_and_wrong_sides_are_refused():
    assert patch_mask(torch.zeros(2, 3, 8, 8)) is None
    with pytest.raises(UserError, match="8 x 9 pixels cannot be cut into patches of 4") as caught:
        pack_pictures(torch.zeros(3, 8, 9), 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (PatchBudget(16, 0), r"num_patches \(0\) must be a whole number from 1 to 65535"),
        (PatchBudget(16, "many"), r"num_patches \(many\) must be"),
        (PatchBudget(1, 16), r"patch_size \(1\) of a NaFlex tower must be at least 2"),
    ],
)
def test_a_budget_below_a_patch_is_refused_in_one_line(budget, message):
    with pytest.raises(UserError, match=message) as caught:
        budget.check()
    assert "\n" not in str(caught.value)


def inputs_of(budget):
    return Preprocessing(**{**vars(tiny_inputs()), "patches": budget})


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return EncodedPicture(buffer.getvalue(), PicturePolicy())


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (64, 64), (5, 3)])
def test_an_evaluation_resizes_the_whole_picture_bilinearly_with_anti_aliasing(size):
    image = photo(*size, seed=1)
    (found,) = unpack_pictures(evaluation_transform(inputs_of(PatchBudget(8, 16)))(image)[None])
    rows, columns = target_grid(size[1], size[0], 8, 16)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(
        pixels, size=(rows * 8, columns * 8), mode="bilinear", antialias=True
    )
    assert (found.double() - expected).abs().max() <= 1  # Pillow rounds between the two axes


def test_bytes_and_decoded_pictures_and_other_lengths_give_the_same_patches():
    transform = evaluation_transform(inputs_of(PatchBudget(8, 16)))
    image = photo(90, 40)
    assert torch.equal(transform(encoded(image)), transform(image))
    assert transform(image).shape == (17, 192)
    longer = at_length(transform, 40)(image)
    assert longer.shape == (41, 192)
    assert unpack(longer[None])[1].tolist() == [list(target_grid(40, 90, 8, 40))]
    assert at_length(transform, 0) is transform


def test_a_training_crop_keeps_the_shape_of_its_picture():
    """Pixels tell where they come from: red across, green down."""
    width, height = 240, 80
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(width)
    ramp[..., 1] = np.arange(height)[:, None]
    image = Image.fromarray(ramp)
    inputs = inputs_of(PatchBudget(8, 48))
    torch.manual_seed(0)
    starts = set()
    for _ in range(20):
        transform = training_transform(inputs, (0.25, 0.25))
        packed, window = transform.with_window(image)
        ((red, green, _),) = unpack_pictures(packed[None])[0]
        # Boxes of regions move with what is seen.
        assert window.left * width == pytest.approx(int(red.min()), abs=2)
        assert window.top * height == pytest.approx(int(green.min()), abs=2)
        assert window.right - window.left == pytest.approx(window.bottom - window.top) == 0.5
        assert red.shape == (32, 96)  # 4 x 12 patches: the shape of the picture
        assert int(red.max()) - int(red.min()) == pytest.approx(width / 2, abs=4)
        assert int(green.max()) - int(green.min()) == pytest.approx(height / 2, abs=4)
        starts.add((int(red.min()), int(green.min())))
    assert len(starts) > 10
    whole = training_transform(inputs, None)
    assert torch.equal(whole(image), evaluation_transform(inputs)(image))


def test_a_scaled_decode_gives_the_same_shape_and_nearly_the_same_pixels():
    image = photo(800, 400)
    picture = encoded(image, format="JPEG", quality=95)
    inputs = inputs_of(PatchBudget(8, 32))
    found, exact = (
        training_transform(inputs, None, scaled_decode=scaled)(picture) for scaled in (True, False)
    )
    assert torch.equal(found[0], exact[0])
    assert (found.float() - exact.float()).abs().mean() < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_normalised_as_pictures_are_and_shapes_stay(dtype):
    normalizer = ImageNormalizer((0.4, 0.5, 0.6), (0.5, 0.25, 0.3))
    pixels = torch.randint(0, 256, (2, 3, 8, 300 * 8), dtype=torch.uint8)
    packed = pack_pictures(pixels, 8, 310)
    found = normalizer.pixels(packed, dtype)
    assert found.dtype == dtype
    patches, shapes = unpack(found)
    assert shapes.tolist() == [[1, 300]] * 2
    expected = normalizer.pixels(pixels, dtype)
    assert torch.equal(torch.cat(unpack_pictures(found)), expected)
    assert patches.isfinite().all()
    assert normalizer.pixels(found) is found
