"""Transparent pictures on a ground of one colour, and every mode of Pillow in 8-bit colours.

Alpha comes in three ways: as a channel (RGBA, LA, WebP), as a share of each entry of a palette,
and as one colour that counts as transparent (the chunk tRNS of a PNG). What is hidden has colours
too, which ``convert("RGB")`` would show.
"""

import numpy as np
from PIL import Image

from dist_siglip.data.samples.picture_policy import DROP

# Pillow converts modes with premultiplied alpha only back to those without.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def flatten(image: Image.Image, transparency: str) -> Image.Image:
    """Return a picture of any mode in RGB; the one given stays as it is.

    16 bits are rounded to 8. What is laid on a colour c has channels
    ``alpha * channel + (1 - alpha) * c``, rounded, as ``PIL.Image.alpha_composite`` does it.

    Args:
        image: any mode.
        transparency: as ``PicturePolicy.transparency``.

    Example:
        >>> hidden_red = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
        >>> flatten(hidden_red, "#0000ff").getpixel((0, 0))
        (0, 0, 255)
        >>> flatten(hidden_red, "drop").getpixel((0, 0))
        (255, 0, 0)
    """
    if transparency == DROP or not image.has_transparency_data:
        return _without_alpha(image)
    layer = to_rgba(image)
    if layer.getchannel("A").getextrema() == (255, 255):
        return _without_alpha(layer)
    ground = Image.new("RGBA", layer.size, transparency)
    flat = Image.alpha_composite(ground, layer).convert("RGB")
    flat.info = {name: layer.info[name] for name in layer.info if name != "transparency"}
    return flat


def to_rgba(image: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGBA, opaque where it says nothing of transparency.

    Example:
        >>> to_rgba(Image.new("L", (1, 1), 7)).getpixel((0, 0))
        (7, 7, 7, 255)
    """
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode == "RGBA":
        return image
    if not image.mode.startswith("I"):
        return image.convert("RGBA")
    layer = _without_alpha(image).convert("RGBA")
    key = image.info.get("transparency")
    if key is not None:
        layer.putalpha(Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)))
    return layer


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return the colours alone, those of transparent places too."""
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    elif image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    elif image.mode == "P" and "transparency" in image.info:
        image = image.copy()  # Pillow warns of entries with alpha when it converts them
        del image.info["transparency"]
    flat = image.convert("RGB")
    flat.info.pop("transparency", None)
    return flat


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Round grey values of 16 bits to 8; Pillow would cut them off at 255."""
    grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
    grey += 128
    grey //= 257
    rounded = Image.fromarray(grey.astype(np.uint8))
    rounded.info = dict(image.info)
    rounded.info.pop("transparency", None)
    return rounded
