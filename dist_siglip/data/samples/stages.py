"""Stages: functions of the user that change a sample between decoding and transform.

A stage is what a webdataset pipeline is made of: a function from an iterator of samples to an
iterator of samples, a sample being a dict. ``webdataset.map``, ``webdataset.select`` and the like
make stages of plain functions. Each sample goes through alone, with the random generators of
Python, NumPy and torch seeded by its position, so what a stage draws is repeated when a run
resumes.

A stage gets pictures in RGB, as a model would. One that has an attribute ``picture_mode`` says
otherwise: "RGBA" for pictures with their alpha, "stored" for the mode of the file, such as "I;16"
with all its bits. Such stages come first, since what is laid on a colour stays there.

Where regions are read a sample has them under ``regions``. A stage that returns another picture
says with an attribute ``moves_regions`` whether it moves pixels, and their boxes with them (True),
or leaves every pixel in its place (False).

A stage with an attribute ``only_in_training`` that is true, as augmentations have, is left out of
evaluations. One with ``leaves_texts`` that is true changes pictures alone, and so may stand beside
stored rows of texts.
"""

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from PIL import Image, ImageOps
from torchvision import transforms

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture import IntensityWindow, flatten, to_rgba
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError

Stage = Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]
_MODES = ("stored", "RGBA", "RGB")  # no stage can have what one before it has lost


class FilteredError(Exception):
    """A stage left the sample out; the text names the stage."""


def check_stages(stages: Sequence[Stage], *, reads_regions: bool = False) -> tuple[Stage, ...]:
    """Return stages, if every one of them can get pictures in the mode it asks for.

    Args:
        stages: functions from an iterator of samples to an iterator of samples.
        reads_regions: whether samples have boxes.

    Raises:
        UserError: if a mode is unknown, or lost in a stage before, or one leaves boxes behind.
    """
    reached = 0
    for stage in stages:
        if reads_regions and getattr(stage, "leaves_regions", False):
            raise UserError(
                f"stage {_name(stage)} moves pixels and leaves the boxes of data.regions behind; "
                "take ColorJitter or RandomFlip, or no regions"
            )
        mode = _picture_mode(stage)
        if mode not in _MODES:
            raise UserError(
                f"picture_mode ({mode}) of stage {_name(stage)} must be one of {', '.join(_MODES)}"
            )
        if _MODES.index(mode) < reached:
            raise UserError(
                f"stage {_name(stage)} asks for pictures in mode {mode} after a stage that gets "
                f"them in {_MODES[reached]}; put it before that one"
            )
        reached = _MODES.index(mode)
    return tuple(stages)


def outside_of_training(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Leave out the stages that say that they augment (``only_in_training``)."""
    return tuple(stage for stage in stages if not getattr(stage, "only_in_training", False))


def names_of_changing(stages: Sequence[Stage], towers: Collection[str]) -> list[str]:
    """Name the stages that may change what one of some towers sees."""
    return [
        _name(stage)
        for stage in stages
        if "image" in towers or not getattr(stage, "leaves_texts", False)
    ]


def all_take_rgb(stages: Sequence[Stage]) -> bool:
    """Whether no stage asks for more than the colours that a model sees."""
    return all(_picture_mode(stage) == "RGB" for stage in stages)


def run_stages(
    stages: Sequence[Stage],
    sample: dict[str, Any],
    transparency: str = PicturePolicy.transparency,
    window: IntensityWindow = None,
) -> dict[str, Any]:
    """Send one sample through stages, one after another.

    Args:
        stages: functions from an iterator of samples to an iterator of samples.
        sample: ``__key__``, ``__url__`` (the shard), ``image`` (a ``PIL.Image`` in RGB, or in its
            own mode if ``all_take_rgb`` denies), ``text``, ``more_texts`` (a list) if captions
            train together with it, ``json`` (a dict) if the captions came from there, and
            ``regions`` (a list of dicts) if regions are read.
        transparency: as ``PicturePolicy.transparency``.
        window: as ``PicturePolicy.intensity_window``.

    Returns:
        What came out, its ``image`` an RGB picture and its ``text`` stripped.

    Raises:
        FilteredError: if a stage yields nothing.
        BadSampleError: if a stage says so, or leaves an empty text.
        UserError: if a stage yields two samples, takes away picture, texts or regions, or does not
            say whether it moves pixels.
        RuntimeError: if a stage fails; the error of the stage is its cause.
    """
    num_more = len(sample.get("more_texts", []))
    for stage in stages:
        name = _name(stage)
        image = _in_mode(sample["image"], _picture_mode(stage), transparency, window)
        sample = {**sample, "image": image}
        before, texts, has_regions = sample["image"], _texts(sample), "regions" in sample
        try:
            results = list(stage(iter([sample])))
        except (BadSampleError, UserError):
            raise
        except Exception as error:
            raise RuntimeError(
                f"stage {name} fails on {sample.get('__url__')}/{sample.get('__key__')}: {error!r}"
            ) from error
        if not results:
            raise FilteredError(f"left out by stage {name}")
        if len(results) > 1:
            raise UserError(
                f"stage {name} makes {len(results)} samples of one; a stage may change a sample or "
                "leave it out"
            )
        sample = results[0]
        _check(sample, name, num_more)
        if getattr(stage, "leaves_texts", False) and _texts(sample) != texts:
            raise UserError(
                f"stage {name} changes a text, and its leaves_texts says that it does not"
            )
        if has_regions:
            _check_regions(stage, before, sample)
    image = sample["image"]
    texts = [text.strip() for text in _texts(sample)]
    if not all(texts):
        raise BadSampleError("caption is empty")
    if "more_texts" in sample:
        sample = {**sample, "more_texts": texts[1:]}
    return {**sample, "image": _in_mode(image, "RGB", transparency, window), "text": texts[0]}


def _texts(sample: dict[str, Any]) -> list[str]:
    return [sample["text"], *sample.get("more_texts", [])]


def _picture_mode(stage: Stage) -> str:
    return str(getattr(stage, "picture_mode", "RGB"))


def _in_mode(
    image: Image.Image, mode: str, transparency: str, window: IntensityWindow
) -> Image.Image:
    """Bring a picture to the mode that a stage asks for, if it is not there."""
    if mode == "stored" or (image.mode == mode and "transparency" not in image.info):
        return image
    if mode == "RGBA":
        return to_rgba(image, window)
    return flatten(image, transparency, window)


def _check(sample: Any, name: str, num_more: int) -> None:
    """Refuse a sample without a picture and its texts."""
    for field, kind, wanted in (("image", Image.Image, "a PIL.Image"), ("text", str, "a string")):
        value = sample.get(field) if isinstance(sample, dict) else None
        if not isinstance(value, kind):
            raise UserError(
                f"stage {name} must leave {wanted} under {field!r}, not {type(value).__name__}"
            )
    more = sample.get("more_texts", [])
    if len(more) != num_more or not all(isinstance(text, str) for text in more):
        raise UserError(f"stage {name} must leave {num_more} strings under 'more_texts'")


def _name(stage: Stage) -> str:
    return getattr(stage, "__qualname__", None) or type(stage).__qualname__


def _check_regions(stage: Stage, before: Image.Image, sample: dict[str, Any]) -> None:
    """Refuse a stage that may have moved pixels under their boxes."""
    if not isinstance(sample.get("regions"), list):
        raise UserError(f"stage {_name(stage)} must leave the list under 'regions'")
    if sample["image"] is not before and not hasattr(stage, "moves_regions"):
        raise UserError(
            f"stage {_name(stage)} makes another picture and does not say whether its pixels move; "
            "give it an attribute moves_regions: True if it moves the boxes in sample['regions'] "
            "with them, False if every pixel stays in its place"
        )


class RandomFlip:
    """A stage that mirrors pictures, boxes included, left to right.

    A sample whose caption or regions speak of left or right (in English) stays as it is.

    Args:
        probability: share of the samples, in [0, 1].
        spares: regular expression, without regard to case; a sample with a text in which it is
            found keeps its picture. None mirrors those too.
    """

    moves_regions = True
    only_in_training = True
    leaves_texts = True

    def __init__(self, probability: float = 0.5, spares: str | None = r"\b(left|right)") -> None:
        _check_share("RandomFlip", probability=probability)
        self.probability = probability
        try:
            self._spared = None if spares is None else re.compile(spares, re.IGNORECASE)
        except (re.error, RecursionError) as error:
            raise UserError(
                f"spares ({spares!r}) of RandomFlip is no regular expression: {error}"
            ) from error

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Mirror some of the samples."""
        for sample in samples:
            regions = sample.get("regions", [])
            texts = [*_texts(sample), *(region["text"] for region in regions)]
            if random.random() >= self.probability or self._spares(texts):
                yield sample
                continue
            flipped = {**sample, "image": ImageOps.mirror(sample["image"])}
            if "regions" in sample:
                flipped["regions"] = [_mirrored(region) for region in regions]
            yield flipped

    def _spares(self, texts: Sequence[str]) -> bool:
        return self._spared is not None and any(map(self._spared.search, texts))


def _mirrored(region: dict[str, Any]) -> dict[str, Any]:
    top, left, bottom, right = region["box"]
    return {**region, "box": [top, 1 - right, bottom, 1 - left]}


class _Augmentation:
    """A stage that changes the pictures of some samples in training.

    Args:
        probability: share of the samples, in [0, 1].
        short_side: pictures are made smaller first, so that the short side has so many pixels; what
            is changed costs by the pixel. None leaves them as large as they are.
    """

    only_in_training = True
    leaves_texts = True

    def __init__(self, probability: float, short_side: int | None) -> None:
        name = type(self).__name__
        _check_share(name, probability=probability)
        if short_side is not None and short_side < 1:
            raise UserError(f"short_side ({short_side}) of {name} must be at least 1, or null")
        self.probability = probability
        self.short_side = short_side
        self._change: Callable[[Image.Image], Image.Image]

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Change some of the pictures."""
        for sample in samples:
            image = sample["image"]
            scale = 1.0 if self.short_side is None else self.short_side / min(image.size)
            if scale < 1:
                width, height = (max(1, round(side * scale)) for side in image.size)
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            if random.random() < self.probability:
                image = self._change(image)
            yield sample if image is sample["image"] else {**sample, "image": image}


class ColorJitter(_Augmentation):
    """A stage that changes colours, by torchvision's ``ColorJitter`` and ``RandomGrayscale``.

    Args:
        brightness: factor drawn from [max(0, 1 - brightness), 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: shift drawn from [-hue, hue], in turns; at most 0.5.
        grey: share of the samples that lose their colours.
        probability: share of the samples that are jittered.
        short_side: pictures are made smaller first, to so many pixels; None keeps their size.
    """

    moves_regions = False

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        grey: float = 0.0,
        probability: float = 0.8,
        short_side: int | None = None,
    ) -> None:
        super().__init__(1.0, short_side)
        _check_share("ColorJitter", grey=grey, probability=probability)
        try:
            jitter = transforms.ColorJitter(brightness, contrast, saturation, hue)
        except ValueError as error:
            raise UserError(f"ColorJitter: {error}") from error
        self._change = transforms.Compose(
            [transforms.RandomApply([jitter], probability), transforms.RandomGrayscale(grey)]
        )


class RandomAffine(_Augmentation):
    """A stage that turns, shifts and zooms pictures, by torchvision's ``RandomAffine``, bilinear.

    Unlike a crop it also makes what is seen smaller, and shifts it to outside of the picture.

    Args:
        degrees: angle drawn from [-degrees, degrees].
        translate: shifts drawn from [-translate, translate], in shares of the width and the height.
        scale: factor drawn from [least, most], in [0.01, 100].
        fill: red, green and blue of what was outside, 0 to 255.
        probability: share of the samples.
        short_side: pictures are made smaller first, to so many pixels; None keeps their size.
    """

    leaves_regions = True

    def __init__(
        self,
        degrees: float = 0.0,
        translate: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        fill: tuple[int, int, int] = (0, 0, 0),
        probability: float = 1.0,
        short_side: int | None = None,
    ) -> None:
        super().__init__(probability, short_side)
        _check_share("RandomAffine", translate=translate)
        least, most = scale
        if not (0.01 <= least <= most <= 100 and 0 <= degrees <= 180):
            raise UserError(
                f"scale ({list(scale)}) of RandomAffine must be [least, most] in [0.01, 100], "
                f"degrees ({degrees}) in [0, 180]"
            )
        if len(fill) != 3 or not all(0 <= value <= 255 for value in fill):
            raise UserError(f"fill ({list(fill)}) of RandomAffine must be 3 numbers in [0, 255]")
        self._change = transforms.RandomAffine(
            degrees,
            (translate, translate),
            (least, most),
            interpolation=transforms.InterpolationMode.BILINEAR,
            fill=list(fill),
        )


class RandAugment(_Augmentation):
    """A stage of torchvision's ``RandAugment`` (Cubuk et al. 2020, arXiv:1909.13719).

    It shears, shifts and turns pictures among others, and does not move boxes with them.

    Args:
        num_ops: operations a picture.
        magnitude: of every operation, 0 to 30.
        probability: share of the samples.
        short_side: pictures are made smaller first, to so many pixels; None keeps their size.
    """

    leaves_regions = True

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        probability: float = 1.0,
        short_side: int | None = None,
    ) -> None:
        super().__init__(probability, short_side)
        if not (1 <= num_ops <= 16 and 0 <= magnitude <= 30):
            raise UserError(
                f"num_ops ({num_ops}) of RandAugment must be in [1, 16], magnitude ({magnitude}) "
                "in [0, 30]"
            )
        self._change = transforms.RandAugment(num_ops, magnitude)


class TimmAugment(_Augmentation):
    """A stage of timm's augmentations by the text that names them there.

    Args:
        policy: "rand-m9-n2-mstd0.5-inc1", "augmix-m3-w3", "original", "3a", ...: the ``aa`` of timm
            and of ``aug_cfg.auto_augment`` in open_clip.
        probability: share of the samples.
        short_side: pictures are made smaller first, to so many pixels; None keeps their size.

    Source:
        ``timm.data.auto_augment``, which shifts by a share of 0.45 at most and fills with grey.
    """

    leaves_regions = True

    def __init__(
        self,
        policy: str = "rand-m9-n2-mstd0.5-inc1",
        probability: float = 1.0,
        short_side: int | None = None,
    ) -> None:
        super().__init__(probability, short_side)
        from timm.data import auto_augment  # heavy

        make = {
            "rand": auto_augment.rand_augment_transform,
            "augmix": auto_augment.augment_and_mix_transform,
        }.get(policy.split("-")[0], auto_augment.auto_augment_transform)
        try:
            self._change = make(policy, {"translate_pct": 0.45, "img_mean": (128, 128, 128)})
        except (AssertionError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"policy ({policy!r}) of TimmAugment is none that timm knows, such as "
                f'"rand-m9-n2-mstd0.5-inc1": {error}'
            ) from error


def _check_share(name: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{key} ({value}) of {name} must be in [0, 1]")
