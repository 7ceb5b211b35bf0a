"""How do the samples of shards become features, each rank encoding its share?

Same bytes and pixels as in an evaluation. Every sample counts once, and a bad one not at all: it is
counted and named, and nothing stands in for it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader, Dataset

from dist_siglip.benchmarks.benchmark import EvaluatedModel
from dist_siglip.benchmarks.encoding import rank_and_size
from dist_siglip.data.agreement import check_ranks_agree
from dist_siglip.data.captions import CaptionRule
from dist_siglip.data.faults import BadSampleError
from dist_siglip.data.fetch import ShardReader
from dist_siglip.data.inputs import ModelInputs
from dist_siglip.data.loader import prepare_worker
from dist_siglip.data.pairs import PairTable, build_pair_table
from dist_siglip.data.picture import EncodedPicture
from dist_siglip.data.position import EvaluationBatchSampler
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.slot import Slot
from dist_siglip.data.transforms import evaluation_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError

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
    """

    local_batch_size: int = 256
    workers_per_rank: int = 2
    image_extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    max_image_pixels: int = 64_000_000
    max_bad_fraction: float = 0.01
    cache: CacheSettings = field(default_factory=CacheSettings)

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
    """

    sample_ids: Tensor
    image_features: Tensor
    texts: list[list[str]]
    text_features: Tensor
    text_sample_ids: Tensor
    num_bad: int


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
            encoded_texts: so many texts of each sample are encoded, at most; None encodes all.
            group: process group.

        Raises:
            UserError: on every rank, if ranks see different shards or too many samples are bad.
        """
        table, rank_and_world = self.table, rank_and_size(group)
        check_ranks_agree(
            table, name=f"shards of benchmark {self._name!r}", device=model.device, group=group
        )
        collected = _Collected(model, encoded_texts)
        batches = self._loader(model.inputs, *rank_and_world)
        spoken = time.monotonic()
        for number, batch in enumerate(batches, start=1):
            collected.add(batch)
            if rank_and_world[0] == 0 and time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
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
        self, inputs: ModelInputs, rank: int, world_size: int
    ) -> "DataLoader[BenchmarkSample]":
        sampler = EvaluationBatchSampler(
            self.table.num_samples,
            rank=rank,
            world_size=world_size,
            local_batch_size=self._loading.local_batch_size,
        )
        return DataLoader(
            _Samples(self.table, inputs, self._captions, self._loading.max_image_pixels),
            batch_sampler=sampler,
            collate_fn=list,
            num_workers=self._loading.workers_per_rank,
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # a loader without one draws from the training's
        )

    def _name_bad(self, bad: "Sequence[BenchmarkSample]") -> None:
        for sample in bad[:_NAMED]:
            _LOGGER.warning(
                "benchmark %s leaves out %s: %s",
                self._name,
                self.table.describe(sample.sample_id),
                sample.problem,
            )


class BenchmarkSample(NamedTuple):
    """One sample as a benchmark wants it.

    Attributes:
        sample_id: in the table.
        is_padding: whether it only fills up the batches of a rank.
        image: (3, H, W) uint8; None if the sample cannot be used.
        texts: all that it has.
        problem: why it cannot be used; empty if it can.
    """

    sample_id: int
    is_padding: bool
    image: Tensor | None = None
    texts: tuple[str, ...] = ()
    problem: str = ""


class _Samples(Dataset[BenchmarkSample]):
    """Map-style data set, indexed by ``Slot``."""

    def __init__(
        self, table: PairTable, inputs: ModelInputs, captions: CaptionRule, max_image_pixels: int
    ) -> None:
        self._table = table
        self._transform = evaluation_transform(inputs)
        self._captions = captions
        self._max_image_pixels = max_image_pixels
        self._reader = ShardReader(table.cache)

    def __getitem__(self, slot: Slot) -> BenchmarkSample:
        """Read a sample; one that cannot be used says why."""
        table, sample_id = self._table, slot.sample_id
        try:
            members = ((kind, self._reader.read(at)) for kind, at in table.caption_spans(sample_id))
            texts = tuple(self._captions.all_of(members))
            data = self._reader.read(table.image_span(sample_id))
            image = self._transform(EncodedPicture(data, max_pixels=self._max_image_pixels))
        except BadSampleError as error:
            return BenchmarkSample(sample_id, slot.is_padding, problem=str(error))
        return BenchmarkSample(sample_id, slot.is_padding, image, texts)


class _Collected:
    """What a rank has encoded so far."""

    def __init__(self, model: EvaluatedModel, encoded_texts: int | None) -> None:
        self.bad: list[BenchmarkSample] = []
        self._model = model
        self._encoded_texts = encoded_texts
        self._sample_ids: list[int] = []
        self._texts: list[list[str]] = []
        self._images: list[Tensor] = []
        self._text_features: list[Tensor] = []

    def add(self, batch: Sequence[BenchmarkSample]) -> None:
        """Encode a batch, in one call of each encoder that is needed, whatever is in it."""
        due = [sample for sample in batch if not sample.is_padding]
        self.bad += [sample for sample in due if sample.image is None]
        usable = [sample for sample in due if sample.image is not None]
        wanted = [list(sample.texts)[: self._encoded_texts] for sample in usable]
        self._sample_ids += [sample.sample_id for sample in usable]
        self._texts += wanted if self._encoded_texts != 0 else [list(s.texts) for s in usable]
        pixels = [sample.image for sample in usable if sample.image is not None]
        self._images.append(_encode(self._model.encode_image, pixels, _grey(self._model.inputs)))
        if self._encoded_texts != 0:
            tokens = self._model.tokenizer([text for texts in wanted for text in texts] or [""])
            none = tokens[:1].long()
            rows = list(tokens.long()) if usable else []
            self._text_features.append(_encode(self._model.encode_text, rows, none[0]))

    def result(self, num_bad: int) -> EncodedShards:
        """Join the batches."""
        images = torch.cat(self._images)
        has_texts = bool(self._text_features)
        owners = [
            sample_id
            for sample_id, texts in zip(self._sample_ids, self._texts, strict=True)
            for _ in texts
        ]
        ids = torch.tensor(self._sample_ids, dtype=torch.int64, device=images.device)
        return EncodedShards(
            sample_ids=ids,
            image_features=images,
            texts=self._texts,
            text_features=torch.cat(self._text_features) if has_texts else images[:0],
            text_sample_ids=torch.tensor(
                owners if has_texts else [], dtype=torch.int64, device=images.device
            ),
            num_bad=num_bad,
        )


def _encode(encoder: Callable[[Tensor], Tensor], rows: list[Tensor], stand_in: Tensor) -> Tensor:
    """Encode rows; where there are none, call the encoder all the same and keep nothing."""
    return encoder(torch.stack(rows or [stand_in]))[: len(rows)]


def _grey(inputs: ModelInputs) -> Tensor:
    """Make a picture of the size the model wants."""
    size = inputs.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.full((3, height, width), 128, dtype=torch.uint8)
