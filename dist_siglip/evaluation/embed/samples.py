"""What does sample i give the towers, or why does it give nothing?

Same bytes, caption and pixels as in an evaluation. But a bad sample gets no substitute: an
embedding belongs to its own sample or is not there. And a shard that is out of reach for the moment
is not a shard of bad samples.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_siglip.data.index.pairs import PairTable, Span
from dist_siglip.data.samples.bad_samples import BadSampleError, TruncatedCount
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.identity import EmptyCaptions, Tokenizer, caption_ids_of, picture_id
from dist_siglip.data.samples.loader import prepare_worker
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import ImageTransform
from dist_siglip.errors import OutageError, UserError


class EmbeddingSample(NamedTuple):
    """One sample as the towers want it.

    Attributes:
        sample_id: in the table.
        image: (3, H, W) uint8; None if no image is wanted.
        caption: stripped text.
        problem: why the sample cannot be used; empty if it can.
        lost: why its shard is out of reach; empty if it is not.
        picture_id: of the picture; 0 if ids are not wanted.
        is_outage: whether it may be in reach again later.
    """

    sample_id: int
    image: Tensor | None = None
    caption: str = ""
    problem: str = ""
    lost: str = ""
    picture_id: int = 0
    is_outage: bool = False


class EmbeddingBatch(NamedTuple):
    """Samples of one shard that can be used, and those that cannot.

    Attributes:
        sample_ids: of the B rows, ascending.
        images: (B, 3, H, W) uint8; None if no image is wanted or B is 0.
        texts: (B, L) int64 token ids; None if no text is wanted or B is 0.
        captions: of the B rows.
        problems: by sample id, why it is not among the rows.
        lost: why the shard is out of reach; empty if it is not.
        picture_ids: of the B rows.
        caption_ids: (B,) int64; None where ``texts`` is.
        is_outage: whether it may be in reach again later.
    """

    sample_ids: list[int]
    images: Tensor | None
    texts: Tensor | None
    captions: list[str]
    problems: dict[int, str]
    lost: str = ""
    picture_ids: Sequence[int] = ()
    caption_ids: Tensor | None = None
    is_outage: bool = False


class EmbeddingDataset(Dataset[EmbeddingSample]):
    """Map-style data set, indexed by sample id.

    Args:
        table: where the members are.
        transform: picture to (3, H, W) uint8; None decodes no picture.
        captions: which caption a sample has; of several the first.
        pictures: what decides the pixels of an encoded picture.
        tokenizer: of the model; a caption without a token is empty.
        with_ids: identify pictures by their bytes.
    """

    def __init__(
        self,
        table: PairTable,
        transform: ImageTransform | None,
        *,
        captions: CaptionRule,
        pictures: PicturePolicy,
        tokenizer: Tokenizer | None = None,
        with_ids: bool = False,
    ) -> None:
        self._table = table
        self._transform = transform
        self._captions = captions.always_first()
        self._pictures = pictures
        self._truncated = TruncatedCount(table.describe)
        self._is_empty = EmptyCaptions(tokenizer)
        self._with_ids = with_ids
        self._reader = ShardReader(table.cache)

    def __len__(self) -> int:
        return self._table.num_samples

    def __getitem__(self, sample_id: int) -> EmbeddingSample:
        """Read a sample; one that cannot be used says why."""
        try:
            image, caption, picture = self._make(sample_id)
        except BadSampleError as error:
            return EmbeddingSample(sample_id, problem=str(error))
        except (_LostError, UserError, OutageError) as error:
            is_outage = isinstance(error, OutageError)
            return EmbeddingSample(sample_id, lost=str(error), is_outage=is_outage)
        return EmbeddingSample(sample_id, image, caption, picture_id=picture)

    def _make(self, sample_id: int) -> tuple[Tensor | None, str, int]:
        """Return pixels, caption and the id of the picture."""
        spans = self._table.caption_spans(sample_id)
        members = ((kind, self._read(span)) for kind, span in spans)
        caption = self._captions.choose(members, (), is_empty=self._is_empty)
        if self._transform is None:
            return None, caption, 0
        data = self._read(self._table.image_span(sample_id))
        picture = EncodedPicture(data, self._pictures)
        image = self._transform(picture)
        if picture.is_truncated:
            self._truncated.note(sample_id)
        return image, caption, picture_id(data) if self._with_ids else 0

    def _read(self, span: Span) -> bytes:
        try:
            return self._reader.read(span)
        except BadSampleError as error:
            if error.__cause__ is None:  # the span itself is bad
                raise
            raise _LostError(str(error)) from error


class _LostError(Exception):
    """A shard cannot be read or fetched."""


class EmbeddingCollator:
    """Stack the samples that can be used, and list the others.

    Args:
        tokenizer: list of B strings to (B, L) token ids; None makes no tokens.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor] | None) -> None:
        self._tokenizer = tokenizer

    def __call__(self, samples: Sequence[EmbeddingSample]) -> EmbeddingBatch:
        """Collate samples in their order."""
        sound = [sample for sample in samples if not sample.problem and not sample.lost]
        images = [sample.image for sample in sound if sample.image is not None]
        captions = [sample.caption for sample in sound]
        texts = self._tokenizer(captions).long() if self._tokenizer and captions else None
        return EmbeddingBatch(
            sample_ids=[sample.sample_id for sample in sound],
            images=torch.stack(images) if images else None,
            texts=texts,
            captions=captions,
            problems={sample.sample_id: sample.problem for sample in samples if sample.problem},
            lost=next((sample.lost for sample in samples if sample.lost), ""),
            picture_ids=[sample.picture_id for sample in sound],
            caption_ids=None if texts is None else caption_ids_of(self._tokenizer, captions, texts),
            is_outage=any(sample.is_outage for sample in samples),
        )


def embedding_loader(
    dataset: EmbeddingDataset,
    batches: Iterable[list[int]],
    tokenizer: Callable[[list[str]], Tensor] | None,
    *,
    workers: int,
    pin_memory: bool,
) -> DataLoader[EmbeddingSample]:
    """Build a loader of ``EmbeddingBatch``.

    Args:
        dataset: samples by id.
        batches: sample ids of every batch, in order; gone through once.
        tokenizer: as ``EmbeddingCollator``.
        workers: loader processes; 0 loads in this process.
        pin_memory: whether batches are copied to page-locked memory, for a GPU.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=EmbeddingCollator(tokenizer),
        num_workers=workers,
        worker_init_fn=prepare_worker,
        pin_memory=pin_memory,
    )
