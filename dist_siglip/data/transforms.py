"""How does a decoded picture become the tensor a model expects?

The transforms are open_clip's own, so that what is trained here sees the same pixels as in
open_clip's trainer and evaluations.
"""

from collections.abc import Callable

from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from dist_siglip.data.inputs import ModelInputs

ImageTransform = Callable[[Image.Image], Tensor]


def training_transform(
    inputs: ModelInputs, crop_scale: tuple[float, float] | None
) -> ImageTransform:
    """Return the training transform: a random crop, resized and normalised.

    Args:
        inputs: preprocessing of the model.
        crop_scale: share of the picture's area that a crop keeps, (least, most). None turns
            augmentation off: the evaluation transform.

    Returns:
        A function from a PIL picture to (3, H, W) float32. It draws from the random generators of
        torch.
    """
    if crop_scale is None:
        return evaluation_transform(inputs)
    transform: ImageTransform = image_transform_v2(
        _preprocessing(inputs), is_train=True, aug_cfg=AugmentationCfg(scale=crop_scale)
    )
    return transform


def evaluation_transform(inputs: ModelInputs) -> ImageTransform:
    """Return the evaluation transform: resized as the model asks, normalised, nothing random.

    Args:
        inputs: preprocessing of the model.

    Returns:
        A function from a PIL picture to (3, H, W) float32.
    """
    transform: ImageTransform = image_transform_v2(_preprocessing(inputs), is_train=False)
    return transform


def _preprocessing(inputs: ModelInputs) -> PreprocessCfg:
    return PreprocessCfg(
        size=inputs.image_size,
        mean=inputs.mean,
        std=inputs.std,
        interpolation=inputs.interpolation,
        resize_mode=inputs.resize_mode,
    )
