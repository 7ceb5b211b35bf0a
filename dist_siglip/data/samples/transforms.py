"""Transforms from a picture to the pixels that a model expects.

The crops and sizes are open_clip's own. What is left of its transform, the conversion to floats and
the normalisation, happens on the device (``ImageNormalizer``): a byte is a quarter of a float to
move.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from open_clip.transform import CenterCropOrPad, PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import (
    CenterCrop,
    ColorJitter,
    Compose,
    GaussianBlur,
    Normalize,
    RandomApply,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
)

from dist_siglip.data.samples.patches import PatchBudget, pack_pictures, target_grid
from dist_siglip.data.samples.picture import REDUCTIONS, EncodedPicture, flatten
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.regions import WHOLE, Window

_JITTER, _GREY, _BLUR_LOCAL = 0.8, 0.2, 0.5  # probabilities
_SIGMA = (0.1, 2.0)  # pixels
_KERNEL = 13  # three of the largest sigma on each side


@dataclass(frozen=True, kw_only=True)
class TeacherInputs:
    """What teachers of a training want to be fed beside the model, in plain values.

    Attributes:
        tokenizers: of live teachers whose tokens are not the model's.
        features: folders of each teacher whose rows are stored.
        other_crops: whether these rows may be of other parts of the pictures than the model sees.
        live: whether a teacher sees pictures and captions of the batch.
    """

    tokenizers: tuple[Callable[[list[str]], Tensor], ...] = ()
    features: tuple[tuple[str, ...], ...] = ()
    other_crops: bool = False
    live: bool = False


@dataclass(frozen=True, kw_only=True)
class ViewRule:
    """Which further views of each picture objectives ask for.

    Attributes:
        global_scale: share of the picture's area that the global view keeps, (least, most).
        local_views: V, number of small views; 0 for none.
        local_size: their side in pixels.
        local_scale: share of the area that each of them keeps.
    """

    global_scale: tuple[float, float]
    local_views: int = 0
    local_size: int = 0
    local_scale: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
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
        teachers: of a training by distillation.
        patches: of a tower that takes pictures of any shape as packed patches (NaFlex), resized
            bilinearly whatever ``interpolation`` and ``resize_mode`` say; None: its pictures have
            ``image_size``.
        views: that its objectives ask for; None without any.
    """

    image_size: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    context_length: int
    tokenizer: Callable[[list[str]], Tensor]
    pictures: PicturePolicy = field(default_factory=PicturePolicy)
    teachers: TeacherInputs = field(default_factory=TeacherInputs)
    patches: PatchBudget | None = None
    views: ViewRule | None = None

    @classmethod
    def of(cls, model: Any) -> "Preprocessing":
        """Take the values from a built model, which has attributes of the same names."""
        names = {each.name for each in fields(cls)} - {"teachers", "views"}
        return cls(**{name: getattr(model, name) for name in names})


ImageTransform = Callable[[EncodedPicture | Image.Image], Tensor]

_RATIO = (3 / 4, 4 / 3)  # of the sides of a crop: torchvision's, which open_clip leaves as it is


def training_transform(
    preprocessing: Preprocessing,
    crop_scale: tuple[float, float] | None,
    *,
    scaled_decode: bool = True,
) -> ImageTransform:
    """Return the training transform: a random crop, resized; for NaFlex, one of its own shape.

    Args:
        preprocessing: preprocessing of the model.
        crop_scale: share of the picture's area that a crop keeps, (least, most). None turns
            augmentation off: the evaluation transform.
        scaled_decode: decode a JPEG at the smallest fraction of its size at which the crop still
            has the pixels it needs. Same crops, much faster for large pictures; the pixels differ
            a little from those of open_clip. False: the same pixels.

    Returns:
        A function from a picture to (3, H, W) uint8, or to packed patches. It draws from the random
        generators of torch.
    """
    if preprocessing.patches is not None:
        return PatchTransform(
            preprocessing.patches,
            preprocessing.pictures.transparency,
            crop_scale=crop_scale,
            scaled_decode=scaled_decode,
        )
    if crop_scale is None:
        return evaluation_transform(preprocessing)
    return _RandomCrop(CropResize(preprocessing, scaled_decode), crop_scale)


def evaluation_transform(preprocessing: Preprocessing) -> ImageTransform:
    """Return the evaluation transform: resized as the model asks, nothing random.

    Args:
        preprocessing: preprocessing of the model.

    Returns:
        A function from a picture to (3, H, W) uint8: open_clip's pixels before normalisation; of a
        NaFlex tower, to packed patches.
    """
    if preprocessing.patches is not None:
        return PatchTransform(preprocessing.patches, preprocessing.pictures.transparency)
    return _Evaluation(preprocessing)


def at_length(transform: ImageTransform, num_patches: int) -> ImageTransform:
    """Let a transform to packed patches keep to another budget; 0 leaves any as it is."""
    if not num_patches:
        return transform
    assert isinstance(transform, PatchTransform)  # who draws lengths has looked at the tower
    return replace(transform, budget=transform.budget._replace(num_patches=num_patches))


def draw_crop(size: tuple[int, int], scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Draw top, left, rows and columns of a crop of a picture (width, height), as torchvision."""
    width, height = size
    # torchvision's own draw needs something of this size, not its pixels.
    shape_only = torch.empty(1).expand(3, height, width)
    return RandomResizedCrop.get_params(shape_only, list(scale), list(_RATIO))


class CropResize:
    """A part of a picture, resized to what the model expects.

    Args:
        preprocessing: preprocessing of the model.
        scaled_decode: as ``training_transform``.
        size: in place of the model's.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        scaled_decode: bool,
        size: int | tuple[int, int] | None = None,
    ) -> None:
        size = preprocessing.image_size if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        self._target = (width, height)
        self._transparency = preprocessing.pictures.transparency
        self._scaled_decode = scaled_decode

    def __call__(
        self, picture: EncodedPicture | Image.Image, crop: tuple[int, int, int, int]
    ) -> Image.Image:
        """Decode, cut out and resize.

        Args:
            picture: any size.
            crop: top, left, rows and columns, inside of the picture.

        Returns:
            RGB.
        """
        image = self.decode(picture, self.reduction_for(crop))
        return self.cut(image, picture.size, crop)

    def reduction_for(self, crop: tuple[int, int, int, int]) -> int:
        """Return the largest reduction of a JPEG that leaves a crop the pixels it needs."""
        _, _, rows, columns = crop
        if not self._scaled_decode:
            return 1
        width, height = self._target
        return next(
            r for r in REDUCTIONS if r == 1 or (columns >= r * width and rows >= r * height)
        )

    def decode(self, picture: EncodedPicture | Image.Image, reduction: int) -> Image.Image:
        """Decode to RGB; a picture that is decoded already only changes its mode."""
        if isinstance(picture, Image.Image):
            return _in_rgb(picture, self._transparency)
        return picture.decode(reduction)

    def cut(
        self, image: Image.Image, size: tuple[int, int], crop: tuple[int, int, int, int]
    ) -> Image.Image:
        """Cut out of a decoded picture, and resize.

        Args:
            image: RGB, perhaps decoded at a reduction.
            size: (width, height) that ``crop`` is told in.
            crop: as ``__call__``.
        """
        top, left, rows, columns = crop
        width, height = size
        box = (left, top, left + columns, top + rows)
        if image.size == size:
            return _crop(image, box).resize(self._target, Image.Resampling.BICUBIC)
        across, down = image.width / width, image.height / height
        scaled = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return image.resize(self._target, Image.Resampling.BICUBIC, box=scaled)


class ViewTransform:
    """Views of one picture beside that of the pair, with the augmentations of DINO.

    A global one is for a teacher, small local ones for a student. They are drawn behind all that is
    drawn for the pair, from the same generators, so a run without views sees the same crops. The
    picture is decoded once more, for all of its views.

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
        return view, torch.stack(local_views) if local_views else None


class WindowedTransform:
    """A transform that can say which part of the picture its pixels are."""

    def __call__(self, picture: EncodedPicture | Image.Image) -> Tensor:
        """Return (3, H, W) uint8, or packed patches."""
        return self.with_window(picture)[0]

    def with_window(self, picture: EncodedPicture | Image.Image) -> tuple[Tensor, Window]:
        """Return (3, H, W) uint8, and the part of the picture that is seen."""
        raise NotImplementedError


@dataclass(frozen=True)
class PatchTransform(WindowedTransform):
    """From a picture to packed patches: resized bilinearly to the grid that its budget allows.

    A random crop has the shape of its picture: of its sides the square root of the share.

    Args:
        budget: patch size, and most patches.
        transparency: as ``PicturePolicy.transparency``.
        crop_scale: share of the area that a crop keeps, (least, most); None keeps all.
        scaled_decode: decode a JPEG at the smallest fraction of its size that has the pixels.
    """

    budget: PatchBudget
    transparency: str
    crop_scale: tuple[float, float] | None = None
    scaled_decode: bool = False

    def with_window(self, picture: EncodedPicture | Image.Image) -> tuple[Tensor, Window]:
        """Return (1 + N, 3 p^2) uint8, see ``pack_pictures``, and the part that is seen."""
        width, height = picture.size
        side, num_patches = self.budget
        left, top, right, bottom = self._crop(width, height)
        grid = target_grid(round(bottom - top), round(right - left), side, num_patches)
        rows, columns = (count * side for count in grid)
        if isinstance(picture, Image.Image):
            image = _in_rgb(picture, self.transparency)
        else:
            reduction = 1
            if self.scaled_decode:
                least = min((right - left) / columns, (bottom - top) / rows)
                reduction = next(each for each in REDUCTIONS if each == 1 or least >= each)
            image = picture.decode(reduction)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, right * across, bottom * down)
        resized = image.resize((columns, rows), Image.Resampling.BILINEAR, box=box)
        window = Window(top / height, left / width, bottom / height, right / width)
        return pack_pictures(to_pixels(resized), side, num_patches), window

    def _crop(self, width: int, height: int) -> tuple[float, float, float, float]:
        if self.crop_scale is None:
            return 0, 0, width, height
        share, across, down = torch.rand(3).tolist()
        least, most = self.crop_scale
        factor = (least + share * (most - least)) ** 0.5
        columns, rows = max(1, round(width * factor)), max(1, round(height * factor))
        left, top = int(across * (width - columns + 1)), int(down * (height - rows + 1))
        return left, top, left + columns, top + rows


class _RandomCrop(WindowedTransform):
    """open_clip's training transform, its crop drawn before anything is decoded."""

    def __init__(self, crop_resize: CropResize, crop_scale: tuple[float, float]) -> None:
        self._crop_resize = crop_resize
        self._crop_scale = crop_scale

    def with_window(self, picture: EncodedPicture | Image.Image) -> tuple[Tensor, Window]:
        width, height = picture.size
        crop = draw_crop(picture.size, self._crop_scale)
        top, left, rows, columns = crop
        window = Window(top / height, left / width, (top + rows) / height, (left + columns) / width)
        return to_pixels(self._crop_resize(picture, crop)), window


class _Evaluation(WindowedTransform):
    """open_clip's evaluation transform without its last two steps."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        settings = PreprocessCfg(
            size=preprocessing.image_size,
            mean=preprocessing.mean,
            std=preprocessing.std,
            interpolation=preprocessing.interpolation,
            resize_mode=preprocessing.resize_mode,
        )
        *steps, to_floats, normalize = image_transform_v2(settings, is_train=False).transforms
        if type(to_floats).__name__ != "MaybeToTensor" or not isinstance(normalize, Normalize):
            raise RuntimeError("open_clip's transform no longer ends with ToTensor and Normalize")
        self._steps = steps
        self._transparency = preprocessing.pictures.transparency

    def with_window(self, picture: EncodedPicture | Image.Image) -> tuple[Tensor, Window]:
        if isinstance(picture, Image.Image):
            image = _in_rgb(picture, self._transparency)
        else:
            image = picture.decode()
        window = WHOLE
        for step in self._steps:
            size = image.size
            image = step(image)
            if isinstance(step, CenterCrop | CenterCropOrPad):
                left, right = _middle(size[0], image.width)
                top, bottom = _middle(size[1], image.height)
                window = Window(top, left, bottom, right)
        return to_pixels(image), window


def _middle(length: int, kept: int) -> tuple[float, float]:
    """Start and stop, in shares, of the middle that torchvision cuts out of a side or pads."""
    first = round((length - kept) / 2) if kept <= length else -((kept - length) // 2)
    return first / length, (first + kept) / length


def _in_rgb(image: Image.Image, transparency: str) -> Image.Image:
    """Bring a picture of any mode to RGB; one that is passes as it is."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    return flatten(image, transparency)


def _crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Cut out a part, which Pillow by itself refuses to do above a limit of its own."""
    left, top, right, bottom = box
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or (right - left) * (bottom - top) <= limit:
        return image.crop(box)
    return Image.fromarray(np.asarray(image)[top:bottom, left:right])


def to_pixels(image: Image.Image) -> Tensor:
    """Copy an RGB picture to (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
