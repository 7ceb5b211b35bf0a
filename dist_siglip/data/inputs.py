"""What does a model want to be fed?"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from dist_siglip.picture_policy import PicturePolicy


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """Preprocessing that belongs to a model, in plain values.

    Attributes:
        image_size: side of a square picture in pixels, or (height, width).
        mean: of red, green and blue, on the scale 0 to 1.
        std: of red, green and blue, on the scale 0 to 1.
        interpolation: "bicubic", "bilinear" or "random" (bicubic outside training).
        resize_mode: "shortest" (resize the short side, crop the middle), "longest" (resize the long
            side, pad) or "squash" (ignore the aspect ratio), as in open_clip.
        context_length: tokens of a text.
        tokenizer: list of B strings to (B, context_length) token ids.
        pictures: what decides the pixels of an encoded picture.
    """

    image_size: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    context_length: int
    tokenizer: Callable[[list[str]], Tensor]
    pictures: PicturePolicy = field(default_factory=PicturePolicy)

    @classmethod
    def of(cls, model: Any) -> "ModelInputs":
        """Take the values from a built model, which has attributes of the same names."""
        return cls(**{each.name: getattr(model, each.name) for each in fields(cls)})
