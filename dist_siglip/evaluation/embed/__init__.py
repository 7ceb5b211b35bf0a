"""Embeddings of a data set, one row for every sample, on any number of ranks, interrupted or not.

Every shard is a job, written whole. Rank r of R takes every R-th shard that is not there yet; ranks
share nothing but the folder, so a lost one holds up nobody, and started again, on any number of
ranks, the rest is done.

``embed.json`` in the folder says what decides the numbers: weights, preprocessing, shards, number
format. Another model, or shards that changed, need another folder. Ranks need not talk: all of them
find the same file, or write the same one. ``source.json`` says where they come from.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.remote import is_remote
from dist_siglip.data.remote.cache import Prefetcher
from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.data.samples.picture_policy import FORMATS
from dist_siglip.data.samples.transforms import Preprocessing, evaluation_transform
from dist_siglip.distributed import World
from dist_siglip.errors import OutageError, UserError
from dist_siglip.evaluation.embed.nearest_index import (
    build_index,
    load_faiss,
    note_metrics,
)
from dist_siglip.evaluation.embed.quantized import (
    CALIBRATION_ROWS,
    QUANTIZED,
    RowCodec,
    find_codecs,
)
from dist_siglip.evaluation.embed.rotation import (
    ROTATION_PICTURES,
    find_rotation,
    name_rotation,
)
from dist_siglip.evaluation.embed.settings import EmbedSettings
from dist_siglip.evaluation.embed.shard_job import (
    EmbedReport,
    JobRows,
    Layout,
    Progress,
    ShardJob,
    layout_of,
    remove_partial,
    sample_keys,
    shard_jobs,
    skipped_file,
    write_skipped,
)
from dist_siglip.evaluation.embed.stored_rows import claim_folder, write_source
from dist_siglip.evaluation.encoding import (
    ShardEncoder,
    choose_device,
    require_equal_tokens,
)
from dist_siglip.evaluation.samples import (
    ShardBatch,
    ShardCollator,
    ShardDataset,
    ShardSample,
    shard_loader,
)
from dist_siglip.metrics.prefixes import check_dim
from dist_siglip.models.build import BuiltModel, tower_fingerprint

_LOGGER = logging.getLogger(__name__)


def embed_shards(
    table: PairTable,
    built: BuiltModel,
    out: Path,
    settings: EmbedSettings,
    *,
    world: World | None = None,
    source: Mapping[str, Any] = MappingProxyType({}),
) -> EmbedReport:
    """Write the embeddings of a data set, or go on where an earlier call stopped.

    Distributed contract: every rank passes the same table and model, takes the shards
    ``rank, rank + world_size, ...``, and waits for nobody.

    Args:
        table: the data set.
        built: the model; its towers are moved to the device and put into evaluation mode.
        out: new, empty, or left by an interrupted call with the same table, model and settings.
        settings: what is written, and how.
        world: of this process; detected by default.
        source: where the model comes from, for ``search``, as JSON can hold it.

    Raises:
        UserError: if the folder holds something else or cannot be written, the device cannot be
            used, a shard changed or is out of reach, numbers are not finite, or too many samples
            cannot be used.
    """
    world = World.detect() if world is None else world
    device = choose_device(settings.device, world.local_rank)
    built = replace(built, pictures=settings.pictures(built.pictures))
    if settings.dim is not None:
        check_dim(settings.dim, built.embed_dim)
    if settings.index is not None:
        load_faiss()
    if settings.tokens:
        require_equal_tokens(built)
    jobs = shard_jobs(table)
    layout = layout_of(settings.format, out, jobs, table.shard_lines.split("\n"))
    claim_folder(out, _identity(table, built, settings))
    with _told_in_one_line(out):
        write_source(out, table, source)
    progress = Progress(out, settings.max_bad_fraction)
    pending = []
    for job in jobs[world.rank :: world.world_size]:
        num_rows = layout.num_rows(job)
        if num_rows is None:
            pending.append(job)
        else:
            progress.keep(job, num_rows)
    files = [file for job in pending for file in (*layout.files(job), skipped_file(out, job))]
    remove_partial(files)
    _LOGGER.info(
        "embedding %d shards into %s on %s; %d are there already",
        len(pending) + progress.kept,
        out,
        device,
        progress.kept,
    )
    rotation = None
    if settings.rotate is not None:
        rotation = find_rotation(
            settings.rotate,
            out,
            built,
            lambda: _first_rows(
                table, built, replace(settings, towers="image"), jobs, device, ROTATION_PICTURES
            )["image"],
        )
    _warn_of_plain_cut(built, settings)
    codecs = _codecs(table, built, out, settings, jobs, device, rotation)
    encoder = ShardEncoder(
        built,
        towers=settings.towers,
        dtype=settings.dtype,
        device=device,
        precision=settings.precision,
        dim=settings.dim,
        rotation=rotation,
        codes={tower: codec.encode for tower, codec in codecs.items()},
        tokens=settings.tokens,
    )
    batches = iter(_loader(table, built, settings, pending, pin_memory=device.type == "cuda"))
    with prefetch_shards(table, jobs, layout, world, lambda: progress.current):
        for job in pending:
            progress.current = job.number
            count = job.num_batches(settings.local_batch_size)
            rows = encoder.encode(_all_read(islice(batches, count), job))
            done = JobRows(job, rows, sample_keys(table, job))
            with _told_in_one_line(out):
                write_skipped(out, done)
                layout.write(done)
            progress.add(done, len(pending))
    progress.judge(is_end=True)
    # Asked first: shards of others that appear later are theirs to join.
    is_whole = settings.index is not None and all(layout.num_rows(job) is not None for job in jobs)
    with _told_in_one_line(out):
        layout.finish()
    if settings.index is not None:
        if is_whole:
            with _told_in_one_line(out):
                build_index(out, settings.index_kind)
        else:
            _LOGGER.info("the index is built by the process that finishes last")
    return progress.report()


def _codecs(
    table: PairTable,
    built: BuiltModel,
    out: Path,
    settings: EmbedSettings,
    jobs: Sequence[ShardJob],
    device: torch.device,
    rotation: Tensor | None,
) -> Mapping[Tower, RowCodec]:
    """Find what makes codes of the rows of each tower; nothing for rows of floats."""
    dtype = next((each for each in QUANTIZED if each == settings.dtype), None)
    if dtype is None:
        return {}
    width = built.embed_dim if settings.dim is None else settings.dim
    return find_codecs(
        out,
        dtype,
        settings.wanted,
        width,
        lambda: _first_rows(
            table, built, settings, jobs, device, CALIBRATION_ROWS, settings.dim, rotation
        ),
        lambda recall: note_metrics(out, "rows", recall),
    )


def _first_rows(
    table: PairTable,
    built: BuiltModel,
    settings: EmbedSettings,
    jobs: Sequence[ShardJob],
    device: torch.device,
    count: int,
    dim: int | None = None,
    rotation: Tensor | None = None,
) -> dict[Tower, Tensor]:
    """Float32 features of the first samples of the data set, the same on every rank."""
    chosen, num_left = [], count
    for job in jobs:
        if num_left > 0:
            chosen.append(job._replace(stop=min(job.stop, job.first + num_left)))
            num_left -= job.num_samples
    encoder = ShardEncoder(
        built,
        towers=settings.towers,
        dtype="float32",
        device=device,
        precision=settings.precision,
        dim=dim,
        rotation=rotation,
    )
    batches = iter(_loader(table, built, settings, chosen, pin_memory=device.type == "cuda"))
    found: dict[Tower, list[Tensor]] = {tower: [] for tower in settings.wanted}
    for job in chosen:
        size = job.num_batches(settings.local_batch_size)
        rows = encoder.encode(_all_read(islice(batches, size), job))
        for tower, parts in found.items():
            features = rows.image_features if tower == "image" else rows.text_features
            parts.append(torch.from_numpy(features))
    return {tower: torch.cat(parts) for tower, parts in found.items()}


def _warn_of_plain_cut(built: BuiltModel, settings: EmbedSettings) -> None:
    if settings.dim in (None, built.embed_dim, *built.prefix_dims) or settings.rotate is not None:
        return
    trained = ", ".join(map(str, built.prefix_dims)) or "no prefix"
    _LOGGER.warning(
        "dim (%d): the features were trained at %s; a plain cut loses what --rotate pca may keep",
        settings.dim,
        trained,
    )


@contextmanager
def prefetch_shards(
    table: PairTable,
    jobs: Sequence[ShardJob],
    layout: Layout,
    world: World,
    current: Callable[[], int],
) -> Iterator[None]:
    """Fetch remote shards while the block runs; the first rank of a node does it for all of them.

    Args:
        table: the data set.
        jobs: all of the data set.
        layout: knows which of them are finished.
        world: of this process.
        current: number of the shard this rank is at; the others are thought to be as far.
    """
    cache = table.cache
    is_needed = world.local_rank == 0 and any(is_remote(shard) for shard in table.shards)
    if cache is None or not is_needed:
        yield
        return
    _LOGGER.info("remote shards: %s", cache.describe())
    ranks = range(world.rank, world.rank + world.local_world_size)  # of this node
    of_node = [job for job in jobs if job.number % world.world_size in ranks]
    wanted = [job.number for job in of_node if layout.num_rows(job) is None]
    prefetcher = Prefetcher(
        cache, lambda: [table.shards[number] for number in wanted if number >= current()]
    )
    prefetcher.start()
    try:
        yield
    finally:
        prefetcher.stop()


@contextmanager
def _told_in_one_line(out: Path) -> Iterator[None]:
    """A full disk or a lost folder inside the block is no defect."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"out ({out}) cannot be written: {error.strerror or error}; finished shards are kept: "
            "start again when there is room"
        ) from error


def _loader(
    table: PairTable,
    built: BuiltModel,
    settings: EmbedSettings,
    jobs: Sequence[ShardJob],
    *,
    pin_memory: bool,
) -> DataLoader[ShardSample]:
    """Load all shards through the same processes: batch after batch, none across two shards."""
    inputs = Preprocessing.of(built)
    dataset = ShardDataset(
        table,
        None if settings.towers == "text" else evaluation_transform(inputs),
        captions=settings.captions,
        pictures=built.pictures,
        tokenizer=inputs.tokenizer,
        identifies_pictures=settings.format == "features",
        marks_lost=True,
    )
    batches = (batch for job in jobs for batch in job.batches(settings.local_batch_size))
    return shard_loader(
        dataset,
        ([StreamPosition(0, sample_id, sample_id) for sample_id in batch] for batch in batches),
        ShardCollator(None if settings.towers == "image" else inputs.tokenizer, most_texts=1),
        workers=settings.workers if jobs else 0,
        pin_memory=pin_memory,
    )


def _all_read(batches: Iterable[ShardBatch], job: ShardJob) -> Iterator[ShardBatch]:
    """Pass batches on, as long as their shard can be read."""
    for batch in batches:
        if batch.lost:
            raise (OutageError if batch.is_outage else UserError)(
                f"shard {job.shard!r} is out of reach: {batch.lost}; finished shards are kept: "
                "start again when it is back"
            )
        yield batch


def _identity(table: PairTable, built: BuiltModel, settings: EmbedSettings) -> dict[str, Any]:
    """Everything that decides the numbers, as plain values by name."""
    # Which pictures and captions are the same, for training; older folders lack it.
    # And what makes the rows logits of a teacher, and which part of a picture they are of.
    ids = (
        {
            "ids": "picture bytes, caption tokens",
            "logit_scale": built.own_scale,
            "logit_bias": built.own_bias,
            "global_batch_size": built.trained_global_batch,
            "resize_mode": built.resize_mode,
        }
        if settings.format == "features"
        else {}
    )
    pictures = built.pictures
    return {
        "version": 1,
        "image_tower": None if settings.towers == "text" else tower_fingerprint(built, "image"),
        "text_tower": None if settings.towers == "image" else tower_fingerprint(built, "text"),
        "shards": table.fingerprint,
        "towers": settings.towers,
        "format": settings.format,
        "dtype": settings.dtype,
        "precision": settings.precision,
        "caption_members": list(settings.captions.members),
        "caption_json_field": settings.captions.json_field,
        "caption_split_lines": settings.captions.split_lines,
        **({"caption_field": settings.captions.fields[0]} if settings.captions.fields else {}),
        "max_image_pixels": settings.max_image_pixels,
        **ids,
        **({"dim": settings.dim} if settings.dim is not None else {}),
        **({"rotate": name_rotation(settings.rotate)} if settings.rotate is not None else {}),
        **({"tokens": True} if settings.tokens else {}),
        # Folders of before there was a choice go on.
        **({"truncated_pictures": "use"} if pictures.truncated_pictures == "use" else {}),
        **({"formats": list(pictures.formats)} if pictures.formats != FORMATS else {}),
    }


__all__ = ["EmbedReport", "EmbedSettings", "embed_shards"]
