"""Pictures that stand in for photographs in a benchmark.

Smooth shapes with the noise of a camera, as JPEGs of quality 90: about as many bytes per pixel, and
so as much work for a decoder, as scaled-down photographs have.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

PICTURE_SIZES = ((256, 320), (512, 640), (1024, 1280))
_GRAIN = 16  # pixels between two random colours
_NOISE = 5.0  # standard deviation, of 255


def write_photo_shards(
    folder: Path, size: tuple[int, int], count: int, num_shards: int
) -> list[str]:
    """Write shards of photo-like JPEGs with captions.

    Args:
        folder: made if missing.
        size: (width, height) in pixels.
        count: pictures over all shards.
        num_shards: shards of about equal size.

    Returns:
        The paths.
    """
    os.environ["WDS_SECURE"] = "1"  # read once, at webdataset's first import
    from webdataset import TarWriter

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = []
    for number, ids in enumerate(np.array_split(np.arange(count), num_shards)):
        path = str(folder / f"{number:05d}.tar")
        with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in ids.tolist():
                writer.write(
                    {
                        "__key__": f"{sample:06d}",
                        "jpg": _photo(generator, size),
                        "txt": f"a photo of subject number {sample}".encode(),
                    }
                )
        paths.append(path)
    return paths


def _photo(generator: np.random.Generator, size: tuple[int, int]) -> bytes:
    width, height = size
    shape = (height // _GRAIN + 2, width // _GRAIN + 2, 3)
    colours = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
    smooth = np.asarray(colours.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    noise = generator.standard_normal(smooth.shape, dtype=np.float32) * _NOISE
    buffer = io.BytesIO()
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
