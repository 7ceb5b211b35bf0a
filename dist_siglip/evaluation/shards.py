"""Features of the samples of shards, each rank encoding its share.

Every sample counts once, and a bad one not at all.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader

from dist_siglip.data.index.damage import MAX_BAD_FRACTION
from dist_siglip.data.index.pairs import PairTable, build_pair_table, check_ranks_agree
from dist_siglip.data.order.position import EvaluationBatchSampler
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import (
    EXTENSIONS_OF,
    MAX_IMAGE_PIXELS,
    PICTURE_EXTENSIONS,
    with_formats,
)
from dist_siglip.data.samples.transforms import Preprocessing, evaluation_transform
from dist_siglip.data.urls import expand_shards
from dist_siglip.distributed import sum_over_ranks
from dist_siglip.errors import UserError, check_least
from dist_siglip.evaluation.benchmark import EvaluatedModel
from dist_siglip.evaluation.encoding import EncodedBatches, rank_and_size
from dist_siglip.evaluation.samples import ShardCollator, ShardDataset, ShardSample, shard_loader

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
    image_extensions: tuple[str, ...] = PICTURE_EXTENSIONS
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_bad_fraction: float = MAX_BAD_FRACTION
    cache: CacheSettings = field(default_factory=CacheSettings)
    picture_field: str | None = None

    def check(self) -> None:
        """Refuse numbers out of range."""
        check_least(1, of="loading.", local_batch_size=self.local_batch_size)
        check_least(0, of="loading.", workers_per_rank=self.workers_per_rank)
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
        self.name = name
        self._table: PairTable | None = None

    @property
    def table(self) -> PairTable:
        """Where the members are; the shards are indexed once.

        Raises:
            UserError: if shards are missing or damaged, or a sample lacks picture or text.
        """
        if self._table is None:
            setting = f"shards of benchmark {self.name!r}"
            self._table = build_pair_table(
                expand_shards(self._shards, name=setting),
                # Which formats are decoded the model says, later.
                image_extensions=with_formats(self._loading.image_extensions, EXTENSIONS_OF),
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
            table, name=f"shards of benchmark {self.name!r}", device=model.device, group=group
        )
        encoded = EncodedBatches(model)
        batches = self._loader(model.inputs, encoded_texts, rank, world_size)
        last_line = time.monotonic()
        for number, batch in enumerate(batches, start=1):
            encoded.add(batch)
            if rank == 0 and time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                _LOGGER.info("benchmark %s: batch %d of %d", self.name, number, len(batches))
                last_line = time.monotonic()
        self._log_bad(encoded.problems)
        own_bad = torch.tensor(len(encoded.problems), device=model.device)
        num_bad = int(sum_over_ranks(own_bad, group))
        if num_bad > self._loading.max_bad_fraction * table.num_samples:
            raise UserError(
                f"loading.max_bad_fraction ({self._loading.max_bad_fraction}) of benchmark "
                f"{self.name!r} is exceeded: {num_bad} of {table.num_samples} samples cannot be "
                "used, see the log; repair the shards, or raise it"
            )
        return _result(encoded, num_bad)

    def _loader(
        self, inputs: Preprocessing, encoded_texts: int | None, rank: int, world_size: int
    ) -> DataLoader[ShardSample]:
        loading, transform = self._loading, evaluation_transform(inputs)
        tokenizer = None if encoded_texts == 0 else inputs.tokenizer
        dataset = ShardDataset(
            self.table,
            transform,
            captions=self._captions,
            pictures=inputs.pictures.changed(max_image_pixels=loading.max_image_pixels),
            tokenizer=tokenizer,
            picture_field=loading.picture_field,
        )
        sampler = EvaluationBatchSampler(
            self.table.num_samples,
            rank=rank,
            world_size=world_size,
            local_batch_size=loading.local_batch_size,
        )
        collator = ShardCollator(
            tokenizer,
            most_texts=encoded_texts or None,
            placeholder=transform(Image.new("RGB", (16, 16), (128, 128, 128))),
        )
        return shard_loader(dataset, sampler, collator, workers=loading.workers_per_rank)

    def _log_bad(self, bad: Mapping[int, str]) -> None:
        for sample_id, problem in islice(bad.items(), _NAMED):
            named = self.table.describe(sample_id)
            _LOGGER.warning("benchmark %s leaves out %s: %s", self.name, named, problem)


def _result(encoded: EncodedBatches, num_bad: int) -> EncodedShards:
    images = torch.cat(encoded.image_parts)
    owners: list[int] = []
    if encoded.text_parts:
        pairs = zip(encoded.sample_ids, encoded.texts, strict=True)
        owners = [sample_id for sample_id, texts in pairs for _ in texts]

    def as_ids(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=images.device)

    return EncodedShards(
        sample_ids=as_ids(encoded.sample_ids),
        image_features=images,
        texts=encoded.texts,
        text_features=torch.cat([images[:0], *encoded.text_parts]),
        text_sample_ids=as_ids(owners),
        num_bad=num_bad,
        picture_ids=as_ids(encoded.picture_ids),
        caption_ids=as_ids(encoded.caption_ids),
    )
