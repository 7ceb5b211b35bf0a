"""What does one rank find on its own node?"""

from pathlib import Path
from typing import Any, NamedTuple

from dist_siglip.cli.doctor_bounds import BoundedChecks
from dist_siglip.cli.doctor_machine import gpu_of, look_at_machine, machine_facts
from dist_siglip.cli.doctor_page import Finding
from dist_siglip.cli.doctor_storage import ShardSet, look_at_folder, look_at_shards, look_for_file
from dist_siglip.distributed import World

_BYTES_OF_OTHERS = 2**20  # written by nodes that write no checkpoint


class Plan(NamedTuple):
    """What is to be looked at.

    Attributes:
        run_dir: run folder; None looks at none.
        shard_sets: shards of each setting.
        num_shards: of each, that are opened.
        write_bytes: written to the run folder.
    """

    run_dir: Path | None
    shard_sets: tuple[ShardSet, ...]
    num_shards: int
    write_bytes: int


class Look(NamedTuple):
    """What one rank found, in plain values.

    Attributes:
        findings: lines of the page.
        facts: what must be the same on all ranks.
        shard_facts: likewise of the shards; None of a rank that leaves them to another.
        gpu: identity of its GPU; "" without one.
    """

    findings: list[Finding]
    facts: dict[str, str]
    shard_facts: dict[str, str] | None
    gpu: str


def look_around(world: World, plan: Plan, kept_file: str | None, checks: BoundedChecks) -> Look:
    """Look at machine, run folder and shards.

    Args:
        world: this rank.
        plan: what to look at.
        kept_file: that the first rank keeps in the run folder, if the ranks are several.
        checks: the time there is.
    """
    checks.take("host", lambda: look_at_machine(world))
    if plan.run_dir is None:
        checks.findings.append(
            Finding("-", "run folder", "not looked at: give --run_dir or --config")
        )
    else:
        _look_at_folder(world, plan, plan.run_dir, kept_file, checks)
    shard_facts: dict[str, str] | None = None
    if world.local_rank == 0:
        shard_facts = {}
        for shard_set in plan.shard_sets:
            remedy = "the storage of these shards hangs: look at its mount or its server"
            found = checks.run(
                shard_set.name,
                lambda chosen=shard_set: look_at_shards(chosen, plan.num_shards),  # type: ignore[misc]
                remedy=remedy,
            )
            findings, facts = found or ([], {})
            checks.findings += findings
            shard_facts |= facts
        if not plan.shard_sets:
            checks.findings.append(
                Finding("-", "shards", "not looked at: give --shards or --config")
            )
    facts = checks.run("host", lambda: machine_facts(world)) or {}
    return Look(checks.findings, facts, shard_facts, gpu_of(world))


def _look_at_folder(
    world: World, plan: Plan, run_dir: Path, kept_file: str | None, checks: BoundedChecks
) -> None:
    remedy = f"the file system of {run_dir} hangs: look at its mount or its server"
    if world.is_first:
        checks.take("run folder", lambda: look_at_folder(run_dir, plan.write_bytes), remedy=remedy)
    elif world.local_rank == 0:
        checks.take(
            "run folder",
            # The speed of so little says nothing.
            lambda: [
                finding
                for finding in look_at_folder(run_dir, _BYTES_OF_OTHERS)
                if finding.status == "FAIL"
            ],
            remedy=remedy,
        )
    if kept_file is not None:
        checks.take("shared folder", lambda: look_for_file(Path(kept_file)), remedy=remedy)


def unpack_look(value: dict[str, Any]) -> Look:
    """Make a look of what went through JSON."""
    return Look(**{**value, "findings": [Finding(*finding) for finding in value["findings"]]})
