"""Pictures on disk that annotation files name, and these files read."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import MAX_CAPTION_CHARACTERS, split_lines
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import (
    MAX_IMAGE_PIXELS,
    PICTURE_EXTENSIONS,
    PicturePolicy,
)
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import EvaluatedModel
from dist_siglip.evaluation.encoding import encode_pictures
from dist_siglip.metrics.rows import raise_together
from dist_siglip.system.regular_file import read_regular

MOST_ANNOTATION_BYTES = 1 << 30
Box = tuple[int, int, int, int]


class PictureFiles(Sequence[EncodedPicture | Image.Image]):
    """Pictures that are read when they are asked for.

    One that cannot be used leaves a grey one in its place and the reason in ``problem``, so that
    this rank does not stop while the others wait for it.

    Args:
        paths: of the pictures.
        policy: what decides their pixels.
        boxes: (left, top, right, bottom) of what is seen of each, in pixels; None: all of it.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        policy: PicturePolicy,
        boxes: Sequence[Box | None] | None = None,
    ) -> None:
        self._paths = paths
        self._policy = policy
        self._boxes = boxes
        self.problem: str | None = None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: Any) -> Any:
        path = self._paths[position]
        try:
            found = EncodedPicture(read_regular(path), self._policy).decode()
            box = None if self._boxes is None else self._boxes[position]
            return found if box is None else _cut(found, box)
        except (OSError, BadSampleError) as error:
            reason = getattr(error, "strerror", None) or error
            self.problem = f"{path} cannot be used: {reason}; make it again"
            return Image.new("RGB", (64, 64), "grey")


def _cut(picture: Image.Image, box: Box) -> Image.Image:
    """Cut out a box; what lies outside of the picture is left off."""
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[2], picture.width), min(box[3], picture.height)
    if left >= right or top >= bottom:
        raise BadSampleError(f"its box {list(box)} is empty, or outside of it")
    return picture.crop((left, top, right, bottom))


def encode_picture_files(
    model: EvaluatedModel,
    paths: Sequence[Path],
    *,
    boxes: Sequence[Box | None] | None = None,
    batch_rows: int,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Encode pictures on disk; (N, D) on every rank.

    Distributed contract: as ``encode_pictures``, and one ``raise_together``.

    Raises:
        UserError: on every rank, if a picture cannot be used.
    """
    policy = model.inputs.pictures.changed(max_image_pixels=MAX_IMAGE_PIXELS)
    pictures = PictureFiles(paths, policy, boxes)
    found = encode_pictures(model, pictures, batch_rows=batch_rows, group=group)
    raise_together(pictures.problem, device=found.device, group=group)
    return found


def read_annotations(path: Path, setting: str) -> Any:
    """Read a JSON file, or the objects of a file of JSON lines as a list.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        text = read_regular(path, MOST_ANNOTATION_BYTES).decode()
        if path.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in split_lines(text) if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"{setting}: {path} cannot be read: {reason}") from error


def text_of(value: Any) -> str:
    """Return a caption stripped and cut as those of shards are.

    Raises:
        ValueError: if it is no text, or empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a caption must be text that is not empty, not {value!r:.40}")
    return value.strip()[:MAX_CAPTION_CHARACTERS]


def find_pictures(names: Iterable[str], folders: Sequence[Path], setting: str) -> dict[str, Path]:
    """Find the file of each name, which may lack its ending, in the first folder that has any.

    Raises:
        UserError: if one is missing; it is named.
    """
    wanted = list(dict.fromkeys(names))
    endings = ("", *(f".{extension}" for extension in PICTURE_EXTENSIONS))

    def path_of(folder: Path, name: str) -> Path | None:
        with suppress(OSError):  # of a name that is too long
            return next((p for e in endings if (p := folder / f"{name}{e}").is_file()), None)
        return None

    place = next((f for f in folders if wanted and path_of(f, wanted[0]) is not None), None)
    if place is None:
        places = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{setting}: no picture {wanted[0][:99] if wanted else ''!r} in {places}")
    found = {name: path_of(place, name) for name in wanted}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise UserError(
            f"{setting}: {place} lacks {len(missing)} of {len(wanted)} pictures, first "
            f"{missing[0][:99]!r}; complete it"
        )
    return {name: path for name, path in found.items() if path is not None}
