"""How does a data set become embeddings, on any number of ranks, interrupted or not?

Every shard becomes one part, written whole. Rank r of R takes every R-th part that is not there
yet; ranks share nothing but the folder, so a lost one holds up nobody, and started again, on
as many ranks as you like, the rest is done.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import (
    AUTO,
    ExifOrientation,
    PicturePolicy,
    TruncatedPictures,
)
from dist_siglip.data.samples.transforms import ModelInputs, evaluation_transform
from dist_siglip.distributed import World
from dist_siglip.embedding.ahead import fetching_ahead
from dist_siglip.embedding.encoder import Encoder, Precision, RowType, Towers, choose_device
from dist_siglip.embedding.folder import claim_folder
from dist_siglip.embedding.layout import Format, layout_of, remove_partial
from dist_siglip.embedding.left_out import left_out_file, write_left_out
from dist_siglip.embedding.part import Part, PartRows, keys_of, parts_of
from dist_siglip.embedding.samples import (
    EmbeddingBatch,
    EmbeddingDataset,
    EmbeddingSample,
    embedding_loader,
)
from dist_siglip.embedding.tally import EmbedReport, Tally
from dist_siglip.errors import OutageError, UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.fingerprint import digest_tower

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """How a data set is embedded.

    Attributes:
        towers: which features are wanted.
        format: of the folder.
        dtype: of the features in the files.
        precision: of the computation.
        device: "auto", or a device of torch.
        local_batch_size: samples of a batch on each rank.
        workers: loader processes of each rank.
        captions: which caption a sample has.
        max_image_pixels: pictures with more cannot be used.
        transparency: see ``PicturePolicy``; "auto" is as the model was trained, or says.
        exif_orientation: likewise.
        truncated_pictures: likewise.
        max_bad_fraction: share of the samples of each rank that may be left out.

    Raises:
        UserError: if a number is out of its range.
    """

    towers: Towers = "both"
    format: Format = "clip-retrieval"
    dtype: RowType = "float16"
    precision: Precision = "32-true"
    device: str = "auto"
    local_batch_size: int = 256
    workers: int = 2
    captions: CaptionRule = field(default_factory=CaptionRule)
    max_image_pixels: int = 64_000_000
    transparency: str = AUTO
    exif_orientation: ExifOrientation | Literal["auto"] = AUTO
    truncated_pictures: TruncatedPictures | Literal["auto"] = AUTO
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("local_batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"{name} ({value}) must be at least {least}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction ({self.max_bad_fraction}) must be in [0, 1]")
        self.captions.check()
        self.pictures(PicturePolicy())

    def pictures(self, of_model: PicturePolicy) -> PicturePolicy:
        """Return what decides the pixels of pictures."""
        names = ("transparency", "exif_orientation", "truncated_pictures", "max_image_pixels")
        return of_model.changed(**{name: getattr(self, name) for name in names})


def embed_shards(
    table: PairTable,
    built: BuiltModel,
    out: Path,
    settings: EmbedSettings,
    *,
    world: World | None = None,
) -> EmbedReport:
    """Write the embeddings of a data set, or go on where an earlier call stopped.

    Distributed contract: every rank passes the same table and model, takes the parts
    ``rank, rank + world_size, ...``, and waits for nobody.

    Args:
        table: the data set.
        built: the model; its towers are moved to the device and put into evaluation mode.
        out: new, empty, or left by an interrupted call with the same table, model and settings.
        settings: what is written, and how.
        world: of this process; detected by default.

    Raises:
        UserError: if the folder holds something else or cannot be written, the device cannot be
            used, a shard changed or is out of reach, numbers are not finite, or too many samples
            cannot be used.
    """
    world = World.detect() if world is None else world
    device = choose_device(settings.device, world.local_rank)
    built = replace(built, pictures=settings.pictures(built.pictures))
    parts = parts_of(table)
    layout = layout_of(settings.format, out, parts, table.shard_lines.split("\n"))
    claim_folder(out, _identity(table, built, settings))
    tally = Tally(out, settings.max_bad_fraction)
    pending = []
    for part in parts[world.rank :: world.world_size]:
        num_rows = layout.num_rows(part)
        if num_rows is None:
            pending.append(part)
        else:
            tally.keep(part, num_rows)
    files = [file for part in pending for file in (*layout.files(part), left_out_file(out, part))]
    remove_partial(files)
    _LOGGER.info(
        "embedding %d shards into %s on %s; %d are there already",
        len(pending) + tally.kept,
        out,
        device,
        tally.kept,
    )
    encoder = Encoder(
        built,
        towers=settings.towers,
        dtype=settings.dtype,
        device=device,
        precision=settings.precision,
    )
    batches = iter(_loader(table, built, settings, pending, pin_memory=device.type == "cuda"))
    with fetching_ahead(table, parts, layout, world, lambda: tally.current):
        for part in pending:
            tally.current = part.number
            count = part.num_batches(settings.local_batch_size)
            rows = encoder.encode(_all_read(islice(batches, count), part))
            done = PartRows(part, rows, keys_of(table, part))
            with _told_in_one_line(out):
                write_left_out(out, done)
                layout.write(done)
            tally.add(done, len(pending))
    tally.judge(is_end=True)
    with _told_in_one_line(out):
        layout.finish()
    return tally.report()


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
    parts: Sequence[Part],
    *,
    pin_memory: bool,
) -> DataLoader[EmbeddingSample]:
    """Load all parts through the same processes: batch after batch, none across two parts."""
    inputs = ModelInputs.of(built)
    dataset = EmbeddingDataset(
        table,
        None if settings.towers == "text" else evaluation_transform(inputs),
        captions=settings.captions,
        pictures=built.pictures,
        tokenizer=inputs.tokenizer,
        with_ids=settings.format == "features",
    )
    return embedding_loader(
        dataset,
        (batch for part in parts for batch in part.batches(settings.local_batch_size)),
        None if settings.towers == "image" else inputs.tokenizer,
        workers=settings.workers if parts else 0,
        pin_memory=pin_memory,
    )


def _all_read(batches: Iterable[EmbeddingBatch], part: Part) -> Iterator[EmbeddingBatch]:
    """Pass batches on, as long as their shard can be read."""
    for batch in batches:
        if batch.lost:
            raise (OutageError if batch.is_outage else UserError)(
                f"shard {part.shard!r} is out of reach: {batch.lost}; finished shards are kept: "
                "start again when it is back"
            )
        yield batch


def _identity(table: PairTable, built: BuiltModel, settings: EmbedSettings) -> dict[str, Any]:
    """Everything that decides the numbers, as plain values by name."""
    # Which pictures and captions are the same, for training; older folders lack it.
    ids = {"ids": "picture bytes, caption tokens"} if settings.format == "features" else {}
    truncated = built.pictures.truncated_pictures
    return {
        "version": 1,
        "image_tower": None if settings.towers == "text" else digest_tower(built, "image"),
        "text_tower": None if settings.towers == "image" else digest_tower(built, "text"),
        "shards": table.fingerprint,
        "towers": settings.towers,
        "format": settings.format,
        "dtype": settings.dtype,
        "precision": settings.precision,
        "caption_members": list(settings.captions.members),
        "caption_json_field": settings.captions.json_field,
        "caption_split_lines": settings.captions.split_lines,
        "max_image_pixels": settings.max_image_pixels,
        **ids,
        # Folders of before there was a choice go on.
        **({"truncated_pictures": truncated} if truncated == "use" else {}),
    }
