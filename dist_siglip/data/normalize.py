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
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: ImageTextBatch) -> ImageTextBatch:
        """Normalise the images of a batch, on the device they are on."""
        return batch._replace(images=self.pixels(batch.images))

    def pixels(self, images: Tensor) -> Tensor:
        """Normalise (B, 3, H, W) pixels."""
        if images.is_floating_point():
            return images
        mean, std = self._constants(images.device)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and std, (3, 1, 1), sent to a device once: each copy may wait for it."""
        if device not in self._by_device:
            mean = torch.tensor(self._mean, device=device).reshape(3, 1, 1)
            std = torch.tensor(self._std, device=device).reshape(3, 1, 1)
            self._by_device[device] = mean, std
        return self._by_device[device]
