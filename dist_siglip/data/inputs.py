"""What does a model want to be fed?"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


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
    """

    image_size: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    context_length: int
    tokenizer: Callable[[list[str]], Tensor]

    @classmethod
    def of(cls, model: Any) -> "ModelInputs":
        """Take the values from a built model, which has attributes of the same names."""
        return cls(**{field.name: getattr(model, field.name) for field in fields(cls)})
