"""Who takes part in ``bench data``: our loader, decoding as needed or exactly, and open_clip's."""

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from open_clip import SimpleTokenizer
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.utils.data import DataLoader

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.order.position import BatchPlan, GlobalBatchSampler, Progress
from dist_siglip.data.samples.batch import ImageNormalizer, PairCollator
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.loader import build_loader
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import ModelInputs, training_transform

OPEN_CLIP = "open_clip"
_SCALED, _EXACT = "ours", "ours, exact pixels"
CONTESTANTS = (OPEN_CLIP, _SCALED, _EXACT)

_SHUFFLED = 100  # samples in open_clip's buffer; full before it begins, as in a long run


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """What all contestants are given.

    Args:
        shards: local shards with .jpg and .txt.
        image_size: side of the crops, in pixels.
        crop_scale: share of the area that a crop keeps.
        local_batch_size: pairs of a batch.
        workers: loader processes.
    """

    shards: tuple[str, ...]
    image_size: int
    crop_scale: tuple[float, float]
    local_batch_size: int
    workers: int


def batches(contestant: str, streaming: Streaming) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Stream (B, 3, H, W) float32 pictures, normalised, and (B, L) token rows, without end.

    Args:
        contestant: one of ``CONTESTANTS``.
        streaming: what to read.
    """
    if contestant == OPEN_CLIP:
        yield from _open_clip(streaming)
    else:
        yield from _ours(streaming, scaled_decode=contestant == _SCALED)


def _ours(
    streaming: Streaming, *, scaled_decode: bool
) -> Generator[tuple[Tensor, Tensor], None, None]:
    settings = PreprocessCfg(size=streaming.image_size)
    inputs = ModelInputs(
        image_size=streaming.image_size,
        mean=_triple(settings.mean),
        std=_triple(settings.std),
        interpolation=settings.interpolation,
        resize_mode=settings.resize_mode,
        context_length=77,
        tokenizer=SimpleTokenizer(),
    )
    table = build_pair_table(streaming.shards, image_extensions=("jpg",))
    transform = training_transform(inputs, streaming.crop_scale, scaled_decode=scaled_decode)
    plan = BatchPlan(
        counts=table.counts,
        fingerprint=table.fingerprint,
        seed=0,
        global_batch_size=streaming.local_batch_size,
        block_shards=16,
    )
    loader = build_loader(
        PairDataset(table, transform, seed=0, pictures=PicturePolicy()),
        GlobalBatchSampler(plan, rank=0, world_size=1, progress=Progress()),
        PairCollator(inputs.tokenizer),
        workers_per_rank=streaming.workers,
        prefetch_factor=2,
        pin_memory=False,
    )
    normalize = ImageNormalizer(inputs.mean, inputs.std)
    for batch in loader:
        yield normalize.pixels(batch.images), batch.texts


def _open_clip(streaming: Streaming) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Stream through the stages of open_clip 3.3's ``get_wds_dataset``, resampled variant."""
    os.environ["WDS_SECURE"] = "1"  # read once, at webdataset's first import
    import webdataset
    from webdataset.tariterators import group_by_keys, tar_file_expander

    preprocess = image_transform_v2(
        PreprocessCfg(size=streaming.image_size),
        is_train=True,
        aug_cfg=AugmentationCfg(scale=streaming.crop_scale),
    )
    tokenizer = SimpleTokenizer()
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(list(streaming.shards)),
        _open_local,  # the three stages of tarfile_to_samples, which opens no local file securely
        tar_file_expander,
        group_by_keys,
        webdataset.shuffle(bufsize=_SHUFFLED, initial=_SHUFFLED),
        webdataset.select(_is_whole),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=preprocess, text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(streaming.local_batch_size, partial=False),
    )
    loader: DataLoader[Any] = DataLoader(
        pipeline,
        batch_size=None,
        shuffle=False,
        num_workers=streaming.workers,
        persistent_workers=True,
    )
    yield from loader


def _open_local(shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with open(shard["url"], "rb") as stream:
            yield {**shard, "stream": stream}


def _is_whole(sample: dict[str, Any]) -> bool:
    return "txt" in sample and any(kind in sample for kind in ("png", "jpg", "jpeg", "webp"))


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
