"""Is this the sequence of batches that a checkpoint was written in, and if not, what changed?

A checkpoint keeps what the sequence depends on, and one line for each shard. So a refusal can name
the shards that came, went or changed, and data that grew can be accepted on purpose.
"""

from collections.abc import Iterator, Mapping

from dist_siglip.data.order.position import BatchPlan
from dist_siglip.errors import UserError

_REMEDY = "set it back, or start a new run in another folder"
# What other data change; everything else decides what a batch means.
_OF_THE_DATA = ("num_samples", "sources", "fingerprint")


def position_to_resume_at(
    plan: BatchPlan,
    lines: str,
    saved: Mapping[str, int | str],
    *,
    accept_changed_data: bool = False,
) -> int:
    """Return the samples consumed from which a run goes on.

    Args:
        plan: what the run would read now.
        lines: its shards, from ``PairTable.shard_lines``.
        saved: what the checkpoint kept: ``plan.identity()`` of then, "samples_consumed", "shards".
        accept_changed_data: go on although the data changed. A single source begins its next epoch;
            a mixture keeps its position. Everything but the data must still be the same.

    Raises:
        UserError: if a value differs; names it, the value then and the value now.
    """
    consumed = int(saved["samples_consumed"])
    now = plan.identity()
    differing = [name for name in now if saved.get(name, "not recorded") != now[name]]
    if not differing:
        return consumed
    of_the_batches = [name for name in differing if name not in _OF_THE_DATA]
    if of_the_batches or not accept_changed_data:
        name = (of_the_batches or differing)[0]
        remedy = _REMEDY
        if of_the_batches:
            change = f"{name} was {saved.get(name, 'not recorded')} when the checkpoint was written"
            change += f" and is {now[name]} now"
        else:
            change = f"the training shards changed: {_change(saved, lines, now)}"
            remedy = f"{remedy}, or set accept_changed_data to go on with these"
        raise UserError(f"cannot resume at the exact sample: {change}; {remedy}")
    before = int(saved["num_samples"]) // plan.global_batch_size * plan.global_batch_size
    if plan.sources or saved.get("sources") or not before:
        return consumed
    return -(-consumed // before) * plan.batches_per_epoch * plan.global_batch_size


def _change(saved: Mapping[str, int | str], lines: str, now: Mapping[str, int | str]) -> str:
    """Say what is different about the data."""
    changes = list(describe_shard_changes(str(saved.get("shards", "")), lines))
    if saved.get("sources") != now["sources"]:
        changes.append(f"sources were [{saved.get('sources')}] and are [{now['sources']}] now")
    if saved.get("num_samples") != now["num_samples"]:
        changes.append(f"{saved.get('num_samples')} samples then, {now['num_samples']} now")
    return "; ".join(changes) or "members of other names or sizes are read from them"


def describe_shard_changes(before: str, after: str) -> Iterator[str]:
    r"""Name what came, went and changed between two ``PairTable.shard_lines``.

    Example:
        >>> list(describe_shard_changes("a.tar\t3\t00\nb.tar\t2\t01", "a.tar\t4\t02"))
        ["1 shard is gone (first 'b.tar')", "1 shard changed (first 'a.tar': 3 samples, now 4)"]
    """
    if not before:
        return
    then, now = (dict(_parsed(lines)) for lines in (before, after))
    gone = [name for name in then if name not in now]
    new = [name for name in now if name not in then]
    changed = [name for name in then if name in now and then[name] != now[name]]
    if gone:
        yield f"{_counted(gone)} {_are(gone)} gone (first {gone[0]!r})"
    if new:
        yield f"{_counted(new)} {_are(new)} new (first {new[0]!r})"
    if changed:
        counts = [then[changed[0]][0], now[changed[0]][0]]
        how = f"{counts[0]} samples, now {counts[1]}" if counts[0] != counts[1] else "other members"
        yield f"{_counted(changed)} changed (first {changed[0]!r}: {how})"
    if not (gone or new or changed) and list(then) != list(now):
        yield "the same shards in another order"


def _parsed(lines: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for line in lines.split("\n"):
        name, count, digest = line.rsplit("\t", 2)
        yield name, (count, digest)


def _counted(names: list[str]) -> str:
    return "1 shard" if len(names) == 1 else f"{len(names)} shards"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
