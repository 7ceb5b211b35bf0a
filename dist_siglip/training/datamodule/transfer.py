"""Loading of batches, their transfer to the device, and prefetching of remote shards."""

import logging
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.order.position import EvaluationBatchSampler, GlobalBatchSampler
from dist_siglip.data.remote import ShardCache, is_remote
from dist_siglip.data.remote.cache import Prefetcher, describe_tight_cache
from dist_siglip.data.remote.locations import is_parquet
from dist_siglip.data.samples.bad_samples import BadSampleLimit
from dist_siglip.data.samples.batch import (
    BatchPieces,
    ImageNormalizer,
    ImageTextBatch,
    PairCollator,
    PairSample,
)
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.loader import build_loader
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import Preprocessing
from dist_siglip.distributed import World
from dist_siglip.training.datamodule.training_position import TrainingPosition

_LOGGER = logging.getLogger(__name__)


def start_prefetching(
    cache: ShardCache, position: TrainingPosition, running: Prefetcher | None
) -> Prefetcher | None:
    """Fetch the shards that training needs next, from where it stands.

    Args:
        cache: of the node; one process of a node fetches ahead for all.
        position: of the run.
        running: what was started before.

    Returns:
        The running prefetcher; None if every shard is local.
    """
    if running is not None:
        return running
    shards = position.table.shards
    if not any(is_remote(shard) for shard in shards):
        return None
    plan = position.plan
    tight = ""
    if plan is not None:
        tight = describe_tight_cache(cache, _remote_bytes(position.table), plan.block_shards)
    if tight:
        _LOGGER.warning("%s", tight)
    _LOGGER.info("remote shards: %s", cache.describe())
    prefetcher = Prefetcher(cache, position.upcoming_shards)
    prefetcher.start()
    return prefetcher


def _remote_bytes(table: PairTable) -> list[int]:
    """Say where the last picture of each remote shard ends, or what its rows take: nearly its size.

    Of a Parquet file columns that are not read are left out.
    """
    ends = np.append(table.image_offsets + table.image_sizes, 0)
    found = []
    for number, shard in enumerate(table.shards):
        first, stop = int(table.starts[number]), int(table.starts[number + 1])
        if is_remote(shard) and is_parquet(shard):
            sizes = table.image_sizes[first:stop].sum() + table.caption_sizes[:, first:stop].sum()
            found.append(int(sizes))
        elif is_remote(shard) and stop > first:
            found.append(int(ends[first:stop].max()))
    return found


class BatchTransfer(LightningDataModule):
    """Loaders of this rank, and the hooks of Lightning around the transfer of a batch."""

    inputs: Preprocessing | None
    bad_samples: BadSampleLimit
    workers_per_rank: int
    prefetch_factor: int
    _picture_settings: dict[str, Any]

    def on_before_batch_transfer(
        self, batch: ImageTextBatch | BatchPieces, dataloader_idx: int
    ) -> ImageTextBatch | BatchPieces:
        """Count substitutes while the batch is still on the CPU."""
        if self.trainer is not None and self.trainer.training:
            pieces = batch.pieces if isinstance(batch, BatchPieces) else (batch,)
            self.bad_samples.count(sum(int(piece.substituted.sum()) for piece in pieces))
        return batch

    def transfer_batch_to_device(
        self, batch: ImageTextBatch | BatchPieces, device: torch.device, dataloader_idx: int
    ) -> ImageTextBatch:
        """Join the pieces of a batch on the device."""
        if isinstance(batch, BatchPieces):
            return batch.join(device)
        moved: ImageTextBatch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    def on_after_batch_transfer(self, batch: ImageTextBatch, dataloader_idx: int) -> ImageTextBatch:
        """Leave pixels to a module that normalises them; others get floats of the run's precision.

        A module says so with an attribute ``normalizes_pictures``.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        if getattr(module, "normalizes_pictures", False):
            return batch
        batch = self._normalize(batch)
        if self.trainer is None:
            return batch
        return batch._replace(images=self.trainer.precision_plugin.convert_input(batch.images))

    @cached_property
    def _normalize(self) -> ImageNormalizer:
        assert self.inputs is not None  # setup has checked it
        return ImageNormalizer(self.inputs.mean, self.inputs.std)

    @property
    def pictures(self) -> PicturePolicy:
        """What decides the pixels of pictures: the settings, then what the model says."""
        said = PicturePolicy() if self.inputs is None else self.inputs.pictures
        return said.changed(**self._picture_settings)

    def _world(self) -> World:
        """Rank and world size of the trainer; without one, of torch."""
        if self.trainer is None:
            return World.detect()
        return World(rank=self.trainer.global_rank, world_size=self.trainer.world_size)

    def _device(self) -> torch.device:
        """Where this rank computes and communicates."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _loader(
        self, dataset: PairDataset, sampler: GlobalBatchSampler | EvaluationBatchSampler
    ) -> DataLoader[PairSample]:
        assert self.inputs is not None  # setup has checked it
        trains = isinstance(sampler, GlobalBatchSampler)
        return build_loader(
            dataset,
            sampler,
            PairCollator(self.inputs.tokenizer, self.inputs.teachers.tokenizers if trains else ()),
            workers_per_rank=self.workers_per_rank,
            prefetch_factor=self.prefetch_factor,
            pin_memory=self._device().type == "cuda",
        )

    @property
    def num_substituted(self) -> int:
        """Bad samples replaced in the training batches of this rank, since this process started."""
        return self.bad_samples.num_substituted
