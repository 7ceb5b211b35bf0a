"""What ``doctor`` looks at, and the page it shows.

Alone it looks at this machine; started as training is, by srun or torchrun, at every rank and at
what is between them. Every wait has a limit, so that a rank or a file system that hangs is named.
"""

import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from dist_siglip.cli.doctor_config import RunNeeds, judge_needs, read_needs
from dist_siglip.cli.doctor_launch import Launch, detect_launch
from dist_siglip.cli.doctor_look import Plan
from dist_siglip.cli.doctor_page import Finding, render
from dist_siglip.cli.doctor_storage import ShardSet
from dist_siglip.cli.doctor_together import Features, Outcome, examine_alone, examine_together
from dist_siglip.cli.parser import VerbParser
from dist_siglip.cli.subjects import call, parser_of_function
from dist_siglip.data.remote import CacheSettings
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError


def run(verb: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``doctor`` and run it."""
    return call(doctor, parser(verb), arguments)


def parser(verb: str) -> VerbParser:
    """Return the parser of the options: the signature of ``doctor``."""
    return parser_of_function(verb, doctor)


def doctor(
    config: str | None = None,
    run_dir: str | None = None,
    shards: str | list[str] | None = None,
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    image_extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp"),
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
    num_shards: int = 4,
    write_mib: int = 64,
    local_batch_size: int = 2048,
    embed_dim: int = 512,
    timeout_seconds: float = 90.0,
) -> int:
    """Look at machines, ranks, run folder and shards; exit code 1 if a run would fail.

    Started like training (srun dist-siglip doctor, torchrun -m dist_siglip doctor) it looks at all
    ranks and what is between them; alone, at this machine. It trains nothing and leaves nothing in
    the run folder.

    Args:
        config: configuration of a run, whose folder, shards and batch are looked at.
        run_dir: run folder, in place of the configuration's.
        shards: file, folder, pattern, list file or URL, or a JSON list of these, in place of the
            configuration's.
        captions: where the captions of shards are; a configuration says it for its own.
        image_extensions: members of shards that are the picture of a sample.
        cache: copies of remote shards.
        num_shards: shards of each setting that are opened.
        write_mib: MiB written to the run folder.
        local_batch_size: rows of features each rank sends through every exchange.
        embed_dim: width of these features.
        timeout_seconds: longest wait for other ranks, and for what is looked at; inside a process
            group a third of it.
    """
    numbers = {
        "num_shards": num_shards,
        "write_mib": write_mib,
        "local_batch_size": local_batch_size,
        "embed_dim": embed_dim,
        "timeout_seconds": timeout_seconds,
    }
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    launch = detect_launch(os.environ)
    if launch.is_silent:
        return 1
    needs, told = _read(config)
    sets = needs.shard_sets if needs else ()
    if shards is not None:
        sets = (ShardSet("shards", shards, captions, image_extensions, PicturePolicy(), cache),)
    folder = run_dir or (needs.run_dir if needs else None)
    plan = Plan(Path(folder) if folder else None, sets, num_shards, write_mib * 2**20)
    told += [launch.complaint] if launch.complaint else []
    if launch.world.world_size == 1:
        outcome = examine_alone(launch, plan, timeout_seconds)
    else:
        features = Features(local_batch_size, embed_dim)
        outcome = examine_together(launch, plan, features, timeout_seconds)
    if needs is not None:
        told += judge_needs(needs, launch.world.world_size, outcome.num_nodes)
    return _leave(launch, [*told, *outcome.findings], outcome)


def _read(config: str | None) -> tuple["RunNeeds | None", list[Finding]]:
    """Parse the configuration, if there is one; what is wrong with it is a finding."""
    if config is None:
        return None, []
    try:
        return read_needs(config), []
    except UserError as error:
        return None, [Finding("FAIL", "configuration", str(error), "mend it: fit refuses it")]


def _leave(launch: Launch, findings: list[Finding], outcome: Outcome) -> int:
    """Show the page, where this process speaks, and return the exit code."""
    code = int(outcome.has_failed or any(finding.status == "FAIL" for finding in findings))
    if outcome.speaks:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        size = launch.world.world_size
        who = launch.host if size == 1 else f"rank {launch.world.rank} of {size} ({launch.host})"
        sys.stdout.write(render(f"dist-siglip doctor on {who}, {now}", findings) + "\n")
        sys.stdout.flush()
    if outcome.has_hung:
        # A thread that never comes back would hold the process.
        os._exit(code)
    return code
