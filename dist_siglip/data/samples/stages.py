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
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image, ImageOps

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture import IntensityWindow, flatten, to_rgba
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError

Stage = Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]
_MODES = ("stored", "RGBA", "RGB")  # no stage can have what one before it has lost


class FilteredError(Exception):
    """A stage left the sample out; the text names the stage."""


def check_stages(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return stages, if every one of them can get pictures in the mode it asks for.

    Raises:
        UserError: if a mode is unknown, or lost in a stage before.
    """
    reached = 0
    for stage in stages:
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
        before, has_regions = sample["image"], "regions" in sample
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
        if has_regions:
            _check_regions(stage, before, sample)
    image = sample["image"]
    texts = [text.strip() for text in (sample["text"], *sample.get("more_texts", []))]
    if not all(texts):
        raise BadSampleError("caption is empty")
    if "more_texts" in sample:
        sample = {**sample, "more_texts": texts[1:]}
    return {**sample, "image": _in_mode(image, "RGB", transparency, window), "text": texts[0]}


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
    """

    moves_regions = True

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise UserError(f"probability ({probability}) of RandomFlip must be in [0, 1]")
        self.probability = probability

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Mirror some of the samples."""
        for sample in samples:
            regions = sample.get("regions", [])
            texts = [sample["text"], *sample.get("more_texts", [])]
            texts += [region["text"] for region in regions]
            if random.random() >= self.probability or any(map(_NAMES_A_SIDE, texts)):
                yield sample
                continue
            flipped = {**sample, "image": ImageOps.mirror(sample["image"])}
            if "regions" in sample:
                flipped["regions"] = [_mirrored(region) for region in regions]
            yield flipped


_NAMES_A_SIDE = re.compile(r"\b(left|right)", re.IGNORECASE).search


def _mirrored(region: dict[str, Any]) -> dict[str, Any]:
    top, left, bottom, right = region["box"]
    return {**region, "box": [top, 1 - right, bottom, 1 - left]}
