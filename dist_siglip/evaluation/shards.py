"""How do the samples of shards become features, each rank encoding its share?

Same bytes and pixels as in an evaluation. Every sample counts once, and a bad one not at all: it is
counted and named, and nothing stands in for it.

What does sample i give a benchmark, or why does it give nothing?

Read, decoded, stacked and tokenized in the loader processes; what arrives is ready for the
encoders, even where no sample of a batch can be used.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader, Dataset

from dist_siglip.data.index.agreement import check_ranks_agree
from dist_siglip.data.index.pairs import PairTable, build_pair_table
from dist_siglip.data.order.position import EvaluationBatchSampler
from dist_siglip.data.order.sequence import Slot
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.samples.bad_samples import BadSampleError, TruncatedCount
from dist_siglip.data.samples.captions import CaptionRule, named_picture_id
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.identity import EmptyCaptions, caption_ids_of, picture_id
from dist_siglip.data.samples.loader import prepare_worker
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.transforms import ModelInputs, evaluation_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import EvaluatedModel
from dist_siglip.evaluation.encoding import rank_and_size


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


_LOGGER = logging.getLogger(__name__)
_NAMED = 5  # bad samples of each rank, in the log
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How the shards of a benchmark are read.

    Args:
        local_batch_size: pictures that a rank encodes together.
        workers_per_rank: loader processes of each rank; 0 loads in its own.
        image_extensions: members that are the picture of a sample, in order of preference.
        max_image_pixels: pictures with more count as bad samples.
        max_bad_fraction: share of the samples that may be bad; they are left out.
        cache: copies of remote shards on each node.
        picture_field: field of the .json member that says which pictures are the same, as
            ``data.picture_id`` of a run may name it. Null: those of equal bytes.
    """

    local_batch_size: int = 256
    workers_per_rank: int = 2
    image_extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    max_image_pixels: int = 64_000_000
    max_bad_fraction: float = 0.01
    cache: CacheSettings = field(default_factory=CacheSettings)
    picture_field: str | None = None

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UserError: naming the setting.
        """
        for name, least in (("local_batch_size", 1), ("workers_per_rank", 0)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"loading.{name} ({value}) must be at least {least}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"loading.max_bad_fraction ({self.max_bad_fraction}) must be in [0, 1]")
        self.cache.check()


class EncodedShards(NamedTuple):
    """Features of the usable samples of this rank, on the device of the model.

    Attributes:
        sample_ids: (B,) int64, each once over all ranks.
        image_features: (B, D) float32 rows of length 1.
        texts: those wanted of each of the B samples.
        text_features: (T, D) of all wanted texts, sample after sample.
        text_sample_ids: (T,) int64, whose text it is.
        num_bad: samples of all ranks that cannot be used.
        picture_ids: (B,) int64, equal for equal pictures.
        caption_ids: (T,) int64, equal for texts of equal tokens.
    """

    sample_ids: Tensor
    image_features: Tensor
    texts: list[list[str]]
    text_features: Tensor
    text_sample_ids: Tensor
    num_bad: int
    picture_ids: Tensor
    caption_ids: Tensor


class BenchmarkShards:
    """Samples of pictures and texts in webdataset shards.

    Args:
        shards: file, folder, pattern, list file or URL, or a list of these.
        captions: where the texts of a sample are.
        loading: how they are read.
        name: of the benchmark, for error texts and the log.
    """

    def __init__(
        self,
        shards: str | list[str],
        captions: CaptionRule,
        loading: LoadSettings,
        *,
        name: str,
    ) -> None:
        self._shards = shards
        self._captions = captions
        self._loading = loading
        self._name = name
        self._table: PairTable | None = None

    @property
    def table(self) -> PairTable:
        """Where the members are; the shards are indexed once.

        Raises:
            UserError: if shards are missing or damaged, or a sample lacks picture or text.
        """
        if self._table is None:
            setting = f"shards of benchmark {self._name!r}"
            self._table = build_pair_table(
                expand_shards(self._shards, name=setting),
                image_extensions=self._loading.image_extensions,
                caption_extensions=self._captions.members,
                other_extensions=() if self._loading.picture_field is None else ("json",),
                cache=ShardCache(self._loading.cache),
                name=setting,
            )
        return self._table

    def check(self) -> None:
        """Find what is wrong with settings and shards.

        Raises:
            UserError: see ``table``; or a setting is out of range.
        """
        self._loading.check()
        self._captions.check()
        _ = self.table

    def encode(
        self,
        model: EvaluatedModel,
        *,
        encoded_texts: int | None,
        group: ProcessGroup | None = None,
    ) -> EncodedShards:
        """Encode this rank's share of the samples.

        Distributed contract: every rank calls it and the encoders equally often; one all-gather
        and one all-reduce of a few bytes.

        Args:
            model: what encodes.
            encoded_texts: so many texts of each sample are encoded, at most: 0 keeps all and
                encodes none, None encodes all.
            group: process group.

        Raises:
            UserError: on every rank, if ranks see different shards or too many samples are bad.
        """
        table, (rank, world_size) = self.table, rank_and_size(group)
        check_ranks_agree(
            table, name=f"shards of benchmark {self._name!r}", device=model.device, group=group
        )
        collected = _Collected(model)
        batches = self._loader(model.inputs, encoded_texts, rank, world_size)
        spoken = time.monotonic()
        for number, batch in enumerate(batches, start=1):
            collected.add(batch)
            if rank == 0 and time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
                _LOGGER.info("benchmark %s: batch %d of %d", self._name, number, len(batches))
                spoken = time.monotonic()
        self._name_bad(collected.bad)
        own_bad = torch.tensor(len(collected.bad), device=model.device)
        num_bad = int(sum_over_ranks(own_bad, group))
        if num_bad > self._loading.max_bad_fraction * table.num_samples:
            raise UserError(
                f"loading.max_bad_fraction ({self._loading.max_bad_fraction}) of benchmark "
                f"{self._name!r} is exceeded: {num_bad} of {table.num_samples} samples cannot be "
                "used, see the log; repair the shards, or raise it"
            )
        return collected.result(num_bad)

    def _loader(
        self, inputs: ModelInputs, encoded_texts: int | None, rank: int, world_size: int
    ) -> DataLoader[BenchmarkSample]:
        loading = self._loading
        return DataLoader(
            BenchmarkSamples(
                self.table,
                inputs,
                self._captions,
                max_image_pixels=loading.max_image_pixels,
                encodes_texts=encoded_texts != 0,
                picture_field=loading.picture_field,
            ),
            batch_sampler=EvaluationBatchSampler(
                self.table.num_samples,
                rank=rank,
                world_size=world_size,
                local_batch_size=loading.local_batch_size,
            ),
            collate_fn=BenchmarkCollator(inputs, encoded_texts),
            num_workers=loading.workers_per_rank,
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # a loader without one draws from the training's
        )

    def _name_bad(self, bad: Mapping[int, str]) -> None:
        for sample_id, problem in islice(bad.items(), _NAMED):
            named = self.table.describe(sample_id)
            _LOGGER.warning("benchmark %s leaves out %s: %s", self._name, named, problem)


class _Collected:
    """What a rank has encoded so far."""

    def __init__(self, model: EvaluatedModel) -> None:
        self.bad: dict[int, str] = {}
        self._model = model
        self._sample_ids: list[int] = []
        self._texts: list[list[str]] = []
        self._picture_ids: list[int] = []
        self._caption_ids: list[int] = []
        self._image_features: list[Tensor] = []
        self._text_features: list[Tensor] = []

    def add(self, batch: BenchmarkBatch) -> None:
        """Encode a batch, in one call of each encoder that is needed, whatever is in it."""
        count, num_texts = len(batch.sample_ids), sum(map(len, batch.texts))
        self.bad |= batch.bad
        self._sample_ids += batch.sample_ids
        self._texts += batch.texts
        self._picture_ids += batch.picture_ids
        self._caption_ids += batch.caption_ids
        self._image_features.append(self._model.encode_image(batch.images)[:count])
        if batch.tokens is not None:
            self._text_features.append(self._model.encode_text(batch.tokens)[:num_texts])

    def result(self, num_bad: int) -> EncodedShards:
        """Join the batches."""
        images = torch.cat(self._image_features)
        owners: list[int] = []
        if self._text_features:
            pairs = zip(self._sample_ids, self._texts, strict=True)
            owners = [sample_id for sample_id, texts in pairs for _ in texts]

        def as_ids(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=images.device)

        return EncodedShards(
            sample_ids=as_ids(self._sample_ids),
            image_features=images,
            texts=self._texts,
            text_features=torch.cat([images[:0], *self._text_features]),
            text_sample_ids=as_ids(owners),
            num_bad=num_bad,
            picture_ids=as_ids(self._picture_ids),
            caption_ids=as_ids(self._caption_ids),
        )
