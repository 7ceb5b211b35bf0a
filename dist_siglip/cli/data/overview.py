"""``data plan``: who reads what, on any number of ranks; ``data stats``: their content."""

import json as json_text
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_siglip.data.index.damage import MAX_BAD_FRACTION, OnDamage
from dist_siglip.data.index.pairs import PairTable, build_pair_table
from dist_siglip.data.inspect import QUANTILES, Gauge, choose_samples, summarize
from dist_siglip.data.order.position import BLOCK_SHARDS, BatchPlan, check_divisible
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.remote.locations import shard_name
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import (
    FORMATS,
    MAX_IMAGE_PIXELS,
    PICTURE_EXTENSIONS,
    PictureFormat,
    PicturePolicy,
    with_formats,
)
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError, check_least
from dist_siglip.system.process_pool import map_isolated

_CHUNK = 2000  # samples measured by one process
_SHOWN = 6  # names of shards in a row of the table


def read_table(
    shards: str | list[str],
    captions: CaptionRule,
    image_extensions: Sequence[str],
    on_damage: OnDamage,
    max_bad_fraction: float,
    cache: CacheSettings,
) -> PairTable:
    """Check the options by which commands read shards, and index the shards.

    Raises:
        UserError: if an option is out of range, or shards are missing or damaged.
    """
    captions.check()
    cache.check()
    return build_pair_table(
        expand_shards(shards),
        image_extensions=image_extensions,
        caption_extensions=captions.members,
        on_damage=on_damage,
        max_bad_fraction=max_bad_fraction,
        cache=ShardCache(cache),
    )


def stats(
    shards: str | list[str],
    sample: int | None = None,
    seed: int = 0,
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    image_extensions: tuple[str, ...] = PICTURE_EXTENSIONS,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    formats: tuple[PictureFormat, ...] = FORMATS,
    on_damage: OnDamage = "refuse",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    workers: int = 2,
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
    json: bool = False,
    model: str | None = None,
    context_length: int | None = None,
) -> int:
    """Print quantiles of sizes and caption lengths, formats, and how much occurs twice.

    Args:
        shards: file, folder, pattern, list file or URL, or a JSON list of these.
        sample: most samples to look at, chosen at random. Null looks at all.
        seed: of that choice.
        captions: where captions are; of several, the first counts.
        image_extensions: members that are the picture of a sample, in order of preference.
        max_image_pixels: larger pictures count as bad.
        formats: of pictures that are decoded, see data.formats of a run.
        on_damage: "refuse" damaged shards and incomplete samples, or "skip" them.
        max_bad_fraction: share of them that may be skipped.
        workers: processes.
        cache: copies of remote shards.
        json: print JSON instead of a table.
        model: open_clip architecture, as ``model.model`` of a run, whose tokens tell captions
            apart: those that its tokenizer makes equal are one, those without a token are empty.
            Null compares texts.
        context_length: tokens of a text, replaces the model's. Null keeps it.
    """
    if sample is not None and sample < 1:
        raise UserError(f"sample ({sample}) must be at least 1, or null for all")
    found = with_formats(image_extensions, formats)
    table = read_table(shards, captions, found, on_damage, max_bad_fraction, cache)
    tokenizer = None
    if model is not None:
        from dist_siglip.models.build import load_tokenizer

        tokenizer = load_tokenizer(model, context_length=context_length)
    elif context_length is not None:
        raise UserError(f"context_length ({context_length}) needs a model; give --model")
    pictures = PicturePolicy(max_image_pixels=max_image_pixels, formats=formats)
    gauge = Gauge(table=table, captions=captions, pictures=pictures, tokenizer=tokenizer)
    chosen = choose_samples(table.num_samples, sample, seed)
    chunks = [part.tolist() for part in np.array_split(chosen, -(-len(chosen) // _CHUNK))]
    parts = []
    for done in map_isolated(gauge, chunks, workers=workers):
        if done.result is None:
            raise RuntimeError(f"samples from {done.item[0]} on: {done.failure}")
        parts.append(done.result)
    summary = {"shards": len(table.shards), "of_samples": table.num_samples, **summarize(parts)}
    if json:
        sys.stdout.write(json_text.dumps(summary, indent=2) + "\n")
        return 0
    console = Console()
    console.print(_quantiles(summary))
    console.print(_counts(summary))
    return 0


def _quantiles(summary: dict[str, Any]) -> Table:
    table = Table(
        title=f"{summary['samples']:,} of {summary['of_samples']:,} samples of "
        f"{summary['shards']:,} shards"
    )
    table.add_column("")
    for quantile in QUANTILES:
        name = {0.0: "least", 0.5: "median", 1.0: "most"}.get(quantile, f"{100 * quantile:g} %")
        table.add_column(name, justify="right")
    for name, values in summary["quantiles"].items():
        form = "{:.2f}" if name == "aspect_ratio" else "{:,.0f}"
        table.add_row(name.replace("_", " "), *(form.format(value) for value in values))
    return table


def _counts(summary: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    formats = ", ".join(f"{count:,} {kind}" for kind, count in summary["formats"].items())
    table.add_row("formats", formats)
    for what in ("captions", "pictures"):
        counts = summary[what]
        table.add_row(
            what,
            f"{counts['distinct']:,} distinct; {counts['shared']:,} samples share theirs with "
            f"another, {counts['most']:,} the most common one",
        )
    table.add_row("with transparency", f"{summary['transparent']:,}")
    empty = summary["empty_captions"]
    table.add_row("cannot be used", f"{summary['bad']:,}, {empty:,} for an empty caption")
    return table


def plan(
    shards: str | list[str],
    world_size: int = 1,
    global_batch_size: int = 256,
    steps: int = 1,
    from_step: int = 0,
    seed: int = 0,
    block_shards: int = BLOCK_SHARDS,
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    image_extensions: tuple[str, ...] = PICTURE_EXTENSIONS,
    on_damage: OnDamage = "refuse",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
    json: bool = False,
) -> int:
    """Show the batches a run would take from shards, and what each rank reads for them.

    Args:
        shards: file, folder, pattern, list file or URL, or a JSON list of these.
        world_size: ranks; must divide the global batch.
        global_batch_size: pairs of a batch over all ranks.
        steps: how many batches to look at.
        from_step: first of them, counted over all epochs.
        seed: of the order.
        block_shards: shards shuffled together.
        captions: where captions are.
        image_extensions: members that are the picture of a sample, in order of preference.
        on_damage: "refuse" damaged shards and incomplete samples, or "skip" them.
        max_bad_fraction: share of them that may be skipped.
        cache: copies of remote shards.
        json: print JSON instead of a table.
    """
    check_least(1, world_size=world_size, global_batch_size=global_batch_size, steps=steps)
    check_least(1, block_shards=block_shards)
    check_least(0, from_step=from_step, seed=seed)
    check_divisible(global_batch_size, world_size)
    table = read_table(shards, captions, image_extensions, on_damage, max_bad_fraction, cache)
    batches = BatchPlan(
        counts=table.counts,
        fingerprint=table.fingerprint,
        seed=seed,
        global_batch_size=global_batch_size,
        block_shards=block_shards,
    )
    content = {
        "shards": len(table.shards),
        "samples": table.num_samples,
        "batches_per_epoch": batches.batches_per_epoch,
        "left_out_per_epoch": table.num_samples % global_batch_size,
        "local_batch_size": global_batch_size // world_size,
        "epoch_bytes": int(table.image_sizes.sum() + table.caption_sizes.sum()),
        "ranks": rows(table, batches, world_size, range(from_step, from_step + steps)),
    }
    if json:
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
        return 0
    Console().print(_table(content, block_shards, from_step, steps))
    return 0


def rows(table: PairTable, plan: BatchPlan, world_size: int, steps: range) -> list[dict[str, Any]]:
    """Say what each rank reads in some steps: samples, bytes, shards by name."""
    sequence, local = plan.sequence(), plan.global_batch_size // world_size
    found = []
    for rank in range(world_size):
        positions = [
            at
            for step in steps
            for at in sequence.positions(step, rank * local, (rank + 1) * local)
        ]
        ids = np.array([at.sample_id for at in positions])
        numbers = np.unique(np.searchsorted(table.starts, ids, side="right") - 1)
        found.append(
            {
                "rank": rank,
                "samples": len(ids),
                "bytes": int(table.image_sizes[ids].sum() + table.caption_sizes[:, ids].sum()),
                "shards": [shard_name(table.shards[number]) for number in numbers.tolist()],
                "epochs": sorted({at.epoch for at in positions}),
                "first_sample_ids": ids[:8].tolist(),
            }
        )
    return found


def _table(content: dict[str, Any], block_shards: int, from_step: int, steps: int) -> Table:
    table = Table(
        title=f"{content['samples']:,} samples of {content['shards']:,} shards: "
        f"{content['batches_per_epoch']:,} batches an epoch, {content['left_out_per_epoch']:,} "
        f"samples left out, {content['epoch_bytes'] / 2**20:,.1f} MiB",
        caption=f"steps {from_step} to {from_step + steps - 1}; at most {block_shards} shards are "
        "read at a time",
    )
    for heading in ("rank", "samples", "MiB", "shards"):
        table.add_column(heading, justify="right")
    table.add_column("which", overflow="fold")
    table.add_column("first sample ids", overflow="fold")
    for row in content["ranks"]:
        more = f" and {len(row['shards']) - _SHOWN} more" if len(row["shards"]) > _SHOWN else ""
        table.add_row(
            str(row["rank"]),
            f"{row['samples']:,}",
            f"{row['bytes'] / 2**20:,.2f}",
            str(len(row["shards"])),
            ", ".join(row["shards"][:_SHOWN]) + more,
            ", ".join(map(str, row["first_sample_ids"])),
        )
    return table
