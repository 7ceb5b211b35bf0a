"""``data stats``: sizes, formats, caption lengths and duplicates of a data set."""

import json as json_text
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_siglip.data.index.damage import OnDamage
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.inspect.process_pool import spread
from dist_siglip.data.inspect.statistics import QUANTILES, Gauge, choose_samples, summarize
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError

_CHUNK = 2000  # samples measured by one process


def stats(
    shards: str | list[str],
    sample: int | None = None,
    seed: int = 0,
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    image_extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp"),
    max_image_pixels: int = 64_000_000,
    on_damage: OnDamage = "refuse",
    max_bad_fraction: float = 0.01,
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
    captions.check()
    cache.check()
    table = build_pair_table(
        expand_shards(shards),
        image_extensions=image_extensions,
        caption_extensions=captions.members,
        on_damage=on_damage,
        max_bad_fraction=max_bad_fraction,
        cache=ShardCache(cache),
    )
    tokenizer = None
    if model is not None:
        from dist_siglip.models.build import load_tokenizer

        tokenizer = load_tokenizer(model, context_length=context_length)
    elif context_length is not None:
        raise UserError(f"context_length ({context_length}) is of a model; name it, too")
    pictures = PicturePolicy(max_image_pixels=max_image_pixels)
    gauge = Gauge(table=table, captions=captions, pictures=pictures, tokenizer=tokenizer)
    chosen = choose_samples(table.num_samples, sample, seed)
    chunks = [part.tolist() for part in np.array_split(chosen, -(-len(chosen) // _CHUNK))]
    parts = []
    for done in spread(gauge, chunks, workers=workers):
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
