"""Handshake before an exchange: all ranks compare what they are about to send.

Point-to-point transfers trust the caller: a wrong shape or dtype hangs or delivers garbage. So
each exchange begins with one all-gather of 512 bytes per rank over a CPU group: a readable
signature, the number of rows, the ranks per node, up to two shared numbers, and the speeds that
"auto" is to reckon with. Rows and ranks per node may differ between ranks; the signature may not,
the shared numbers hardly; the speeds of the first rank are taken.

After a failed collective ``missing_ranks`` finds who did not take part.
"""

import dataclasses
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from dist_siglip.distributed.combine import all_gather_single
from dist_siglip.distributed.cost_model import Speeds
from dist_siglip.distributed.store_channel import StoreChannel
from dist_siglip.distributed.waiting import waiting_for
from dist_siglip.errors import UserError

# How long a rank whose call failed waits for others to say that theirs failed too.
_SECONDS = 1.0


def missing_ranks(group: ProcessGroup, occasion: str) -> str:
    """Name the ranks of ``group`` that do not report the same failure within a second.

    Every rank whose call failed leaves a note in the group's store and looks for the notes of
    the others.

    Args:
        group: process group whose ranks were waited for; its store is asked, not the group.
        occasion: what failed, the same on every rank and never the same twice.

    Returns:
        The subject and verb of a sentence: who did not take part.
    """
    missing: list[int] = []
    # The store went down with its rank, or this version of torch keeps it to itself.
    with suppress(RuntimeError, AttributeError):
        store = PrefixStore(f"dist_siglip/{occasion}", group.get_group_store())
        channel = StoreChannel(store, group.rank(), group.size())
        channel.publish("failed", True)
        told = channel.gather("failed", _SECONDS)
        missing = [rank for rank, failed in enumerate(told) if failed is None]
    who = f"rank {', '.join(map(str, missing))}" if missing else "a rank"
    return f"{who} did not take part: it ended, raised, or makes another call; look at its log"


# Tells every rank one message and returns the messages of all ranks, in rank order.
Announce = Callable[[bytes], list[bytes]]

_MESSAGE_BYTES = 512
_NUMBERS = struct.Struct("<QQdd5d")  # rows, ranks per node, shared numbers or nan, speeds
_MOST_SHARED = 2
_TEXT_BYTES = _MESSAGE_BYTES - _NUMBERS.size
# Replicas on unlike processors drift apart by roundings; settings differ by more.
_SHARED_TOLERANCE = 1e-3


class Agreement(NamedTuple):
    """Numbers of every rank, in rank order.

    Attributes:
        row_counts: rows of its shard.
        local_world_sizes: ranks of its node, 0 where it cannot tell.
        speeds: what the first rank knows of the machines.
    """

    row_counts: tuple[int, ...]
    local_world_sizes: tuple[int, ...]
    speeds: Speeds


def describe_shard(tensors: Sequence[Tensor]) -> str:
    """Write dtypes and row shapes of a shard, for instance ``float32 (*, 512)``.

    Example:
        >>> describe_shard([torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)])
        'float32 (*, 8) + int64 (*)'
    """
    parts = []
    for tensor in tensors:
        row_shape = "".join(f", {size}" for size in tensor.shape[1:])
        parts.append(f"{str(tensor.dtype).removeprefix('torch.')} (*{row_shape})")
    return " + ".join(parts)


def read_numbers(
    numbers: Mapping[str, Tensor | float], use: str, compared: set[str]
) -> dict[str, float]:
    """Read the numbers that ranks should share: on a CPU always, on a device once for each use.

    The host waits for a device to read them, so later exchanges of the same use read nothing.

    Args:
        numbers: by readable name, of one element each.
        use: what they are for, for instance the name of a loss.
        compared: uses whose numbers were read from a device before; this one is added.

    Example:
        >>> read_numbers({"logit_scale": torch.tensor(10.0)}, "sigmoid loss", set())
        {'logit_scale': 10.0}
    """
    if any(isinstance(n, Tensor) and n.device.type != "cpu" for n in numbers.values()):
        if use in compared:
            return {}
        compared.add(use)
    return {name: float(number) for name, number in numbers.items()}


def agree(
    num_rows: int,
    local_world_size: int,
    signature: str,
    announce: Announce,
    shared: Mapping[str, float] | None = None,
    speeds: Speeds = Speeds(),  # noqa: B008 - frozen dataclass
) -> Agreement:
    """Compare signatures over all ranks and return every rank's numbers.

    Distributed contract: one all-gather of 512 bytes per rank. Every rank gets the same answer,
    so either all go on or all raise.

    Args:
        num_rows: rows this rank is about to send.
        local_world_size: ranks of this rank's node as far as it knows.
        signature: what must be equal on all ranks, readable; cut at 440 bytes.
        announce: carries the messages.
        shared: at most two numbers that must be equal on all ranks up to a thousandth, by name.
            Those that are not finite are not compared.
        speeds: what this rank knows of the machines.

    Raises:
        UserError: if signatures or shared numbers differ; names the ranks that differ from the
            majority.

    Example:
        >>> agree(3, 1, "float32 (*, 8)", lambda message: [message, message]).row_counts
        (3, 3)
    """
    shared = shared or {}
    mine = [*shared.values(), *[math.nan] * (_MOST_SHARED - len(shared))]
    text = signature.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    numbers = _NUMBERS.pack(num_rows, local_world_size, *mine, *dataclasses.astuple(speeds))
    messages = announce(numbers + text)
    signatures = [_signature_of(message) for message in messages]
    usual, _ = Counter(signatures).most_common(1)[0]
    odd = [rank for rank, value in enumerate(signatures) if value != usual]
    if odd:
        raise UserError(
            f"rank {', '.join(map(str, odd))} passes [{signatures[odd[0]]}] but rank "
            f"{signatures.index(usual)} passes [{usual}]; only the number of rows may differ "
            "between ranks"
        )
    row_counts, local_world_sizes, *values = zip(
        *(_NUMBERS.unpack_from(message) for message in messages), strict=True
    )
    for name, by_rank in zip(shared, values, strict=False):
        _compare(name, by_rank)
    first_speeds = _NUMBERS.unpack_from(messages[0])[-5:]
    return Agreement(row_counts, local_world_sizes, Speeds(*first_speeds))


def _signature_of(message: bytes) -> str:
    return message[_NUMBERS.size :].rstrip(b"\0").decode(errors="replace")


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SHARED_TOLERANCE, abs_tol=_SHARED_TOLERANCE)


def _compare(name: str, by_rank: Sequence[float]) -> None:
    """Refuse a number that should be the same on all ranks."""
    finite = {rank: value for rank, value in enumerate(by_rank) if math.isfinite(value)}
    first = next(iter(finite.values()), math.nan)
    if all(_is_close(value, first) for value in finite.values()):
        return
    # Of equally many, the first met: the one of the first rank.
    usual = max(finite.values(), key=lambda one: sum(_is_close(one, v) for v in finite.values()))
    odd = [rank for rank, value in finite.items() if not _is_close(value, usual)]
    if odd:
        raise UserError(
            f"{name} is {by_rank[odd[0]]:.6g} on rank {', '.join(map(str, odd))} and {usual:.6g} "
            f"on rank {by_rank.index(usual)}; it must be equal on all ranks: start them alike, and "
            "wrap the module that holds it in DDP or FSDP"
        )


class GroupAnnouncer:
    """Announces over a CPU process group by one all-gather.

    Args:
        group: CPU process group that serves only this and, on gloo, the transfers.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.calls = 0

    def __call__(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks.

        Raises:
            RuntimeError: within the time limit of the group (and a second), if a rank does not
                take part; names what this rank waited for and who is missing.
        """
        self.calls += 1
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        everyone = torch.empty(self.group.size() * len(message), dtype=torch.uint8)
        try:
            with waiting_for(lambda: self._describe(message)):
                all_gather_single(everyone, mine, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(self._failure(message)) from error
        return [bytes(part.tolist()) for part in everyone.split(len(message))]

    def _failure(self, message: bytes) -> str:
        return (
            f"rank {self.group.rank()} of {self.group.size()} waited for "
            f"{self._describe(message)} and " + missing_ranks(self.group, f"exchange-{self.calls}")
        )

    def _describe(self, message: bytes) -> str:
        return (
            f"all ranks to say what they exchange [{_signature_of(message)}] (exchange "
            f"{self.calls} of this group)"
        )
