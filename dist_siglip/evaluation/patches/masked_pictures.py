"""Pictures with masks that say the class of each pixel: in folders as users have them, and read.

A mask is a PNG of grey values or palette entries, 8 or 16 bits: the numbers in the file are the
labels, whatever colours they are shown in. It goes where its picture goes: to the size that the
model sees, cut or padded likewise, by the nearest pixel, since labels have no means.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_siglip.data.order.position import EvaluationBatchSampler
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import split_lines
from dist_siglip.data.samples.loader import prepare_worker
from dist_siglip.data.samples.patches import is_packed, pack_pictures, side_of_patch, unpack
from dist_siglip.data.samples.picture import EncodedPicture, sniff_media_type
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS, PicturePolicy
from dist_siglip.data.samples.regions import Window
from dist_siglip.data.samples.transforms import (
    Preprocessing,
    WindowedTransform,
    evaluation_transform,
)
from dist_siglip.errors import UserError
from dist_siglip.evaluation.patches.label_names import (
    NO_CLASS,
    UNKNOWN,
    LabelNames,
    read_label_names,
)
from dist_siglip.system.regular_file import read_regular
from dist_siglip.system.yaml_text import MOST_BYTES

_GREY, _PALETTE = 0, 3  # colour types of a PNG
_ROWS = 256  # of a mask whose labels are looked up together


class MaskedFile(NamedTuple):
    """A picture on disk and its mask."""

    picture: Path
    mask: Path


class MaskedFolder:
    """A data set of pictures and masks in one of three layouts.

    - Pascal VOC, known by ``SegmentationClass``: JPEGImages/NAME.jpg, SegmentationClass/NAME.png
      and lists of names, ImageSets/Segmentation/SPLIT.txt;
    - ADE20k: images/SPLIT/NAME.jpg, annotations/SPLIT/NAME.png, with folders in these if need be;
    - the same with ``masks`` for ``annotations``.

    Args:
        folder: of the data set.
        classes: see ``read_label_names``.
        ignore: likewise.
        name: of the benchmark, for error texts.
    """

    def __init__(
        self,
        folder: str,
        classes: str | list[str] | None,
        ignore: Sequence[int] | None,
        *,
        name: str,
    ) -> None:
        self.folder = Path(folder)
        self._classes = classes
        self._ignore = ignore
        self._name = name

    @property
    def is_voc(self) -> bool:
        """Whether it has the layout of Pascal VOC."""
        return (self.folder / "SegmentationClass").is_dir()

    def labels(self) -> LabelNames:
        """Read the names of the classes; see ``read_label_names``."""
        return read_label_names(self._classes, self._ignore, self.folder, is_voc=self.is_voc)

    def files(self, split: str | None, *usual: str) -> list[MaskedFile]:
        """List the pictures of a split, by name, each with its mask.

        Args:
            split: name of the list (VOC) or of the folders; None takes the first of ``usual``.
            *usual: names that it has in one of the layouts.

        Raises:
            UserError: if there is no such split, nothing in it, or a picture without its mask or
                the other way round.
        """
        found = self._listed(split, usual) if self.is_voc else self._paired(split, usual)
        if not found:
            raise UserError(f"{self._setting} has no picture in split ({split or usual[0]})")
        return found

    @property
    def _setting(self) -> str:
        return f"folder ({self.folder}) of benchmark {self._name!r}"

    def _listed(self, split: str | None, usual: Sequence[str]) -> list[MaskedFile]:
        lists = self.folder / "ImageSets" / "Segmentation"
        names = [split] if split is not None else usual
        path = next((p for p in (lists / f"{n}.txt" for n in names) if p.is_file()), None)
        if path is None:
            raise UserError(
                f"{self._setting} has no list ImageSets/Segmentation/{names[0]}.txt; name one of "
                f"{', '.join(sorted(p.stem for p in lists.glob('*.txt'))[:8]) or 'none'}"
            )
        try:
            listed = split_lines(read_regular(path, MOST_BYTES).decode())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        stems = sorted({line.strip() for line in listed} - {""})
        pictures, masks = self.folder / "JPEGImages", self.folder / "SegmentationClass"
        found = [MaskedFile(pictures / f"{s}.jpg", masks / f"{s}.png") for s in stems]
        missing = [path for each in found for path in each if not path.is_file()]
        if missing:
            raise UserError(
                f"{self._setting} lacks {len(missing)} files of {path.name}, first {missing[0]}; "
                "complete it, or take them off the list"
            )
        return found

    def _paired(self, split: str | None, usual: Sequence[str]) -> list[MaskedFile]:
        splits = [split] if split is not None else usual
        places = [
            (self.folder / "images" / each, self.folder / kind / each)
            for each in splits
            for kind in ("annotations", "masks")
        ]
        place = next(((p, m) for p, m in places if p.is_dir() and m.is_dir()), None)
        if place is None:
            raise UserError(
                f"{self._setting} has neither SegmentationClass (Pascal VOC) nor "
                f"images/{splits[0]} with annotations/{splits[0]} or masks/{splits[0]}; name the "
                "folder above these"
            )
        pictures = _by_stem(place[0], PICTURE_EXTENSIONS)
        masks = _by_stem(place[1], ("png",))
        for ours, theirs, kind in ((pictures, masks, "mask"), (masks, pictures, "picture")):
            missing = sorted(ours.keys() - theirs.keys())
            if missing:
                raise UserError(
                    f"{self._setting} has no {kind} for {len(missing)} of {len(ours)} files, first "
                    f"{ours[missing[0]]}; masks are PNG files of the same names as their pictures"
                )
        return [MaskedFile(pictures[stem], masks[stem]) for stem in sorted(pictures)]


def _by_stem(folder: Path, extensions: Sequence[str]) -> dict[str, Path]:
    """Files of a folder and of those in it, by their path below it without its ending."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower().lstrip(".") in extensions and path.is_file()
    }


def read_mask(data: bytes, table: NDArray[np.int16], max_pixels: int) -> NDArray[np.int16]:
    """Read the class of each pixel of a mask.

    Args:
        data: a PNG file.
        table: of ``LabelNames.table``.
        max_pixels: largest width times height, read from the header.

    Returns:
        (H, W); ``NO_CLASS`` where a label is ignored.

    Raises:
        BadSampleError: if it is no PNG, has colours or transparency instead of labels, is damaged
            or too large, or holds a label that is neither a class nor ignored.
    """
    if sniff_media_type(data) != "image/png":
        raise BadSampleError("is no PNG; other formats do not keep labels as they are")
    # stored() is what Pillow makes of the file: values of 2 and 4 bits are stretched to 8.
    mask = EncodedPicture(data, PicturePolicy(max_image_pixels=max_pixels))
    bits, colour_type = data[24], data[25]
    if colour_type not in (_GREY, _PALETTE):
        raise BadSampleError(
            "has colours or transparency; a mask has one label for each pixel, grey or of a palette"
        )
    stored = np.asarray(mask.stored())
    stretch = 255 // (2**bits - 1) if colour_type == _GREY and bits in (2, 4) else 1
    found = np.empty(stored.shape, dtype=np.int16)
    for start in range(0, len(stored), _ROWS):  # eight bytes for each pixel, a while
        rows = slice(start, start + _ROWS)
        labels = stored[rows].astype(np.int64) // stretch
        found[rows] = table[labels]
        if (unknown := found[rows] == UNKNOWN).any():
            raise BadSampleError(
                f"has the label {labels[unknown].min()}, which is neither in classes nor in ignore"
            )
    return found


def see_mask(mask: NDArray[np.int16], window: Window, size: tuple[int, int]) -> NDArray[np.int16]:
    """Bring a mask to what a model sees of its picture, by the nearest pixel.

    Args:
        mask: (H, W) classes.
        window: that the model sees.
        size: (height, width) in pixels of what the model sees.

    Returns:
        Classes of that size; ``NO_CLASS`` in the padding.

    Example:
        >>> mask = np.array([[0, 1, 2, 3]], dtype=np.int16)
        >>> see_mask(mask, Window(0.0, 0.5, 1.0, 1.5), (1, 4)).tolist()
        [[2, 3, -1, -1]]
    """
    rows, row_is_in = _places(window.top, window.bottom, size[0], mask.shape[0])
    columns, column_is_in = _places(window.left, window.right, size[1], mask.shape[1])
    seen = mask[rows[:, None], columns]
    seen[~(row_is_in[:, None] & column_is_in)] = NO_CLASS
    return seen


def see_packed(mask: NDArray[np.int16], window: Window, packed: Tensor) -> NDArray[np.int16]:
    """Bring a mask to the patches of a packed picture, one below the other.

    Args:
        mask: (H, W) classes.
        window: that the model sees.
        packed: (1 + N, 3 p^2).

    Returns:
        (N * p, p) classes; ``NO_CLASS`` in patches that are padding.
    """
    patches, shape = unpack(packed[None])
    rows, columns = shape[0].tolist()
    side = side_of_patch(patches)
    seen = see_mask(mask, window, (rows * side, columns * side))
    cut = seen.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side)
    found = np.full((patches.shape[1] * side, side), NO_CLASS, dtype=np.int16)
    found[: len(cut)] = cut
    return found


def _places(
    first: float, stop: float, count: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Pixels in which the centres of ``count`` pixels lie, and whether they are in the picture."""
    shares = first + (np.arange(count) + 0.5) / count * (stop - first)
    places = np.floor(shares * length).astype(np.int64)
    return places.clip(0, length - 1), (places >= 0) & (places < length)


class MaskedPicture(NamedTuple):
    """A picture and the class of each of its pixels, (H, W), ``NO_CLASS`` for none."""

    picture: Image.Image
    mask: NDArray[np.int16]


class MaskedSource(Protocol):
    """Pictures with masks by number."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, number: int, policy: PicturePolicy) -> MaskedPicture:
        """Read one; ``BadSampleError`` names the file that cannot be used, and why."""


class MaskedFiles:
    """Pictures with masks on disk.

    Args:
        files: of the pictures.
        labels: of the masks.
        max_image_pixels: of a picture and of a mask.
    """

    def __init__(
        self, files: Sequence[MaskedFile], labels: LabelNames, max_image_pixels: int
    ) -> None:
        self._files = files
        self._table = labels.table()
        self._max_image_pixels = max_image_pixels

    def __len__(self) -> int:
        return len(self._files)

    def read(self, number: int, policy: PicturePolicy) -> MaskedPicture:
        """Read one; see ``MaskedSource``."""
        file, most = self._files[number], self._max_image_pixels
        with _naming(file.picture):
            policy = policy.changed(max_image_pixels=most)
            picture = EncodedPicture(read_regular(file.picture), policy).decode()
        with _naming(file.mask):
            mask = read_mask(read_regular(file.mask), self._table, most)
        if picture.size != mask.shape[::-1]:
            raise BadSampleError(
                f"mask {file.mask} has {mask.shape[1]} x {mask.shape[0]} pixels and its picture "
                f"{picture.size[0]} x {picture.size[1]}; make them of one size"
            )
        return MaskedPicture(picture, mask)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that cannot be used."""
    try:
        yield
    except (OSError, BadSampleError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadSampleError(f"{path} {reason}") from error


class MaskedSample(NamedTuple):
    """A picture and its mask as the model sees them; neither if it is padding or has a problem."""

    number: int
    pixels: Tensor | None = None
    mask: Tensor | None = None
    problem: str = ""


class MaskedBatch(NamedTuple):
    """The B pictures of a batch.

    Attributes:
        numbers: of the B pictures.
        pixels: (B, 3, H, W) uint8, or packed patches; a single grey picture where B is 0.
        masks: (B, H, W) int16; of packed patches as ``see_packed``.
        problem: why one cannot be used; empty if all can.
    """

    numbers: list[int]
    pixels: Tensor
    masks: Tensor
    problem: str


class _MaskedDataset(Dataset[MaskedSample]):
    def __init__(self, source: MaskedSource, inputs: Preprocessing) -> None:
        self._source = source
        self._inputs = inputs
        self._transform = evaluation_transform(inputs)
        assert isinstance(self._transform, WindowedTransform)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, at: StreamPosition) -> MaskedSample:
        if at.is_padding:
            return MaskedSample(at.sample_id)
        assert isinstance(self._transform, WindowedTransform)
        try:
            found = self._source.read(at.sample_id, self._inputs.pictures)
            pixels, window = self._transform.with_window(found.picture)
        except BadSampleError as error:
            return MaskedSample(at.sample_id, problem=str(error))
        if is_packed(pixels[None]):
            mask = see_packed(found.mask, window, pixels)
        else:
            height, width = pixels.shape[1:]
            mask = see_mask(found.mask, window, (height, width))
        return MaskedSample(at.sample_id, pixels, torch.from_numpy(mask))


class _Collator:
    """Stacks the samples that are there."""

    def __init__(self, inputs: Preprocessing) -> None:
        size = inputs.image_size
        self._size = (size, size) if isinstance(size, int) else size
        self._patches = inputs.patches

    def __call__(self, samples: Sequence[MaskedSample]) -> MaskedBatch:
        pixels, masks = [], []
        numbers = []
        for sample in samples:
            if sample.pixels is not None and sample.mask is not None:
                numbers.append(sample.number)
                pixels.append(sample.pixels)
                masks.append(sample.mask)
        size = self._size
        if self._patches is None:
            grey = torch.full((1, 3, *size), 128, dtype=torch.uint8)
        else:
            side, num_patches = self._patches
            grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
            grey, size = pack_pictures(grey, side, num_patches), (num_patches * side, side)
        return MaskedBatch(
            numbers,
            torch.stack(pixels) if pixels else grey,
            torch.stack(masks) if masks else torch.empty(0, *size, dtype=torch.int16),
            next((sample.problem for sample in samples if sample.problem), ""),
        )


def masked_batches(
    source: MaskedSource,
    inputs: Preprocessing,
    *,
    rank: int,
    world_size: int,
    local_batch_size: int,
    workers: int,
) -> Iterator[MaskedBatch]:
    """Read this rank's share of the pictures, in equally many batches on every rank.

    Args:
        source: pictures and masks.
        inputs: preprocessing of the model.
        rank: of this process.
        world_size: ranks.
        local_batch_size: pictures of a batch.
        workers: loader processes; 0 loads in this process.
    """
    sampler = EvaluationBatchSampler(
        len(source), rank=rank, world_size=world_size, local_batch_size=local_batch_size
    )
    yield from DataLoader(
        _MaskedDataset(source, inputs),
        batch_sampler=sampler,
        collate_fn=_Collator(inputs),
        num_workers=workers,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # a loader without one draws from the training's
    )
