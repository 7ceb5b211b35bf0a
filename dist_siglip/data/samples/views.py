"""Further views of a picture: a global one for a teacher, and small local ones for a student.

They are drawn behind all that is drawn for the pair itself, from the same generators, so a run
without views sees the same crops. The picture is decoded once more, for all of its views.
"""

from PIL import Image
from torch import Tensor, stack
from torchvision.transforms import (
    ColorJitter,
    Compose,
    GaussianBlur,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
)

from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.transforms import (
    CropResize,
    Preprocessing,
    ViewRule,
    draw_crop,
    to_pixels,
)

_JITTER, _GREY, _BLUR_LOCAL = 0.8, 0.2, 0.5  # probabilities
_SIGMA = (0.1, 2.0)  # pixels
_KERNEL = 13  # three of the largest sigma on each side


class ViewTransform:
    """Views of one picture, with the augmentations of DINO.

    Flip 1/2; colour jitter (brightness and contrast .4, saturation .2, hue .1) 8/10; grey 2/10;
    blur always for the global view and 1/2 for local ones. Nothing is solarised, which DINO does to
    its second global view alone. Crops are resized as those of training are.

    Args:
        rule: which views.
        preprocessing: of the model.
        scaled_decode: as ``training_transform``.

    Source:
        Caron et al. 2021, arXiv:2104.14294, and its public code, which blurs by Pillow.
    """

    def __init__(self, rule: ViewRule, preprocessing: Preprocessing, scaled_decode: bool) -> None:
        self._rule = rule
        self._cut = CropResize(preprocessing, scaled_decode)
        self._cut_local = CropResize(preprocessing, scaled_decode, rule.local_size or None)
        changes = (
            RandomHorizontalFlip(),
            RandomApply([ColorJitter(0.4, 0.4, 0.2, 0.1)], _JITTER),
            RandomGrayscale(_GREY),
        )
        blur = GaussianBlur(_KERNEL, _SIGMA)
        self._change = Compose([*changes, blur])
        self._change_local = Compose([*changes, RandomApply([blur], _BLUR_LOCAL)])

    def __call__(self, picture: EncodedPicture | Image.Image) -> tuple[Tensor, Tensor | None]:
        """Return (3, H, W) and (V, 3, h, w) uint8, the latter None without local views.

        It draws from the random generators of torch.
        """
        rule, size = self._rule, picture.size
        crop = draw_crop(size, rule.global_scale)
        local_crops = [draw_crop(size, rule.local_scale) for _ in range(rule.local_views)]
        reductions = [self._cut_local.reduction_for(each) for each in local_crops]
        reduction = min([self._cut.reduction_for(crop), *reductions])
        image = self._cut.decode(picture, reduction)
        view = to_pixels(self._change(self._cut.cut(image, size, crop)))
        local_views = [
            to_pixels(self._change_local(self._cut_local.cut(image, size, each)))
            for each in local_crops
        ]
        return view, stack(local_views) if local_views else None
