"""Samples of shards for evaluation: read, decoded, stacked and tokenized in the loader processes.

Bytes and pixels are those of an evaluation in training. A bad sample is counted and named, and
nothing stands in for it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_siglip.data.index.pairs import PairTable, Span
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.bad_samples import BadSampleError, TruncatedCount
from dist_siglip.data.samples.captions import CaptionRule, EmptyCaptions, Tokenizer
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.identity import caption_ids_of, named_picture_id, picture_id
from dist_siglip.data.samples.loader import prepare_worker
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import ImageTransform
from dist_siglip.errors import OutageError, UserError


class ShardSample(NamedTuple):
    """One sample of a shard.

    Attributes:
        sample_id: in the table.
        is_padding: whether it only fills up the batches of a rank.
        image: (3, H, W) uint8; None if no image is wanted, or the sample cannot be used.
        texts: all that it has, stripped.
        problem: why it cannot be used; empty if it can.
        lost: why its shard is out of reach; empty if it is not.
        is_outage: whether the shard may be in reach again later.
        picture_id: equal for equal pictures; 0 if ids are not wanted.
    """

    sample_id: int
    is_padding: bool = False
    image: Tensor | None = None
    texts: tuple[str, ...] = ()
    problem: str = ""
    lost: str = ""
    is_outage: bool = False
    picture_id: int = 0


class ShardBatch(NamedTuple):
    """The B usable samples of a batch, and those that cannot be used.

    Attributes:
        sample_ids: of the B samples.
        texts: of the B samples, those wanted.
        images: (B, 3, H, W) uint8, or a single placeholder where B is 0; None if no image is wanted
            or there is no placeholder.
        tokens: (T, L) int64 of the T wanted texts in a row, likewise.
        problems: by sample id, why it is not among the rows.
        picture_ids: of the B samples.
        caption_ids: of the T texts; empty if none is encoded.
        lost: why the shard is out of reach; empty if it is not.
        is_outage: whether it may be in reach again later.
    """

    sample_ids: list[int]
    texts: list[list[str]]
    images: Tensor | None
    tokens: Tensor | None
    problems: dict[int, str]
    picture_ids: Sequence[int] = ()
    caption_ids: Sequence[int] = ()
    lost: str = ""
    is_outage: bool = False


class ShardDataset(Dataset[ShardSample]):
    """Map-style data set, indexed by ``StreamPosition``.

    Args:
        table: where the members are.
        transform: picture to (3, H, W) uint8; None decodes no picture.
        captions: where the texts of a sample are.
        pictures: what decides the pixels of an encoded picture.
        tokenizer: of the model; a text without a token is left out. None goes by its characters.
        picture_field: of the .json, that says which pictures are the same; None goes by bytes.
        identifies_pictures: whether samples have a ``picture_id``.
        marks_lost: whether a shard that cannot be read or fetched is marked in its samples. If not,
            samples of an unreadable shard are bad ones, and what else goes wrong is raised.
    """

    def __init__(
        self,
        table: PairTable,
        transform: ImageTransform | None,
        *,
        captions: CaptionRule,
        pictures: PicturePolicy,
        tokenizer: Tokenizer | None = None,
        picture_field: str | None = None,
        identifies_pictures: bool = True,
        marks_lost: bool = False,
    ) -> None:
        self._table = table
        self._transform = transform
        self._captions = captions
        self._pictures = pictures
        self._truncated = TruncatedCount(table.describe)
        self._is_empty = EmptyCaptions(tokenizer)
        self._picture_field = picture_field
        self._identifies_pictures = identifies_pictures
        self._marks_lost = marks_lost
        self._caption_members = {name.lower().lstrip(".") for name in captions.members}
        fields = (*captions.json_fields, *([] if picture_field is None else [picture_field]))
        self._reader = ShardReader(table.cache, fields=fields)

    def __len__(self) -> int:
        return self._table.num_samples

    def __getitem__(self, at: StreamPosition) -> ShardSample:
        """Read a sample; one that cannot be used says why."""
        sample = ShardSample(at.sample_id, at.is_padding)
        try:
            return self._read(sample)
        except BadSampleError as error:
            return sample._replace(problem=str(error))
        except (_LostShardError, UserError, OutageError) as error:
            if not self._marks_lost:
                raise
            return sample._replace(lost=str(error), is_outage=isinstance(error, OutageError))

    def _read(self, sample: ShardSample) -> ShardSample:
        table, sample_id = self._table, sample.sample_id
        members = (
            (kind, self._bytes_of(span))
            for kind, span in table.caption_spans(sample_id)
            # The table may list a .json for the sake of ``picture_field`` alone.
            if self._picture_field is None or kind in self._caption_members
        )
        sample = sample._replace(
            texts=tuple(self._captions.all_of(members, is_empty=self._is_empty))
        )
        if self._transform is None:
            return sample
        data = self._bytes_of(table.image_span(sample_id))
        picture = EncodedPicture(data, self._pictures)
        image = self._transform(picture)
        identity = self._identify(sample_id, data) if self._identifies_pictures else 0
        if picture.is_truncated:
            self._truncated.note(sample_id)
        return sample._replace(image=image, picture_id=identity)

    def _identify(self, sample_id: int, data: bytes) -> int:
        """Identify a picture by what its JSON says, else by its bytes."""
        found = None
        if self._picture_field is not None:
            span = self._table.member_span(sample_id, "json")
            if span is not None:
                found = named_picture_id(self._bytes_of(span), self._picture_field)
        return picture_id(data) if found is None else found

    def _bytes_of(self, span: Span) -> bytes:
        try:
            return self._reader.read(span)
        except BadSampleError as error:
            if error.__cause__ is None or not self._marks_lost:  # without a cause the span is bad
                raise
            raise _LostShardError(str(error)) from error


class _LostShardError(Exception):
    """A shard cannot be read or fetched."""


class ShardCollator:
    """Stack the samples that can be used, tokenize their texts, and list the others.

    Args:
        tokenizer: list of strings to token ids; None encodes no text.
        most_texts: kept of each sample; None keeps all.
        placeholder: picture, as the transform makes them, that stands in a batch without rows, with
            an empty text, so that towers are called equally often on every rank; None leaves such a
            batch without tensors.
    """

    def __init__(
        self,
        tokenizer: Callable[[list[str]], Tensor] | None,
        *,
        most_texts: int | None,
        placeholder: Tensor | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._wanted = slice(most_texts)
        self._placeholder = placeholder

    def __call__(self, samples: Sequence[ShardSample]) -> ShardBatch:
        """Collate samples in their order; padding is left out."""
        due = [sample for sample in samples if not sample.is_padding]
        sound = [sample for sample in due if not sample.problem and not sample.lost]
        texts = [list(sample.texts[self._wanted]) for sample in sound]
        wanted = [text for own in texts for text in own]
        tokens, caption_ids = None, torch.empty(0)
        if self._tokenizer is not None and (wanted or self._placeholder is not None):
            tokens = self._tokenizer(wanted or [""]).long()
            caption_ids = caption_ids_of(self._tokenizer, wanted, tokens[: len(wanted)])
        images = [sample.image for sample in sound if sample.image is not None]
        if not images and self._placeholder is not None:
            images = [self._placeholder]
        return ShardBatch(
            sample_ids=[sample.sample_id for sample in sound],
            texts=texts,
            images=torch.stack(images) if images else None,
            tokens=tokens,
            problems={sample.sample_id: sample.problem for sample in due if sample.problem},
            picture_ids=[sample.picture_id for sample in sound],
            caption_ids=caption_ids.tolist(),
            lost=next((sample.lost for sample in due if sample.lost), ""),
            is_outage=any(sample.is_outage for sample in due),
        )


def shard_loader(
    dataset: ShardDataset,
    batches: Iterable[list[StreamPosition]],
    collator: ShardCollator,
    *,
    workers: int,
    pin_memory: bool = False,
) -> DataLoader[ShardSample]:
    """Build a loader of ``ShardBatch``.

    Args:
        dataset: samples by position.
        batches: slots of every batch, in order.
        collator: makes the batches.
        workers: loader processes; 0 loads in this process.
        pin_memory: whether batches are copied to page-locked memory, for a GPU.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=workers,
        worker_init_fn=prepare_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # a loader without one draws from the training's
    )
