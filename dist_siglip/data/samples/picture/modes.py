"""Colours of pictures of any mode in RGB.

Alpha comes in three ways: as a channel (RGBA, LA, WebP), as a share of each entry of a palette,
and as one colour that counts as transparent (the chunk tRNS of a PNG). ``flatten`` lays such
pictures on a colour; ``convert("RGB")`` would show what is hidden.
"""

import numpy as np
from PIL import Image

from dist_siglip.data.samples.picture_policy import DROP

# Pillow converts modes with premultiplied alpha only back to those without.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


IntensityWindow = tuple[float, float] | None


def flatten(image: Image.Image, transparency: str, window: IntensityWindow = None) -> Image.Image:
    """Return a picture of any mode in RGB; the one given stays as it is.

    Grey of 16 or 32 bits is rounded to 8. What is laid on a colour c has channels
    ``alpha * channel + (1 - alpha) * c``, rounded, as ``PIL.Image.alpha_composite`` does it.

    Args:
        image: any mode.
        transparency: as ``PicturePolicy.transparency``.
        window: as ``PicturePolicy.intensity_window``.

    Example:
        >>> hidden_red = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
        >>> flatten(hidden_red, "#0000ff").getpixel((0, 0))
        (0, 0, 255)
        >>> flatten(hidden_red, "drop").getpixel((0, 0))
        (255, 0, 0)
    """
    if transparency == DROP or not image.has_transparency_data:
        return _without_alpha(image, window)
    layer = to_rgba(image, window)
    if layer.getchannel("A").getextrema() == (255, 255):
        return _without_alpha(layer, window)
    ground = Image.new("RGBA", layer.size, transparency)
    flat = Image.alpha_composite(ground, layer).convert("RGB")
    flat.info = {name: layer.info[name] for name in layer.info if name != "transparency"}
    return flat


def to_rgba(image: Image.Image, window: IntensityWindow = None) -> Image.Image:
    """Return a picture of any mode in RGBA, opaque where it says nothing of transparency.

    Args:
        image: any mode.
        window: as ``flatten``.

    Example:
        >>> to_rgba(Image.new("L", (1, 1), 7)).getpixel((0, 0))
        (7, 7, 7, 255)
    """
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode == "RGBA":
        return image
    if not _is_rounded(image, window):
        return image.convert("RGBA")
    layer = _without_alpha(image, window).convert("RGBA")
    key = image.info.get("transparency")
    if key is not None:
        layer.putalpha(Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)))
    return layer


def _without_alpha(image: Image.Image, window: IntensityWindow) -> Image.Image:
    """Return the colours alone, those of transparent places too."""
    if _is_rounded(image, window):
        image = _to_8_bits(image, window)
    elif image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    elif image.mode == "P" and "transparency" in image.info:
        image = image.copy()  # Pillow warns of entries with alpha when it converts them
        del image.info["transparency"]
    flat = image.convert("RGB")
    flat.info.pop("transparency", None)
    return flat


def is_deep(image: Image.Image) -> bool:
    """Whether a picture is grey of more than 8 bits: modes "I", "I;16", "F" and their like."""
    return image.mode[0] in "IF"


def _is_rounded(image: Image.Image, window: IntensityWindow) -> bool:
    """Whether values are brought to 8 bits here; Pillow cuts fractions off at 0 and 255."""
    return is_deep(image) and (image.mode != "F" or window is not None)


def _to_8_bits(image: Image.Image, window: IntensityWindow) -> Image.Image:
    """Round grey values of more than 8 bits to 8; Pillow would cut them off at 255."""
    values = np.asarray(image)
    if window is not None and values.dtype.kind == "u" and values.dtype.itemsize == 2:
        grey = _spread(np.arange(1 << 16), window)[values]
    elif window is not None:
        grey = _spread(values, window)
    else:
        grey = values.clip(0, 65535).astype(np.uint32)
        grey += 128
        grey //= 257
    rounded = Image.fromarray(grey.astype(np.uint8))
    rounded.info = dict(image.info)
    rounded.info.pop("transparency", None)
    return rounded


def _spread(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Spread the values of a window evenly over 8 bits, and cut off what is beyond."""
    low, high = window
    share = values.astype(np.float64)
    with np.errstate(all="ignore"):  # fractions that are no number or beyond all bounds
        share -= low
        share /= high - low
    np.nan_to_num(share, copy=False).clip(0, 1, out=share)
    share *= 255
    return np.rint(share, out=share).astype(np.uint8)
