"""What does sample i give the towers, or why does it give nothing?

Same bytes, caption and pixels as in an evaluation. But a bad sample gets no substitute: an
embedding belongs to its own sample or is not there.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_siglip.data.captions import CaptionRule
from dist_siglip.data.faults import BadSampleError
from dist_siglip.data.fetch import ShardReader
from dist_siglip.data.loader import prepare_worker
from dist_siglip.data.pairs import PairTable
from dist_siglip.data.picture import EncodedPicture
from dist_siglip.data.transforms import ImageTransform


class EmbeddingSample(NamedTuple):
    """One sample as the towers want it.

    Attributes:
        sample_id: in the table.
        image: (3, H, W) uint8; None if no image is wanted.
        caption: stripped text.
        problem: why the sample cannot be used; empty if it can.
    """

    sample_id: int
    image: Tensor | None = None
    caption: str = ""
    problem: str = ""


class EmbeddingBatch(NamedTuple):
    """Samples of one shard that can be used, and those that cannot.

    Attributes:
        sample_ids: of the B rows, ascending.
        images: (B, 3, H, W) uint8; None if no image is wanted or B is 0.
        texts: (B, L) int64 token ids; None if no text is wanted or B is 0.
        captions: of the B rows.
        problems: by sample id, why it is not among the rows.
    """

    sample_ids: list[int]
    images: Tensor | None
    texts: Tensor | None
    captions: list[str]
    problems: dict[int, str]


class EmbeddingDataset(Dataset[EmbeddingSample]):
    """Map-style data set, indexed by sample id.

    Args:
        table: where the members are.
        transform: picture to (3, H, W) uint8; None decodes no picture.
        captions: which caption a sample has; of several the first.
        max_image_pixels: pictures with more cannot be used.
    """

    def __init__(
        self,
        table: PairTable,
        transform: ImageTransform | None,
        *,
        captions: CaptionRule,
        max_image_pixels: int,
    ) -> None:
        self._table = table
        self._transform = transform
        self._captions = captions.always_first()
        self._max_image_pixels = max_image_pixels
        self._reader = ShardReader(table.cache)

    def __len__(self) -> int:
        return self._table.num_samples

    def __getitem__(self, sample_id: int) -> EmbeddingSample:
        """Read a sample; one that cannot be used says why."""
        spans = self._table.caption_spans(sample_id)
        try:
            members = ((kind, self._reader.read(span)) for kind, span in spans)
            caption = self._captions.choose(members, ())
            if self._transform is None:
                return EmbeddingSample(sample_id, caption=caption)
            data = self._reader.read(self._table.image_span(sample_id))
            picture = EncodedPicture(data, max_pixels=self._max_image_pixels)
            return EmbeddingSample(sample_id, self._transform(picture), caption)
        except BadSampleError as error:
            return EmbeddingSample(sample_id, problem=str(error))


class EmbeddingCollator:
    """Stack the samples that can be used, and list the others.

    Args:
        tokenizer: list of B strings to (B, L) token ids; None makes no tokens.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor] | None) -> None:
        self._tokenizer = tokenizer

    def __call__(self, samples: Sequence[EmbeddingSample]) -> EmbeddingBatch:
        """Collate samples in their order."""
        sound = [sample for sample in samples if not sample.problem]
        images = [sample.image for sample in sound if sample.image is not None]
        captions = [sample.caption for sample in sound]
        has_texts = self._tokenizer is not None and len(sound) > 0
        return EmbeddingBatch(
            sample_ids=[sample.sample_id for sample in sound],
            images=torch.stack(images) if images else None,
            texts=self._tokenizer(captions).long() if self._tokenizer and has_texts else None,
            captions=captions,
            problems={sample.sample_id: sample.problem for sample in samples if sample.problem},
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
        batches: sample ids of every batch, in order.
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
