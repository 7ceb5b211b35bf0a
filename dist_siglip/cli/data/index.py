"""``data index``: side-cars of shards, made ahead of training."""

import json as json_text
import sys
import time
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dist_siglip.cli import EXIT_SAVED
from dist_siglip.data.index.read import read_index
from dist_siglip.data.inspect.process_pool import map_isolated
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.urls import expand_shards
from dist_siglip.distributed import World
from dist_siglip.errors import OutageError, UserError
from dist_siglip.system.redaction import redact

_MOST_AT_ONCE = 8  # shards indexed by one process
_SHOWN = 20  # damaged shards, and remarks, under the table


def index(
    shards: str | list[str],
    workers: int = 2,
    rebuild: bool = False,
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
    json: bool = False,
) -> int:
    """Write a side-car <shard>.idx.npz for every shard that has none; exit code 1 on damage.

    Else exit code 75 if a shard is out of reach for the moment.
    Started by torchrun or srun, each process takes its share of the shards.

    Args:
        shards: file, folder, pattern, list file or URL, or a JSON list of these.
        workers: processes.
        rebuild: scan shards that have a side-car, too.
        cache: copies of remote shards.
        json: print JSON instead of a table.
    """
    cache.check()
    if workers < 1:
        raise UserError(f"workers ({workers}) must be at least 1")
    started = time.monotonic()
    world = World.detect()
    mine = expand_shards(shards)[world.rank :: world.world_size]
    read = partial(_read_all, rebuild=rebuild, cache=ShardCache(cache))
    size = max(1, min(_MOST_AT_ONCE, len(mine) // (2 * workers)))
    chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
    num_samples = num_members = 0
    damage: list[str] = []
    remarks: list[str] = []
    lost: list[str] = []
    for done in map_isolated(read, chunks, workers=workers):
        if done.result is None:
            damage.append(f"shards from {redact(done.item[0])!r} on: {done.failure}")
            continue
        for one in done.result:
            num_samples += one.num_samples
            num_members += one.num_members
            for lines, line in ((damage, one.damage), (remarks, one.remark), (lost, one.lost)):
                lines += [line] if line else []
    seconds = time.monotonic() - started
    code = 1 if damage else EXIT_SAVED if lost else 0
    if json:
        content = {
            "shards": len(mine),
            "samples": num_samples,
            "members": num_members,
            "damaged": damage,
            "remarks": remarks,
            "unreachable": lost,
            "seconds": seconds,
        }
        sys.stdout.write(json_text.dumps(content, indent=2) + "\n")
        return code
    table = Table(title=f"indexed in {seconds:.1f} s, {len(mine) / seconds:,.0f} shards/s")
    for heading in ("shards", "samples", "members", "damaged"):
        table.add_column(heading, justify="right")
    table.add_row(f"{len(mine):,}", f"{num_samples:,}", f"{num_members:,}", f"{len(damage):,}")
    console = Console()
    console.print(table)
    for line in (*damage[:_SHOWN], *lost[:_SHOWN], *remarks[:_SHOWN]):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return code


class _Indexed(NamedTuple):
    """What is known of one shard: counts, and a line each about what is the matter with it."""

    num_samples: int = 0
    num_members: int = 0
    damage: str = ""
    remark: str = ""
    lost: str = ""


def _read_all(shards: list[str], rebuild: bool, cache: ShardCache) -> list[_Indexed]:
    """Index some shards."""
    return [_read(shard, rebuild, cache) for shard in shards]


def _read(shard: str, rebuild: bool, cache: ShardCache) -> _Indexed:
    try:
        one = read_index(shard, rebuild=rebuild, cache=cache)
    except UserError as error:  # a remote shard that is missing or denied
        return _Indexed(damage=str(error))
    except OutageError as error:
        return _Indexed(lost=str(error))
    except OSError as error:
        return _Indexed(damage=f"shard {shard!r} cannot be read: {error.strerror or error}")
    return _Indexed(one.num_samples, len(one.offsets), one.damage, one.remark)
