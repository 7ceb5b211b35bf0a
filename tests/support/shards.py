"""Small webdataset shards on disk, of deliberately uneven sizes, written by webdataset itself."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from webdataset import TarWriter

from dist_siglip.data.index.read import read_index
from dist_siglip.data.samples.transforms import Preprocessing
from dist_siglip.errors import UserError

UNEVEN = (7, 1, 12, 5, 9, 3)  # samples of each shard; 37 in all


def picture(sample_id: int, side: int = 20) -> Image.Image:
    """Noise that no two samples share."""
    pixels = np.random.default_rng(sample_id).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width, height, seed=0):
    """Smooth shapes with a little noise: compresses and shrinks like a photograph."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + generator.normal(0, 4, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def caption(sample_id: int) -> str:
    return f"pair number {sample_id}"


def write_shard(path: Path, members: list[tuple[str, dict[str, bytes]]], **options) -> Path:
    """Write one shard from (key, {extension: bytes}); options go to ``TarWriter``."""
    with TarWriter(str(path), encoder=False, **options) as writer:
        for key, parts in members:
            writer.write({"__key__": key, **parts})
    return path


def write_shards(folder: Path, counts: tuple[int, ...] = UNEVEN) -> list[str]:
    """Write shards whose sample ids run on from shard to shard; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for number, count in enumerate(counts):
        members = [
            (f"{i:06d}", {"png": encode(picture(i)), "txt": caption(i).encode()})
            for i in range(first, first + count)
        ]
        paths.append(str(write_shard(folder / f"{number:05d}.tar", members)))
        first += count
    return paths


def tokenize(texts: list[str]) -> torch.Tensor:
    """Code points of the first 24 characters, padded with zeros."""
    codes = [[ord(letter) for letter in text[:24]] for text in texts]
    return torch.tensor([row + [0] * (24 - len(row)) for row in codes])


def tiny_inputs() -> Preprocessing:
    """Inputs of an imaginary model: 16 x 16 pixels, 24 characters."""
    return Preprocessing(
        image_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        resize_mode="squash",
        context_length=24,
        tokenizer=tokenize,
    )


def load_index(path, cache=None):
    """The index of a shard that must be sound."""
    index = read_index(path, cache=cache)
    if index.damage:
        raise UserError(index.damage)
    return index
