"""The data set: the sample at a position of the stream.

``PairDataset[position]`` is a function of the position: which bytes, which caption, which crop, and
which substitute if they are bad, in whatever process. For that the global random generators are
seeded for each sample and restored afterwards.
"""

import io
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.order.sequence import Draw, StreamPosition, draw_one
from dist_siglip.data.samples.bad_samples import BadSampleError, BadSampleLog, TruncatedCount
from dist_siglip.data.samples.batch import PairSample
from dist_siglip.data.samples.cached_features import TOWERS, CachedFeatures, Tower
from dist_siglip.data.samples.captions import CaptionRule, EmptyCaptions, Tokenizer, read_json
from dist_siglip.data.samples.datacompdr import ReinforcedSamples
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.identity import PICTURE_BYTES, named_picture_id, picture_id
from dist_siglip.data.samples.picture import EncodedPicture, sniff_media_type
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.regions import Region, RegionRule, Window
from dist_siglip.data.samples.stages import (
    FilteredError,
    Stage,
    all_take_rgb,
    check_stages,
    outside_of_training,
    run_stages,
)
from dist_siglip.data.samples.transforms import (
    ImageTransform,
    ViewTransform,
    WindowedTransform,
    at_length,
)
from dist_siglip.errors import UserError
from dist_siglip.system.redaction import redact

_LOGGER = logging.getLogger(__name__)


@contextmanager
def seeded_generators(*key: int) -> Iterator[None]:
    """Seed the global CPU generators from a key, and restore them at the end.

    Args:
        key: integers >= 0; equal keys give equal draws, on every machine.

    Example:
        >>> with seeded_generators(1, 2, 3):
        ...     first = random.random()
        >>> with seeded_generators(1, 2, 3):
        ...     print(first == random.random())
        True
    """
    words = np.random.SeedSequence(key).generate_state(3)
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed: that would reseed the GPUs too.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


_NO_PIXELS = torch.empty(3, 0, 0, dtype=torch.uint8)
_BAD_ATTEMPTS = 20  # bad samples in a row for one position
_FILTERED_ATTEMPTS = 1000  # samples in a row that stages leave out
_SAME_SHARD = 10  # attempts at a substitute of the same shard, which is open and at hand
_NAMED = 20  # bad samples named by each process; then every hundredth


class _Made(NamedTuple):
    """A sample that was read, decoded and transformed."""

    image: Tensor
    captions: list[str]
    picture_id: int | None
    teacher_image_row: Tensor | None = None
    teacher_text_row: Tensor | None = None
    region: Region | None = None
    view: Tensor | None = None
    local_views: Tensor | None = None


class PairDataset(Dataset[PairSample]):
    """Map-style data set, indexed by ``StreamPosition``.

    A sample that cannot be read or decoded is named in the log, and a substitute is drawn from the
    key of position and attempt: ten times from the same shard, then from the same source. So
    every other sample stays where it is. A sample that a stage leaves out is replaced likewise,
    but it is not bad.

    Args:
        table: where the members are.
        transform: picture to (3, H, W) uint8; random draws are seeded by the key of the position.
        seed: >= 0.
        pictures: what decides the pixels of an encoded picture.
        captions: which caption a sample gets.
        stages: steps between decoding and transform; an evaluation leaves augmentations out.
        source_ranges: (first id, id after the last) of each source; by default one has all.
        bad_sample_log: file for a JSON line about every bad sample: shard, key, sample_id, epoch,
            position, source, reason. None writes none.
        features: rows that stand in for pictures, captions or both; a sample without one is bad.
        teacher_features: rows of teachers, which go beside each other; likewise.
        is_evaluation: take the first caption, and mark substitutes as not valid, so that they do
            not count.
        tokenizer: of the model; a caption without a token is empty.
        picture_id: when pictures are the same, see ``ImageTextDataModule``.
        reinforced: augmentations, synthetic captions and rows of teachers that shards store; in
            place of ``transform`` the augmentations are replayed.
        regions: where regions of pictures are, and which one a sample gets.
        views: further views of each picture, drawn behind everything else of it. None: no others.

    Attributes:
        picture_id: may be set to None until the data set is loaded from, where nobody asks.

    Raises:
        UserError: if regions are asked for of a table without JSON members, with ``reinforced``, or
            of a transform that does not say which part of a picture is seen.
    """

    def __init__(
        self,
        table: PairTable,
        transform: ImageTransform,
        *,
        seed: int,
        pictures: PicturePolicy,
        captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
        stages: Sequence[Stage] = (),
        source_ranges: Sequence[tuple[int, int]] = (),
        bad_sample_log: str | None = None,
        features: CachedFeatures | None = None,
        teacher_features: Sequence[CachedFeatures] = (),
        is_evaluation: bool = False,
        tokenizer: Tokenizer | None = None,
        picture_id: str | None = PICTURE_BYTES,
        reinforced: ReinforcedSamples | None = None,
        regions: RegionRule = RegionRule(),  # noqa: B008 - frozen dataclass
        views: ViewTransform | None = None,
    ) -> None:
        regions.check_reading(
            table.caption_extensions,
            has_windows=isinstance(transform, WindowedTransform),
            is_reinforced=reinforced is not None,
        )
        self.table = table
        self._transform = transform
        self._seed = seed
        self._pictures = pictures
        self._captions = captions.always_first() if is_evaluation else captions
        stages = outside_of_training(stages) if is_evaluation else stages
        self._stages = check_stages(stages, reads_regions=regions.json_field is not None)
        self._source_ranges = tuple(source_ranges) or ((0, table.num_samples),)
        self._log = BadSampleLog(bad_sample_log)
        self._truncated = TruncatedCount(table.describe)
        self._features = features
        self._teacher_features = tuple(teacher_features)
        self._is_evaluation = is_evaluation
        # The table may know further members, which hold no captions.
        self._caption_members = {name.lower().lstrip(".") for name in captions.members}
        self._is_empty = EmptyCaptions(tokenizer)
        self.picture_id = picture_id
        self._reinforced = reinforced
        self._regions = regions
        self._views = views
        self._reader = ShardReader(table.cache, fields=self._json_fields())
        self._num_bad = 0

    def _json_fields(self) -> tuple[str, ...] | None:
        """Name the fields of a .json that are looked at; None if stages may look at any."""
        if self._stages:
            return None
        others = [self.picture_id, self._regions.json_field]
        return (*self._captions.json_fields, *(name for name in others if name is not None))

    def __len__(self) -> int:
        return self.table.num_samples

    def __getitem__(self, at: StreamPosition) -> PairSample:
        """Return the sample of a position, or its substitute.

        Raises:
            UserError: if a sample and 20 substitutes in a row are bad, or stages leave out a
                thousand.
        """
        sample_id, num_bad, num_filtered = at.sample_id, 0, 0
        while num_bad <= _BAD_ATTEMPTS and num_filtered < _FILTERED_ATTEMPTS:
            try:
                made = self._make(sample_id, at, num_bad + num_filtered)
                features = self._rows(sample_id)
                teachers = self._teacher_rows(sample_id)
                negatives = self._negatives(sample_id, at)
            except BadSampleError as error:
                num_bad += 1
                self._report(sample_id, at, error)
            except FilteredError:
                num_filtered += 1
            else:
                is_due = sample_id == at.sample_id
                return PairSample(
                    image=made.image,
                    caption=made.captions[0],
                    sample_id=sample_id,
                    is_valid=not at.is_padding and (is_due or not self._is_evaluation),
                    is_substitute=num_bad > 0,
                    image_features=features.get("image"),
                    text_features=features.get("text"),
                    picture_id=made.picture_id,
                    caption_id=self._stored_id(sample_id, "text"),
                    draw=draw_one(2**63, *at.key(self._seed), Draw.DEVICE),
                    teacher_image_features=teachers.get("image", made.teacher_image_row),
                    teacher_text_features=teachers.get("text", made.teacher_text_row),
                    more_captions=tuple(made.captions[1:]),
                    region=made.region,
                    view=made.view,
                    local_views=made.local_views,
                    negatives=negatives,
                )
            sample_id = self._substitute(at, num_bad + num_filtered)
        if num_filtered >= _FILTERED_ATTEMPTS:
            raise UserError(
                f"stages leave out {num_filtered} samples in a row, from "
                f"{self.table.describe(at.sample_id)} on; let more pass, or write shards of those"
            )
        raise UserError(
            f"sample {self.table.describe(at.sample_id)} and {_BAD_ATTEMPTS} substitutes are all "
            "bad (see the warnings above); repair the shards"
        )

    def raw(self, sample_id: int) -> tuple[bytes, str, str]:
        """Return a sample as it is stored.

        Returns:
            (encoded picture, its media type such as ``"image/png"``, caption).

        Raises:
            BadSampleError: if it cannot be read.
        """
        data = self._reader.read(self.table.image_span(sample_id))
        caption = self._captions.choose(
            self._members(sample_id), (self._seed, sample_id), is_empty=self._is_empty
        )
        return data, sniff_media_type(data), caption

    def count_fields(self, upcoming: Iterable[StreamPosition]) -> dict[str, int]:
        """Say how many of some samples have each field that the rule of captions names."""
        rule = self._captions
        counts = dict.fromkeys((*rule.fields, *filter(None, [rule.negatives])), 0)
        for at in upcoming:
            with suppress(BadSampleError):
                members = self._members(at.sample_id)
                if rule.negatives is not None:
                    counts[rule.negatives] += any(self._negatives(at.sample_id, at))
                for name in rule.by_field(members, is_empty=self._is_empty) if rule.fields else ():
                    counts[name] += 1
        return counts

    def shown(self, data: bytes) -> tuple[bytes, str]:
        """Return a picture as a browser shows it the way a model sees it.

        Args:
            data: as stored. Where it has transparency, or a browser would turn it, it is written
                anew.

        Returns:
            Encoded picture, its media type.

        Raises:
            BadSampleError: if it cannot be decoded.
        """
        picture = EncodedPicture(data, self._pictures)
        if picture.looks_as_stored:
            return data, sniff_media_type(data)
        kind = "PNG" if picture.has_transparency else "JPEG"
        buffer = io.BytesIO()
        image = picture.decode()
        image.info.clear()
        image.save(buffer, kind)
        return buffer.getvalue(), f"image/{kind.lower()}"

    def seen(self, data: bytes) -> tuple[Image.Image, Window] | None:
        """Return a stored picture in RGB, and the part of it that a model sees.

        None if stages or the transform do not say which it is.

        Raises:
            BadSampleError: if it cannot be decoded.
        """
        if self._stages or not isinstance(self._transform, WindowedTransform):
            return None
        image = EncodedPicture(data, self._pictures).decode()
        return image, self._transform.with_window(image)[1]

    def _make(self, sample_id: int, at: StreamPosition, attempt: int) -> "_Made":
        """Read, decode and transform a sample with the randomness of a position and an attempt."""
        key = at.key(self._seed)
        if attempt:  # a stage that leaves out by lot would draw the same lot for ever
            key = (*key, attempt)
        view = None
        if self._reinforced is not None:
            view = self._reinforced.draw(sample_id, key, self._is_empty)
        members = list(self._members(sample_id)) if self._stages else self._members(sample_id)
        synthetic = [] if view is None else [text for text in view.captions if text is not None]
        if view is None and not self._is_evaluation:
            captions = self._captions.choose_each(members, key, is_empty=self._is_empty)
        elif view is None or None in view.captions:
            captions = [self._captions.choose(members, key, is_empty=self._is_empty), *synthetic]
        else:
            captions = synthetic
        if self._features is not None and "image" in self._features.towers:
            return _Made(_NO_PIXELS, captions, self._picture_id(sample_id, None))
        data = self._reader.read(self.table.image_span(sample_id))
        identity = self._picture_id(sample_id, data)
        regions = self._all_regions(sample_id)
        picture = EncodedPicture(data, self._pictures)
        transform = at_length(self._transform, at.num_patches)
        with seeded_generators(*key):
            if not self._stages:
                if view is None:
                    image, region = self._seen(transform, picture, regions, key)
                else:
                    image, region = view.replay(picture), None
                views = self._more_views(picture)
                if picture.is_truncated:
                    self._truncated.note(sample_id)
                if view is None:
                    return _Made(image, captions, identity, None, None, region, *views)
                rows = view.image_row, view.text_row
                return _Made(image, captions, identity, *rows, None, *views)
            shard, name = self.table.name(sample_id)
            sample: dict[str, Any] = {"__key__": name, "__url__": shard, "text": captions[0]}
            if captions[1:]:
                sample["more_texts"] = captions[1:]
            sample["image"] = picture.decode() if all_take_rgb(self._stages) else picture.stored()
            if picture.is_truncated:
                self._truncated.note(sample_id)
            sample |= {kind: read_json(data) for kind, data in members if kind == "json"}
            if self._regions.json_field is not None:
                sample["regions"] = [{"text": each.text, "box": [*each.box]} for each in regions]
            policy = self._pictures
            changed = run_stages(self._stages, sample, policy.transparency, policy.intensity_window)
            captions = [changed["text"], *changed.get("more_texts", [])]
            if self._regions.json_field is not None:
                moved = {self._regions.json_field: changed["regions"]}
                regions = self._regions.read(moved, is_empty=self._is_empty)
            image, region = self._seen(transform, changed["image"], regions, key)
            views = self._more_views(changed["image"])
            return _Made(image, captions, identity, None, None, region, *views)

    def _more_views(
        self, picture: EncodedPicture | Image.Image
    ) -> tuple[Tensor | None, Tensor | None]:
        """Make what objectives see of a picture beside the pair; last of all that is drawn."""
        return (None, None) if self._views is None else self._views(picture)

    def _seen(
        self,
        transform: ImageTransform,
        picture: EncodedPicture | Image.Image,
        regions: Sequence[Region],
        key: tuple[int, ...],
    ) -> tuple[Tensor, Region | None]:
        """Transform a picture, and draw one of the regions that are left of it."""
        if not isinstance(transform, WindowedTransform):
            return transform(picture), None
        image, window = transform.with_window(picture)
        if self._regions.json_field is None:
            return image, None
        return image, self._regions.choose(regions, window, key)

    def shows_region(self, at: StreamPosition) -> bool:
        """Whether a sample has a region, or is bad, of which others tell."""
        try:
            return bool(self._all_regions(at.sample_id))
        except BadSampleError:
            return True

    def _all_regions(self, sample_id: int) -> list[Region]:
        """Read the regions of a stored picture."""
        span = None
        if self._regions.json_field is not None:
            span = self.table.member_span(sample_id, "json")
        if span is None:
            return []
        return self._regions.read(read_json(self._reader.read(span)), is_empty=self._is_empty)

    def _picture_id(self, sample_id: int, data: bytes | None) -> int | None:
        """Identify a picture by what the setting names, else by its bytes or those embedded."""
        if self.picture_id is None:
            return None
        if self.picture_id != PICTURE_BYTES:
            found = self._field_id(sample_id, self.picture_id)
            if found is not None:
                return found
        return self._stored_id(sample_id, "image") if data is None else picture_id(data)

    def _field_id(self, sample_id: int, field: str) -> int | None:
        """Identify a picture by a field of its JSON; None where it says nothing."""
        span = self.table.member_span(sample_id, "json")
        return None if span is None else named_picture_id(self._reader.read(span), field)

    def _stored_id(self, sample_id: int, tower: Tower) -> int | None:
        """Return the id that was stored with the features of a tower, if any stand in for it."""
        if self._features is None or tower not in self._features.towers:
            return None
        return self._features.identity(sample_id, tower)

    def _rows(self, sample_id: int) -> dict[str, Tensor]:
        """Read the features that stand in, by tower."""
        if self._features is None:
            return {}
        return {tower: self._features.row(sample_id, tower) for tower in self._features.towers}

    def _teacher_rows(self, sample_id: int) -> dict[str, Tensor]:
        """Read the rows of teachers, side by side, by tower."""
        if not self._teacher_features:
            return {}
        return {
            tower: torch.cat([each.row(sample_id, tower) for each in self._teacher_features])
            for tower in TOWERS
        }

    def _negatives(self, sample_id: int, at: StreamPosition) -> tuple[str, ...]:
        """Read texts that do not belong to the picture, "" in place of missing ones."""
        members, key = self._members(sample_id), at.key(self._seed)
        return tuple(self._captions.choose_negatives(members, key, is_empty=self._is_empty))

    def _members(self, sample_id: int) -> Iterator[tuple[str, bytes]]:
        """Read the members with captions, one at a time."""
        for extension, span in self.table.caption_spans(sample_id):
            if extension in self._caption_members:
                yield extension, self._reader.read(span)

    def _substitute(self, at: StreamPosition, attempt: int) -> int:
        """Draw a sample to stand in, of the same shard, later of the same source."""
        if attempt <= _SAME_SHARD:
            first, stop = self.table.shard_range(at.sample_id)
        else:
            first, stop = self._source_ranges[at.source]
        return first + draw_one(stop - first, *at.key(self._seed), attempt)

    def _report(self, sample_id: int, at: StreamPosition, error: BadSampleError) -> None:
        """Count a bad sample, write it down and name it in the log, at first and now and then."""
        self._num_bad += 1
        is_named = self._num_bad <= _NAMED or self._num_bad % 100 == 0
        if self._log.path is None and not is_named:
            return
        shard, key = self.table.name(sample_id)
        self._log.append(
            shard=redact(shard),
            key=key,
            sample_id=sample_id,
            epoch=at.epoch,
            position=at.position,
            source=at.source,
            reason=str(error),
        )
        if is_named:
            _LOGGER.warning(
                "bad sample %d in this process: %s: %s; another sample stands in",
                self._num_bad,
                self.table.describe(sample_id),
                error,
            )
