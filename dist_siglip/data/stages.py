"""How do steps of the user's own change a sample between decoding and transform?

A stage is what a webdataset pipeline is made of: a function from an iterator of samples to an
iterator of samples, a sample being a dict. ``webdataset.map``, ``webdataset.select`` and the like
make stages of plain functions. Each sample goes through alone, with the random generators of
Python, NumPy and torch seeded by its place in the stream, so what a stage draws is repeated when a
run resumes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from dist_siglip.data.faults import BadSampleError
from dist_siglip.errors import UserError

Stage = Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]


class FilteredError(Exception):
    """A stage left the sample out; the text names the stage."""


def run_stages(stages: Sequence[Stage], sample: dict[str, Any]) -> dict[str, Any]:
    """Send one sample through stages, one after another.

    Args:
        stages: functions from an iterator of samples to an iterator of samples.
        sample: ``__key__``, ``__url__`` (the shard), ``image`` (an RGB ``PIL.Image``), ``text``,
            and ``json`` (a dict) if the captions came from there.

    Returns:
        What came out, its ``image`` an RGB picture and its ``text`` stripped.

    Raises:
        FilteredError: if a stage yields nothing.
        BadSampleError: if a stage says so, or leaves an empty text.
        UserError: if a stage yields two samples, or takes away picture or text.
        RuntimeError: if a stage fails; the error of the stage is its cause.
    """
    for stage in stages:
        name = _name(stage)
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
        _check(sample, name)
    image: Image.Image = sample["image"]
    text = sample["text"].strip()
    if not text:
        raise BadSampleError("caption is empty")
    return {**sample, "image": image.convert("RGB"), "text": text}


def _check(sample: Any, name: str) -> None:
    """Refuse a sample without a picture and a text."""
    for field, kind, wanted in (("image", Image.Image, "a PIL.Image"), ("text", str, "a string")):
        value = sample.get(field) if isinstance(sample, dict) else None
        if not isinstance(value, kind):
            raise UserError(
                f"stage {name} must leave {wanted} under {field!r}, not {type(value).__name__}"
            )


def _name(stage: Stage) -> str:
    return getattr(stage, "__qualname__", None) or type(stage).__qualname__
