"""What does sample i give a benchmark, or why does it give nothing?

Read, decoded, stacked and tokenized in the loader processes; what arrives is ready for the
encoders, even where no sample of a batch can be used.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.order.sequence import Slot
from dist_siglip.data.samples.bad_samples import BadSampleError, TruncatedCount
from dist_siglip.data.samples.captions import CaptionRule, named_picture_id
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.identity import EmptyCaptions, caption_ids_of, picture_id
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.transforms import ModelInputs, evaluation_transform


class BenchmarkSample(NamedTuple):
    """One sample as a benchmark wants it.

    Attributes:
        sample_id: in the table.
        is_padding: whether it only fills up the batches of a rank.
        image: (3, H, W) uint8; None if the sample cannot be used.
        texts: all that it has.
        problem: why it cannot be used; empty if it can.
        picture_id: equal for equal pictures.
    """

    sample_id: int
    is_padding: bool
    image: Tensor | None = None
    texts: tuple[str, ...] = ()
    problem: str = ""
    picture_id: int = 0


class BenchmarkBatch(NamedTuple):
    """The B usable samples of a batch, with at least one row for each encoder.

    Attributes:
        sample_ids: of the B samples.
        texts: of the B samples, those wanted.
        images: (max(B, 1), 3, H, W) uint8; a grey picture where B is 0.
        tokens: (max(T, 1), L) of the T texts in a row; None if no text is encoded.
        bad: by sample id, why it is not among them.
        picture_ids: of the B samples.
        caption_ids: of the T texts that are encoded.
    """

    sample_ids: list[int]
    texts: list[list[str]]
    images: Tensor
    tokens: Tensor | None
    bad: dict[int, str]
    picture_ids: list[int]
    caption_ids: list[int]


class BenchmarkSamples(Dataset[BenchmarkSample]):
    """Map-style data set, indexed by ``Slot``.

    Args:
        table: where the members are.
        inputs: what the model wants to be fed.
        captions: where the texts of a sample are.
        max_image_pixels: pictures with more cannot be used.
        encodes_texts: whether texts without a token are left out.
        picture_field: of the .json, that says which pictures are the same; None goes by bytes.
    """

    def __init__(
        self,
        table: PairTable,
        inputs: ModelInputs,
        captions: CaptionRule,
        *,
        max_image_pixels: int,
        encodes_texts: bool = True,
        picture_field: str | None = None,
    ) -> None:
        self._table = table
        self._transform = evaluation_transform(inputs)
        self._captions = captions
        self._pictures = inputs.pictures.changed(max_image_pixels=max_image_pixels)
        self._truncated = TruncatedCount(table.describe)
        self._is_empty = EmptyCaptions(inputs.tokenizer if encodes_texts else None)
        self._caption_members = {name.lower().lstrip(".") for name in captions.members}
        self._picture_field = picture_field
        self._reader = ShardReader(table.cache)

    def __len__(self) -> int:
        return self._table.num_samples

    def __getitem__(self, slot: Slot) -> BenchmarkSample:
        """Read a sample; one that cannot be used says why."""
        table, sample_id = self._table, slot.sample_id
        try:
            members = (
                (kind, self._reader.read(at))
                for kind, at in table.caption_spans(sample_id)
                if kind in self._caption_members
            )
            texts = tuple(self._captions.all_of(members, is_empty=self._is_empty))
            data = self._reader.read(table.image_span(sample_id))
            picture = EncodedPicture(data, self._pictures)
            image = self._transform(picture)
            identity = self._identify(sample_id, data)
        except BadSampleError as error:
            return BenchmarkSample(sample_id, slot.is_padding, problem=str(error))
        if picture.is_truncated:
            self._truncated.note(sample_id)
        return BenchmarkSample(sample_id, slot.is_padding, image, texts, picture_id=identity)

    def _identify(self, sample_id: int, data: bytes) -> int:
        """Identify a picture by what its JSON says, else by its bytes."""
        found = None
        if self._picture_field is not None:
            span = self._table.member_span(sample_id, "json")
            if span is not None:
                found = named_picture_id(self._reader.read(span), self._picture_field)
        return picture_id(data) if found is None else found


class BenchmarkCollator:
    """Stack the samples that can be used, tokenize their texts, and list the others.

    Args:
        inputs: what the model wants to be fed.
        encoded_texts: so many texts of each sample are encoded, at most: 0 keeps all and encodes
            none, None encodes all.
    """

    def __init__(self, inputs: ModelInputs, encoded_texts: int | None) -> None:
        size = inputs.image_size
        self._size = (size, size) if isinstance(size, int) else size
        self._tokenizer: Callable[[list[str]], Tensor] | None = inputs.tokenizer
        if encoded_texts == 0:
            self._tokenizer, encoded_texts = None, None
        self._wanted = slice(encoded_texts)

    def __call__(self, samples: Sequence[BenchmarkSample]) -> BenchmarkBatch:
        """Collate samples in their order; padding is left out."""
        due = [sample for sample in samples if not sample.is_padding]
        usable = [sample for sample in due if sample.image is not None]
        texts = [list(sample.texts[self._wanted]) for sample in usable]
        tokens, caption_ids = None, torch.empty(0)
        if self._tokenizer is not None:
            wanted = [text for own in texts for text in own]
            tokens = self._tokenizer(wanted or [""]).long()
            caption_ids = caption_ids_of(self._tokenizer, wanted, tokens[: len(wanted)])
        images = [sample.image for sample in usable if sample.image is not None]
        return BenchmarkBatch(
            sample_ids=[sample.sample_id for sample in usable],
            texts=texts,
            images=torch.stack(images or [torch.full((3, *self._size), 128, dtype=torch.uint8)]),
            tokens=tokens,
            bad={sample.sample_id: sample.problem for sample in due if sample.image is None},
            picture_ids=[sample.picture_id for sample in usable],
            caption_ids=caption_ids.tolist(),
        )
