"""Augmentations that shards store for each sample: read, and replayed on its picture.

They are those of torchvision's RandAugment behind a crop and a flip, as the public code of
DataCompDR writes them down: ``[[top, left, rows, columns], operations]``, with true or false
between the two for a flip. ``operations`` is null or a list of ``[number or name, magnitude]``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.transforms import CropResize, to_pixels


class Augmentation(NamedTuple):
    """What a teacher's picture was made by.

    Attributes:
        crop: top, left, rows and columns in the stored picture.
        is_flipped: left and right exchanged, after the crop.
        operations: names and magnitudes, applied in this order to the picture in its final size.
    """

    crop: tuple[int, int, int, int]
    is_flipped: bool
    operations: tuple[tuple[str, float], ...]


class UnknownOperationError(Exception):
    """An augmentation that cannot be replayed; the text says which."""


# Of torchvision's RandAugment, by their numbers in the shards, with the range of their magnitudes.
# Those of a shift are bounded by the picture.
_OPERATIONS: dict[str, tuple[float, float]] = {
    "Identity": (-math.inf, math.inf),
    "ShearX": (-10, 10),
    "ShearY": (-10, 10),
    "TranslateX": (-math.inf, math.inf),
    "TranslateY": (-math.inf, math.inf),
    "Rotate": (-360, 360),
    "Brightness": (-1, 10),
    "Color": (-1, 10),
    "Contrast": (-1, 10),
    "Sharpness": (-1, 10),
    "Posterize": (0, 8),
    "Solarize": (0, 256),
    "AutoContrast": (-math.inf, math.inf),
    "Equalize": (-math.inf, math.inf),
}
OPERATIONS = tuple(_OPERATIONS)


def parse_augmentation(stored: Any) -> Augmentation:
    """Read one entry of ``param_aug``.

    Raises:
        BadSampleError: if it has another form, or a magnitude is out of its range.
        UnknownOperationError: if it asks for anything but crop, flip and ``OPERATIONS``.

    Example:
        >>> parse_augmentation([[0, 4, 32, 32], True, [[5, -9.0]]])
        Augmentation(crop=(0, 4, 32, 32), is_flipped=True, operations=(('Rotate', -9.0),))
    """
    if not isinstance(stored, list) or not stored or not _are_numbers(stored[0], int, 4):
        raise BadSampleError("augmentation does not begin with top, left, rows and columns")
    top, left, rows, columns = stored[0]
    rest = stored[1:]
    is_flipped = rest.pop(0) if rest and isinstance(rest[0], bool) else False
    listed = rest.pop(0) if rest else None
    if rest:
        raise UnknownOperationError(f"augmentation has {len(rest)} parts behind its operations")
    if listed is not None and not isinstance(listed, list):
        raise BadSampleError(f"operations of an augmentation are a {type(listed).__name__}")
    operations = tuple(_operation(each) for each in listed or ())
    return Augmentation((top, left, rows, columns), is_flipped, operations)


def _operation(stored: Any) -> tuple[str, float]:
    if not isinstance(stored, list) or len(stored) != 2 or not _are_numbers(stored[1:], float, 1):
        raise BadSampleError("operation of an augmentation is no pair of its number and magnitude")
    name, magnitude = stored
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(OPERATIONS):
        name = OPERATIONS[name]
    if not isinstance(name, str) or name not in _OPERATIONS:
        raise UnknownOperationError(f"augmentation asks for operation {str(name)[:40]!r}")
    low, high = _OPERATIONS[name]
    if not low <= magnitude <= high or not math.isfinite(magnitude):
        raise BadSampleError(f"augmentation {name} by {magnitude}, not within {low} to {high}")
    return name, float(magnitude)


def _are_numbers(value: Any, kind: type, count: int) -> bool:
    """Whether a value is a list of so many numbers, whole ones if ``kind`` is int."""
    kinds = int if kind is int else (int, float)
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, kinds) and not isinstance(each, bool) for each in value)
        and all(abs(each) < 1 << 31 for each in value)
    )


def apply_operation(
    image: Image.Image, name: str, magnitude: float, picture_size: int
) -> Image.Image:
    """Replay an operation, to the pixels of torchvision's RandAugment at ``picture_size``.

    Args:
        image: RGB, in its final size.
        name: of ``OPERATIONS``.
        magnitude: as stored.
        picture_size: side in pixels that a magnitude of a shift belongs to; in a picture of
            another size the same share of the side is shifted.
    """
    if name in ("ShearX", "ShearY"):
        angle = math.degrees(math.atan(magnitude))
        shear = [angle, 0.0] if name == "ShearX" else [0.0, angle]
        return _moved(image, shear=shear, center=[0, 0])
    if name == "TranslateX":
        return _moved(image, translate=[int(magnitude * image.width / picture_size), 0])
    if name == "TranslateY":
        return _moved(image, translate=[0, int(magnitude * image.height / picture_size)])
    replay = _REPLAYS.get(name)
    return image if replay is None else replay(image, magnitude)


def _moved(
    image: Image.Image,
    *,
    shear: list[float] | None = None,
    translate: list[int] | None = None,
    center: list[int] | None = None,
) -> Image.Image:
    moved: Image.Image = functional.affine(
        image,
        angle=0.0,
        translate=translate or [0, 0],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        center=center,
    )
    return moved


_REPLAYS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Rotate": lambda image, magnitude: functional.rotate(image, magnitude),
    "Brightness": lambda image, magnitude: functional.adjust_brightness(image, 1 + magnitude),
    "Color": lambda image, magnitude: functional.adjust_saturation(image, 1 + magnitude),
    "Contrast": lambda image, magnitude: functional.adjust_contrast(image, 1 + magnitude),
    "Sharpness": lambda image, magnitude: functional.adjust_sharpness(image, 1 + magnitude),
    "Posterize": lambda image, magnitude: functional.posterize(image, int(magnitude)),
    "Solarize": lambda image, magnitude: functional.solarize(image, magnitude),
    "AutoContrast": lambda image, _: functional.autocontrast(image),
    "Equalize": lambda image, _: functional.equalize(image),
}


def check_inside(augmentation: Augmentation, size: tuple[int, int]) -> None:
    """Refuse a crop that is not inside of a picture.

    Args:
        augmentation: with the crop.
        size: width and height of the picture.

    Raises:
        BadSampleError: naming both.
    """
    top, left, rows, columns = augmentation.crop
    width, height = size
    if min(top, left) < 0 or min(rows, columns) < 1:
        raise BadSampleError(f"augmentation crops {augmentation.crop}, which is no rectangle")
    if top + rows > height or left + columns > width:
        raise BadSampleError(
            f"augmentation crops rows {top} to {top + rows} and columns {left} to "
            f"{left + columns} of a picture of {height} rows and {width} columns: the teachers "
            "saw it in another size"
        )


class Replay:
    """Makes the pixels that an augmentation describes.

    Args:
        crop_resize: to the size of the model.
        picture_size: as ``apply_operation``.
    """

    def __init__(self, crop_resize: CropResize, picture_size: int) -> None:
        self._crop_resize = crop_resize
        self._picture_size = picture_size

    def __call__(self, picture: EncodedPicture | Image.Image, augmentation: Augmentation) -> Tensor:
        """Replay an augmentation on a picture.

        Returns:
            (3, H, W) uint8.

        Raises:
            BadSampleError: if the crop is not inside of the picture.
        """
        check_inside(augmentation, picture.size)
        image = self._crop_resize(picture, augmentation.crop)
        if augmentation.is_flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, magnitude in augmentation.operations:
            image = apply_operation(image, name, magnitude, self._picture_size)
        return to_pixels(image)
