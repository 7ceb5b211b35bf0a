"""Folders of pictures with masks, and a model whose patches are known by hand."""

import numpy as np
import torch
from PIL import Image

from dist_siglip.evaluation import EvaluatedModel
from dist_siglip.models.dual_encoder import PatchTokens
from tests.support.benchmark_models import known_model
from tests.support.pngs import GREY, PALETTE, png_of
from tests.support.shards import encode

SIDE, PATCH = 16, 4  # of the model, in pixels
NAMES = ["ground", "cat", "dog", "sofa"]
WIDTH = 5  # of tokens


def scene(number, side=SIDE):
    """A picture of coloured rectangles with noise, and their labels; 255 in some places."""
    generator = np.random.default_rng(number)
    labels = np.zeros((side, side), dtype=np.int64)
    for _ in range(2):
        top, left = generator.integers(0, side - 7, 2)
        height, width = generator.integers(5, 12, 2)
        box = slice(top, top + height), slice(left, left + width)
        labels[box] = generator.integers(1, 4)
        labels[top, box[1]] = 255
    if number % 2:
        labels[-PATCH:, -3:] = 255
    colours = np.array([[40, 40, 40], [200, 60, 40], [60, 190, 60], [50, 60, 210]])
    pixels = colours[np.where(labels == 255, 0, labels)]
    # One error for all pixels of a patch: a mean would take smaller ones away.
    noise = generator.normal(0, 45, (side // PATCH, side // PATCH, 3))
    pixels = pixels + noise.repeat(PATCH, 0).repeat(PATCH, 1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), labels


def mask_png(labels, kind=GREY, bits=8):
    from tests.support.hostile import chunk

    palette = [chunk(b"PLTE", bytes(768))] if kind == PALETTE else []
    return png_of(kind, bits, np.asarray(labels)[:, :, None], *palette)


def write_scenes(folder, counts=(7, 5), side=SIDE):
    """images/train, masks/train, images/val, masks/val and classes.txt."""
    first = 0
    for split, count in zip(("train", "val"), counts, strict=True):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(first, first + count):
            picture, labels = scene(number, side)
            (folder / f"images/{split}/{number:03d}.png").write_bytes(encode(picture))
            (folder / f"masks/{split}/{number:03d}.png").write_bytes(mask_png(labels))
        first += count
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def patch_means(pixels):
    """(B, 3, H, W) uint8 to (B, T, 3) mean colours of patches, in float64."""
    rows = pixels.double().unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))
    return rows.mean(dim=(3, 5)).flatten(2).transpose(1, 2)


def encode_patches(pixels):
    generator = torch.Generator().manual_seed(3)
    to_tokens = torch.randn(3, WIDTH, generator=generator).double() / 60
    to_features = torch.randn(3, 6, generator=generator).double() / 60
    means = patch_means(pixels)
    features = torch.nn.functional.normalize(torch.sin(means @ to_features), dim=2)
    return PatchTokens(torch.tanh(means @ to_tokens).float(), features.float(), (PATCH, PATCH))


def patch_model(calls=None):
    """``known_model``, which also knows patches; counts their pictures as "patches"."""

    def counted(pixels):
        if calls is not None:
            calls.append(("patches", len(pixels)))
        return encode_patches(pixels)

    model: EvaluatedModel = known_model(calls)
    return model._replace(encode_patches=counted)
