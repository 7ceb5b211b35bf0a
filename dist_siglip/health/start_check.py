"""Comparison of what all ranks were started with.

Ranks with different settings, code or libraries hang in the first collective they do not share, or
train something nobody asked for. So every rank writes down what it was started with, in the store
that brought the ranks together, and the first one compares. No collective runs: a rank that
would never answer one is named all the same.

Settings, the code of this package and its libraries are compared. What a setting points at is
compared elsewhere: shards by the fingerprint of their content.
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from dist_siglip.distributed.groups import resolve_group
from dist_siglip.distributed.store_channel import StoreChannel
from dist_siglip.errors import UserError
from dist_siglip.runs.provenance import flatten, installed_versions

# A node may have its own copy, at its own path: only whether there is one is compared.
_PLACES = frozenset(
    {
        "data.train_shards",
        "data.val_shards",
        "data.train_features",
        "data.bad_sample_log",
        "data.cache.folder",
    }
)
# Where the settings were read from, and what is a node's own business.
_FREE = frozenset({"config", "data.cache.max_gib"})


def describe_start(config: Mapping[str, Any], **numbers: object) -> dict[str, str]:
    """Write down what this rank was started with, readable value by readable name.

    Args:
        config: resolved settings, nested, of plain values.
        numbers: what follows from them here: ranks, pairs of a batch, the checkpoint.

    Example:
        >>> facts = describe_start({"trainer": {"max_steps": 5}}, world_size=2)
        >>> facts["trainer.max_steps"], facts["world_size"], "torch" in facts
        ('5', '2', True)
    """
    facts = {name: str(value) for name, value in numbers.items()}
    facts["code of dist_siglip"] = digest_of_sources()
    facts["python"] = platform.python_version()
    facts |= {name: str(version) for name, version in installed_versions().items()}
    for name, value in flatten(config):
        if name in _PLACES:
            facts[name] = "null" if value is None else "set"
        elif name not in _FREE:
            facts[name] = repr(value)
    return facts


@cache
def digest_of_sources() -> str:
    """First digits of the SHA-256 of every Python file of this package, names included.

    Example:
        >>> len(digest_of_sources())
        12
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


_MOST_TOLD = 4  # differences of one message
_LONGEST_VALUE = 80
_ANSWER_SECONDS = 5.0  # others wait so much longer for the first rank than it does for them
_occasions = count()


def check_ranks_started_alike(
    facts: Mapping[str, str],
    *,
    group: ProcessGroup | None = None,
    limit: timedelta = timedelta(minutes=10),
) -> None:
    """Refuse to start if ranks differ in what they were started with.

    Distributed contract: every rank calls it, equally often. Through the store of the group: one
    value from each rank, one answer of the first rank. Without a process group, or in a world of
    one, there is nothing to compare.

    Args:
        facts: readable value by readable name.
        group: ranks to compare; the default group if None.
        limit: how long ranks wait for each other.

    Raises:
        UserError: on every rank, naming what differs, the ranks and their values.
        RuntimeError: within the limit and some seconds, naming ranks that never came.
    """
    group = resolve_group(group)
    if group is None or group.size() == 1:
        return
    # A connection of its own: the waits below hold nobody else up.
    store = PrefixStore(f"start-check-{next(_occasions)}", group.get_group_store().clone())
    channel = StoreChannel(store, group.rank(), group.size())
    channel.publish("facts", dict(facts))
    if group.rank() == 0:
        everyone = channel.gather("facts", limit.total_seconds())
        missing = [rank for rank, facts in enumerate(everyone) if facts is None]
        answer: Any = {"missing": missing, "differences": describe_differences(everyone)}
        channel.broadcast("facts", answer)
        if missing or answer["differences"]:
            channel.leave(group.size() - len(missing))
    else:
        answer = channel.receive("facts", limit.total_seconds() + _ANSWER_SECONDS)
        if answer is None:
            raise RuntimeError(
                f"rank {group.rank()} of {group.size()} waited for rank 0 to compare how the "
                "ranks were started, and it did not answer; look at its log"
            )
        channel.leave(0)
    if answer["missing"]:
        raise RuntimeError(
            f"rank {list_ranks(answer['missing'])} of {group.size()} did not say within "
            f"{limit.total_seconds():.0f} s how it was started: it ended, or hangs; look at its log"
        )
    if answer["differences"]:
        told = "; ".join(answer["differences"][:_MOST_TOLD])
        more = len(answer["differences"]) - _MOST_TOLD
        raise UserError(
            f"ranks were not started alike: {told}{f' and {more} more' if more > 0 else ''}; start "
            "every rank with the same command, code and libraries"
        )


def describe_differences(everyone: Sequence[Mapping[str, str] | None]) -> list[str]:
    """Say for each fact that ranks do not share which ranks differ, and from what most have.

    Args:
        everyone: facts by name, in rank order; None for a rank that is not there.

    Example:
        >>> describe_differences([{"torch": "2.14"}, {"torch": "2.14"}, {"torch": "2.15"}])
        ['torch is 2.15 on rank 2 and 2.14 on rank 0-1']
        >>> describe_differences([{"seed": "1"}, {"seed": "2"}, None])
        ['seed is 2 on rank 1 and 1 on rank 0']
    """
    ranks = [rank for rank, facts in enumerate(everyone) if facts is not None]
    present = [facts for facts in everyone if facts is not None]
    lines = []
    for name in dict.fromkeys(name for facts in present for name in facts):
        values = [facts.get(name, "missing") for facts in present]
        # Of equally many, the first met: the one of the first rank.
        (usual, _), *others = Counter(values).most_common()
        where = {
            value: list_ranks([r for r, v in zip(ranks, values, strict=True) if v == value])
            for value in set(values)
        }
        lines += [
            f"{name} is {_shorten(other)} on rank {where[other]} and {_shorten(usual)} on rank "
            f"{where[usual]}"
            for other, _ in others
        ]
    return lines


def _shorten(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."


def list_ranks(ranks: Sequence[int]) -> str:
    """Write ascending ranks briefly.

    Example:
        >>> list_ranks([0, 1, 2, 5, 8, 9])
        '0-2, 5, 8-9'
    """
    runs: list[tuple[int, int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
