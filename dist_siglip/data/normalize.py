"""How do bytes become the floats a model was trained on, wherever the batch is?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_siglip.data.batch import ImageTextBatch


class ImageNormalizer:
    """Turn (B, 3, H, W) uint8 into float32, (value / 255 - mean) / std for each channel.

    To the last bit what torchvision's ``ToTensor`` and ``Normalize`` make of each picture on the
    CPU. Floats pass unchanged.

    Args:
        mean: of red, green and blue, on the scale 0 to 1.
        std: likewise, > 0.

    Example:
        >>> bright = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
        >>> ImageNormalizer((0.5, 0.5, 0.5), (0.5, 0.5, 0.25)).pixels(bright).flatten()
        tensor([1., 1., 2.])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean = tuple(mean)
        self._std = tuple(std)

    def __call__(self, batch: ImageTextBatch) -> ImageTextBatch:
        """Normalise the images of a batch, on the device they are on."""
        return batch._replace(images=self.pixels(batch.images))

    def pixels(self, images: Tensor) -> Tensor:
        """Normalise (B, 3, H, W) pixels."""
        if images.is_floating_point():
            return images
        mean, std = (
            torch.tensor(values, device=images.device).reshape(3, 1, 1)
            for values in (self._mean, self._std)
        )
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)
