"""Reinforced samples: stored augmentations, synthetic captions, and rows of teachers for each.

The layout is that of DataCompDR (Vasu et al. 2024, arXiv:2311.17049), as its card and its public
reader tell it. Beside picture and caption a sample has three members:

- ``paug.json``: ``{"param_aug": A augmentations}``, a list, or a string of JSON that is one; see
  ``samples/augmentations.py``.
- ``syn.json``: ``{"syn_text": S synthetic captions}``.
- ``npz``: ``image_emb`` (A, D), a row for each augmentation, and ``text_emb`` (1 + S, D), a row for
  the sample's own caption, then those of the synthetic ones; teachers side by side. Numbers are
  float32 or float16, or bfloat16 whose bits are stored as uint16.

Nothing is unpickled: the ``pth.gz`` of the bfloat16 edition is not read.
"""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.index.read import DAMAGED_ARRAYS, read_index
from dist_siglip.data.order.sequence import Draw, draw_one
from dist_siglip.data.samples.augmentations import (
    OPERATIONS,
    Augmentation,
    Replay,
    UnknownOperationError,
    check_inside,
    parse_augmentation,
)
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import (
    MAX_CAPTION_CHARACTERS,
    CaptionRule,
    field_of,
    read_json,
    texts_of,
)
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.errors import UserError

_AUGMENTATIONS, _SYNTHETIC, _ROWS = "paug.json", "syn.json", "npz"
MEMBERS = (_AUGMENTATIONS, _SYNTHETIC, _ROWS)
_MOST_BYTES = 1 << 24  # of the rows of a sample: 85 times those of 30 augmentations in float32
_PROBED = 8  # samples that may be bad before the shards are
_SHARES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class DataCompDR:
    """Training shards whose samples say what teachers saw and answered.

    Args:
        dims: numbers of each teacher in a row; the teachers stand side by side.
        synthetic: "drawn" gives a sample its own caption or one of the synthetic ones; "beside"
            both, which then train together in each step, as in the published runs.
        synthetic_share: of "drawn": share of the samples that get a synthetic caption, by their
            place in the stream.
        picture_size: side in pixels of the pictures that the teachers saw; stored shifts count
            these.
    """

    dims: tuple[int, ...] = (768, 768)
    synthetic: Literal["drawn", "beside"] = "drawn"
    synthetic_share: float = 0.5
    picture_size: int = 224

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: naming the setting.
        """
        if not self.dims or min(self.dims) < 1:
            raise UserError(f"datacompdr.dims ({list(self.dims)}) must be numbers of at least 1")
        if not 0 <= self.synthetic_share <= 1:
            raise UserError(
                f"datacompdr.synthetic_share ({self.synthetic_share}) must be in [0, 1]"
            )
        if self.synthetic not in ("drawn", "beside"):
            raise UserError(f"datacompdr.synthetic ({self.synthetic}) must be drawn or beside")
        if self.picture_size < 1:
            raise UserError(f"datacompdr.picture_size ({self.picture_size}) must be at least 1")

    @property
    def caption_weights(self) -> dict[str, float]:
        """Weights of the captions that train together, by name; none if one is drawn."""
        return {"own": 1.0, "synthetic": 1.0} if self.synthetic == "beside" else {}

    def check_settings(
        self,
        *,
        captions: CaptionRule,
        num_stages: int,
        train_crop_scale: tuple[float, float] | None,
        train_features: object,
    ) -> None:
        """Refuse settings after which the stored rows would be those of something else.

        Raises:
            UserError: naming the setting.
        """
        if num_stages:
            raise UserError(
                f"stages ({num_stages}) change samples whose rows datacompdr has without them; "
                "leave one of the two out"
            )
        if train_crop_scale is not None:
            raise UserError(
                f"train_crop_scale ({train_crop_scale}) has no effect on datacompdr, whose samples "
                "say which crops the teachers saw; set it to null"
            )
        if train_features is not None:
            raise UserError(
                f"train_features ({train_features}) stand in for what datacompdr shows; leave one "
                "of the two out"
            )
        if captions.fields:
            raise UserError(
                f"captions.weights and captions.probabilities ({', '.join(captions.fields)}) must "
                "be null: datacompdr draws the caption itself, by datacompdr.synthetic_share"
            )
        if captions.pick != "first":
            raise UserError(
                f"captions.pick ({captions.pick}) must be first: datacompdr has the row of one "
                "caption of a sample's own"
            )


class TeacherRows(NamedTuple):
    """Rows of the teachers for one sample, as stored: (A, D) and (1 + S, D)."""

    image: NDArray[Any]
    text: NDArray[Any]


def read_teacher_rows(data: bytes, width: int) -> TeacherRows:
    """Read the arrays of a sample; memory stays bounded, nothing is unpickled.

    Args:
        data: of the ``npz`` member.
        width: numbers of a row.

    Raises:
        BadSampleError: if it is damaged, too large, or has arrays of another kind.
    """
    if len(data) > _MOST_BYTES:
        raise BadSampleError(f"rows of teachers in {len(data)} bytes, at most {_MOST_BYTES}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return TeacherRows(
                _read_array(archive, "image_emb", width), _read_array(archive, "text_emb", width)
            )
    except DAMAGED_ARRAYS as error:
        raise BadSampleError(f"rows of teachers cannot be read: {error}") from error


def _read_array(archive: zipfile.ZipFile, name: str, width: int) -> NDArray[Any]:
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadSampleError(f"{name} is compressed in a way that is not read")
    if entry.file_size > _MOST_BYTES:
        raise BadSampleError(f"{name} of {entry.file_size} bytes, at most {_MOST_BYTES}")
    stream = io.BytesIO(archive.read(entry))
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise BadSampleError(f"{name} has version {version} of its format")
    if dtype.newbyteorder("<") not in (np.dtype("<f2"), np.dtype("<f4"), np.dtype("<u2")):
        raise BadSampleError(f"{name} holds {dtype}, not float32, float16 or bfloat16 as uint16")
    if len(shape) != 2 or shape[0] < 1 or shape[1] != width or is_fortran:
        raise BadSampleError(f"{name} has shape {shape}, not rows of {width} numbers")
    if stream.getbuffer().nbytes - stream.tell() != shape[0] * width * dtype.itemsize:
        raise BadSampleError(f"{name} is longer or shorter than its shape {shape}")
    return np.frombuffer(stream.getbuffer(), dtype, offset=stream.tell()).reshape(shape)


def teacher_row(stored: NDArray[Any], dims: tuple[int, ...]) -> Tensor:
    """Return a row in float32, the block of each teacher L2-normalised by itself.

    Args:
        stored: (D,) float32 or float16, or uint16, the bits of bfloat16.
        dims: of the teachers; their sum is D.

    Raises:
        BadSampleError: if it holds what is not finite, or a teacher says nothing but zeros.

    Example:
        >>> teacher_row(np.array([3.0, 4.0, 0.5], np.float32), (2, 1)).tolist()
        [0.6000000238418579, 0.800000011920929, 1.0]
    """
    values = stored.astype(stored.dtype.newbyteorder("="))
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    row = torch.from_numpy(values.astype(np.float32))
    norms = torch.stack([block.double().norm() for block in row.split(list(dims))])
    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise BadSampleError("row of a teacher is zero or not finite")
    return row / norms.float().repeat_interleave(torch.tensor(dims))


class DrawnView(NamedTuple):
    """What a sample shows at a place in the stream, and what the teachers answered to it.

    Attributes:
        replay: makes the pixels of the encoded picture: (3, H, W) uint8.
        captions: synthetic ones; None for the sample's own.
        image_row: (D,) float32, see ``teacher_row``.
        text_row: likewise, of the captions, one behind the other.
    """

    replay: Callable[[EncodedPicture], Tensor]
    captions: list[str | None]
    image_row: Tensor
    text_row: Tensor


class ReinforcedSamples:
    """Draws augmentation and caption of each sample, with the rows of the teachers.

    Args:
        settings: what the shards hold.
        table: the data set, with ``MEMBERS`` among its members.
        replay: makes the pixels; None where nothing is drawn, only looked at.
        max_incomplete: share of the samples that may lack a member, and are bad.

    Raises:
        UserError: if members are missing, or the first samples cannot be used.
    """

    def __init__(
        self,
        settings: DataCompDR,
        table: PairTable,
        replay: Replay | None = None,
        *,
        max_incomplete: float = 0.0,
    ) -> None:
        self._settings = settings
        self._table = table
        self._replay = replay
        self._reader = ShardReader(table.cache)
        self._check_members(max_incomplete)
        self._probe()

    def draw(
        self, sample_id: int, key: tuple[int, ...], is_empty: Callable[[str], bool]
    ) -> DrawnView:
        """Draw what a sample shows.

        Args:
            sample_id: of the sample.
            key: of the place in the stream.
            is_empty: tells texts that count for nothing.

        Raises:
            BadSampleError: if a member cannot be used.
            UserError: if one of its augmentations cannot be replayed.
        """
        stored, texts, rows = self._read(sample_id)
        number = draw_one(len(stored), *key, Draw.AUGMENTATION)
        try:
            augmentations = [parse_augmentation(each) for each in stored]
        except UnknownOperationError as error:
            raise self._cannot_replay(sample_id, error) from error
        captions: list[str | None] = [None]
        places = [0]
        share = self._settings.synthetic_share
        is_beside = self._settings.synthetic == "beside"
        if is_beside or draw_one(_SHARES, *key, Draw.IS_SYNTHETIC) < share * _SHARES:
            cut = [text.strip()[:MAX_CAPTION_CHARACTERS].rstrip() for text in texts]
            usable = [i for i, text in enumerate(cut) if text and not is_empty(text)]
            if not usable:
                raise BadSampleError("synthetic captions are empty")
            place = usable[draw_one(len(usable), *key, Draw.SYNTHETIC)]
            kept = 1 if is_beside else 0  # of the sample's own
            captions, places = [*captions[:kept], cut[place]], [*places[:kept], 1 + place]
        return DrawnView(
            partial(self._show, augmentations=augmentations, number=number),
            captions,
            teacher_row(rows.image[number], self._settings.dims),
            torch.cat([teacher_row(rows.text[i], self._settings.dims) for i in places]),
        )

    def _show(
        self, picture: EncodedPicture, *, augmentations: list[Augmentation], number: int
    ) -> Tensor:
        """Replay one augmentation of a picture that has room for all: a smaller one is another."""
        assert self._replay is not None
        for each in augmentations:
            check_inside(each, picture.size)
        return self._replay(picture, augmentations[number])

    def _read(self, sample_id: int) -> tuple[list[Any], list[str], TeacherRows]:
        """Read augmentations, synthetic captions and rows, which must fit together."""
        listed = field_of(read_json(self._member(sample_id, _AUGMENTATIONS)), "param_aug")
        if isinstance(listed, str):
            try:
                listed = json.loads(listed)
            except (ValueError, RecursionError) as error:
                raise BadSampleError(f"param_aug is not JSON: {str(error)[:100]}") from error
        if not isinstance(listed, list) or not listed:
            raise BadSampleError("param_aug holds no list of augmentations")
        texts = texts_of(
            field_of(read_json(self._member(sample_id, _SYNTHETIC)), "syn_text"), "syn_text"
        )
        rows = read_teacher_rows(self._member(sample_id, _ROWS), sum(self._settings.dims))
        for name, found, wanted, what in (
            ("image_emb", len(rows.image), len(listed), f"{len(listed)} augmentations"),
            ("text_emb", len(rows.text), 1 + len(texts), f"a caption and {len(texts)} synthetic"),
        ):
            if found != wanted:
                raise BadSampleError(f"{name} has {found} rows for {what}")
        return listed, texts, rows

    def _member(self, sample_id: int, extension: str) -> bytes:
        span = self._table.member_span(sample_id, extension)
        if span is None:
            raise BadSampleError(f"it has no .{extension}")
        return self._reader.read(span)

    def _check_members(self, most: float) -> None:
        """Refuse a table in which more than a share of the samples lack a member."""
        for extension in MEMBERS:
            row = self._table.caption_extensions.index(extension)
            missing = np.flatnonzero(self._table.caption_offsets[row] < 0)
            if missing.size > most * self._table.num_samples:
                raise UserError(
                    f"datacompdr: {missing.size} of {self._table.num_samples} training samples "
                    f"have no .{extension}, first {self._table.describe(int(missing[0]))}"
                    f"{self._pickles_beside(int(missing[0]))}"
                )

    def _pickles_beside(self, sample_id: int) -> str:
        """Say what to do about rows that are pickled, if the shard of a sample has such."""
        shard = self._table.name(sample_id)[0]
        held = read_index(shard, cache=self._table.cache).extensions
        pickled = [kind for kind in held if kind in ("pth.gz", "pth", "pt", "pkl")]
        if not pickled:
            return f"; {', '.join(f'.{each}' for each in MEMBERS)} belong to every sample"
        return (
            f"; .{pickled[0]} is a pickle, which may run code and is not read: where you trust it, "
            "write image_emb and text_emb with numpy.savez to .npz instead"
        )

    def _probe(self) -> None:
        """Look at the first samples, so that shards of another kind fail before training."""
        few = range(min(_PROBED, self._table.num_samples))
        problems = [self._problem_of(sample_id) for sample_id in few]
        if all(problems):
            raise UserError(
                f"datacompdr: none of the first samples can be used, first "
                f"{self._table.describe(0)}: {problems[0]}; datacompdr.dims are "
                f"{list(self._settings.dims)}"
            )

    def _problem_of(self, sample_id: int) -> BadSampleError | None:
        """Say why a sample cannot be used.

        Raises:
            UserError: if one of its augmentations cannot be replayed.
        """
        try:
            stored, _, rows = self._read(sample_id)
            for each in stored:
                parse_augmentation(each)
            teacher_row(rows.image[0], self._settings.dims)
        except UnknownOperationError as error:
            raise self._cannot_replay(sample_id, error) from error
        except BadSampleError as error:
            return error
        return None

    def _cannot_replay(self, sample_id: int, error: UnknownOperationError) -> UserError:
        return UserError(
            f"datacompdr: {self._table.describe(sample_id)}: {error}; crop, flip and "
            f"{', '.join(OPERATIONS)} can be replayed: leave the shard out or store others"
        )
