"""Regions of a picture: texts with boxes, of which a pair brings one to a step.

A box is (top, left, bottom, right), in shares of height and width of the picture as it is decoded:
it stays true where a shard holds the picture at another size than a detector saw it. It moves with
the pixels, through stages and crop, and is cut off at the edges of what a model sees.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_siglip.data.order.sequence import Draw, draw_one
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import (
    MAX_CAPTION_CHARACTERS,
    EmptyCaptions,
    MissingFieldError,
    field_of,
    texts_of,
)
from dist_siglip.errors import UserError

MAX_REGIONS = 1000
_SLACK = 0.01  # that detectors put a box outside of the picture by

Box = tuple[float, float, float, float]


class Region(NamedTuple):
    """A part of a picture and what it shows.

    Attributes:
        text: stripped; empty where a picture has no region.
        box: (top, left, bottom, right) in [0, 1].
    """

    text: str
    box: Box


NO_REGION = Region("", (0.0, 0.0, 0.0, 0.0))


class Window(NamedTuple):
    """The part of a picture that a model sees, in shares of its height and width.

    Below 0 and above 1 there is padding.

    Attributes:
        top: of the part.
        left: of the part.
        bottom: of the part.
        right: of the part.
    """

    top: float
    left: float
    bottom: float
    right: float

    def move(self, box: Box) -> tuple[Box, float]:
        """Return a box of the picture in shares of the window, and the share of it that is left.

        Example:
            >>> Window(0.0, 0.5, 1.0, 1.0).move((0.0, 0.25, 1.0, 0.75))
            ((0.0, 0.0, 1.0, 0.5), 0.5)
        """
        height, width = self.bottom - self.top, self.right - self.left
        top, bottom = ((each - self.top) / height for each in box[::2])
        left, right = ((each - self.left) / width for each in box[1::2])
        cut = tuple(min(max(each, 0.0), 1.0) for each in (top, left, bottom, right))
        rows = (cut[2] - cut[0]) / (bottom - top)
        columns = (cut[3] - cut[1]) / (right - left)
        return (cut[0], cut[1], cut[2], cut[3]), rows * columns

    def place(self, box: Box) -> Box:
        """Return a box of the window in shares of the picture.

        Example:
            >>> Window(0.0, 0.5, 1.0, 1.0).place((0.0, 0.0, 1.0, 0.5))
            (0.0, 0.5, 1.0, 0.75)
        """
        height, width = self.bottom - self.top, self.right - self.left
        top, bottom = (self.top + each * height for each in box[::2])
        left, right = (self.left + each * width for each in box[1::2])
        return top, left, bottom, right


WHOLE = Window(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class RegionRule:
    """Where the regions of a sample are, and which of them count.

    Args:
        json_field: name of the field of the .json member with the list of regions, as
            ``captions.json_field``; each is an object with ``text``, ``box`` (top, left, bottom,
            right, in shares of height and width) and, if it likes, ``score``. A sample without the
            field has none. Null: no regions.
        min_score: regions of a lower score are passed over; those without a score never.
        min_left: share of a box that must be left in the crop, in (0, 1].
    """

    json_field: str | None = None
    min_score: float = 0.3
    min_left: float = 0.5

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: if the field has no name or a number is out of range.
        """
        if self.json_field == "":
            raise UserError('regions.json_field ("") must name a field, e.g. regions, or be null')
        if not math.isfinite(self.min_score):
            raise UserError(f"regions.min_score ({self.min_score}) must be a finite number")
        if not 0 < self.min_left <= 1:
            raise UserError(f"regions.min_left ({self.min_left}) must be in (0, 1]")

    def check_reading(
        self, extensions: Sequence[str], *, has_windows: bool, is_reinforced: bool
    ) -> None:
        """Refuse data that regions cannot be read from, and pixels that they cannot follow.

        Args:
            extensions: of the members that the table knows.
            has_windows: whether the transform is a ``WindowedTransform``.
            is_reinforced: whether stored augmentations are replayed.

        Raises:
            UserError: as ``check``, or saying which of the three does not fit.
        """
        self.check()
        if self.json_field is None:
            return
        problem = ""
        if "json" not in extensions:
            problem = (
                "needs a table that knows the .json members; build it with other_extensions="
                "('json',)"
            )
        elif not has_windows:
            problem = (
                "needs to know what the transform cuts away; make it a WindowedTransform of "
                "dist_siglip.data.samples.transforms"
            )
        elif is_reinforced:
            problem = "cannot follow stored augmentations; leave out regions or datacompdr"
        if problem:
            raise UserError(f"regions.json_field ({self.json_field}) {problem}")

    def read(
        self,
        record: dict[str, Any],
        *,
        is_empty: Callable[[str], bool] = EmptyCaptions(),  # noqa: B008 - has no state
    ) -> list[Region]:
        """List the regions of a JSON that have a text and score enough.

        Raises:
            BadSampleError: if the field is no list of at most 1000 regions, a text or score is
                none, or a box is not four numbers in the picture that enclose something.

        Example:
            >>> RegionRule(json_field="r").read({"r": [{"text": "fox", "box": [0, 0, 1, 0.5]}]})
            [Region(text='fox', box=(0.0, 0.0, 1.0, 0.5))]
        """
        if self.json_field is None:
            return []
        try:
            listed = field_of(record, self.json_field)
        except MissingFieldError:
            return []
        if listed is None:
            return []
        if not isinstance(listed, list):
            raise BadSampleError(
                f"JSON field {self.json_field!r} holds a {type(listed).__name__}, not a list of "
                "regions"
            )
        if len(listed) > MAX_REGIONS:
            raise BadSampleError(f"{len(listed)} regions, at most {MAX_REGIONS}")
        found = [self._region(entry) for entry in listed]
        return [each for each in found if each is not None and not is_empty(each.text)]

    def choose(self, regions: Sequence[Region], window: Window, key: tuple[int, ...]) -> Region:
        """Draw one of the regions that a window shows.

        Args:
            regions: of the picture.
            window: that the model sees.
            key: of the place in the stream, integers >= 0.

        Returns:
            The region, its box in shares of the window; ``NO_REGION`` if too little of all is left.
        """
        moved = [(each.text, *window.move(each.box)) for each in regions]
        kept = [Region(text, box) for text, box, left in moved if left >= self.min_left]
        return kept[draw_one(len(kept), *key, Draw.REGION)] if kept else NO_REGION

    def _region(self, entry: Any) -> Region | None:
        """Check an entry of the list; None if its score is too low."""
        if not isinstance(entry, dict):
            raise BadSampleError(f"a region is a {type(entry).__name__}, not an object")
        (text,) = texts_of([entry.get("text")], f"{self.json_field}.text")
        score = entry.get("score")
        if score is not None and (not _is_number(score) or score != score):
            raise BadSampleError(f"the score of a region ({_shown(score)}) is no number")
        box = entry.get("box")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise BadSampleError(f"the box of a region ({_shown(box)}) is not four numbers")
        if not all(-_SLACK <= each <= 1 + _SLACK for each in box):
            raise BadSampleError(
                f"the box of a region ({_shown(box)}) is not in the picture; boxes are top, left, "
                "bottom, right in shares of its height and width, 0 to 1"
            )
        top, left, bottom, right = (min(max(float(each), 0.0), 1.0) for each in box)
        if not (top < bottom and left < right):
            raise BadSampleError(
                f"the box of a region ({_shown(box)}) encloses nothing: top, left, bottom, right"
            )
        if score is not None and score < self.min_score:
            return None
        text = text.strip()[:MAX_CAPTION_CHARACTERS].rstrip()
        return Region(text, (top, left, bottom, right))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
