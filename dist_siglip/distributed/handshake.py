"""Handshake before an exchange: all ranks compare what they are about to send.

Point-to-point transfers trust the caller: a wrong shape or dtype hangs or delivers garbage. So
ranks agree first, over a CPU group. Fully: an all-gather of 512 bytes per rank with a readable
signature, the number of rows, the ranks per node, up to two shared numbers, and the speeds that
"auto" is to reckon with. Rows and ranks per node may differ between ranks; the signature may not,
the shared numbers hardly; the speeds of the first rank are taken.

What thousands of ranks have to say is the same at nearly every step. So each first says whether
anything of it changed here since the last time, with a hash of what it was, and the largest of the
answers goes around in log2(W) short messages of each rank. Only if somebody's changed, or hashes
differ, the full comparison follows. A number that a rank wants all others to know, a request to
stop, rides along.

After a failed collective ``missing_ranks`` finds who did not take part.
"""

import dataclasses
import hashlib
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from dist_siglip.distributed.combine import all_gather_single
from dist_siglip.distributed.speeds import Speeds
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
_MOST_SETTLED = 256  # signatures
_TAG = 1 << 16  # of messages that transfers over the same group do not use


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Numbers of every rank, in rank order; what follows from them is worked out once.

    Attributes:
        row_counts: rows of its shard.
        local_world_sizes: ranks of its node, 0 where it cannot tell.
        speeds: what the first rank knows of the machines.
    """

    row_counts: tuple[int, ...]
    local_world_sizes: tuple[int, ...]
    speeds: Speeds

    @cached_property
    def total_rows(self) -> int:
        """Rows of all ranks together."""
        return sum(self.row_counts)

    @cached_property
    def most_rows(self) -> int:
        """Most rows of a rank."""
        return max(self.row_counts)

    @cached_property
    def ranks_per_node(self) -> tuple[int, str]:
        """The ranks per node all ranks agree on, or 1 and what stands against it."""
        sizes, world_size = self.local_world_sizes, len(self.local_world_sizes)
        usual = Counter(sizes).most_common(1)[0][0]
        odd = [rank for rank, size in enumerate(sizes) if size != usual]
        if odd:
            return 1, (
                f"rank {odd[0]} counts {sizes[odd[0]]} ranks on its node and rank "
                f"{sizes.index(usual)} counts {usual}"
            )
        if usual == 0:
            return 1, (
                "the ranks of a node do not follow one another or nodes hold different numbers"
            )
        if world_size % usual:
            return 1, f"{world_size} ranks are not whole nodes of {usual}"
        return usual, ""


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


class GroupLink:
    """Carries a handshake over a CPU process group.

    Args:
        group: CPU process group that serves only this and, on gloo, the transfers.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.calls = 0

    def maximum(self, values: Sequence[float], signature: str) -> list[float]:
        """Return the largest of every rank's values, element by element.

        Each rank sends to the ones 1, 2, 4, ... further: log2(W) messages, and as many connections.

        Raises:
            RuntimeError: within the time limit of the group (and a second), if a rank does not
                take part; names what this rank waited for and who is missing.
        """
        self.calls += 1
        group, mine = self.group, torch.tensor(values, dtype=torch.float64)
        rank, world_size, theirs = group.rank(), group.size(), torch.empty_like(mine)
        try:
            with waiting_for(lambda: self._describe(signature)):
                for tag in range((world_size - 1).bit_length()):
                    step = 1 << tag
                    sent = group.send([mine], (rank + step) % world_size, _TAG + tag)
                    group.recv([theirs], (rank - step) % world_size, _TAG + tag).wait()
                    sent.wait()
                    torch.maximum(mine, theirs, out=mine)
        except RuntimeError as error:
            raise RuntimeError(self._failure(signature)) from error
        found: list[float] = mine.tolist()
        return found

    def announce(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks; as ``maximum``."""
        mine = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        everyone = torch.empty(self.group.size() * len(message), dtype=torch.uint8)
        signature = _signature_of(message)
        try:
            with waiting_for(lambda: self._describe(signature)):
                all_gather_single(everyone, mine, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(self._failure(signature)) from error
        whole, size = everyone.numpy().tobytes(), len(message)
        return [whole[start : start + size] for start in range(0, len(whole), size)]

    def _failure(self, signature: str) -> str:
        return (
            f"rank {self.group.rank()} of {self.group.size()} waited for "
            f"{self._describe(signature)} and "
            + missing_ranks(self.group, f"exchange-{self.calls}")
        )

    def _describe(self, signature: str) -> str:
        return (
            f"all ranks to say what they exchange [{signature[:_TEXT_BYTES]}] (exchange "
            f"{self.calls} of this group)"
        )


class _Settled(NamedTuple):
    """What was agreed on under a signature, and what this rank had said."""

    own: tuple[int, int, Speeds]
    agreement: Agreement
    tag: float


class Handshake:
    """Agrees with the other ranks of a group, briefly where nothing has changed.

    Args:
        maximum: returns the largest of every rank's values; see ``GroupLink``.
        announce: carries messages of the full comparison.

    Attributes:
        num_full: full comparisons so far.
        asked: number that this rank has all ranks told at the next handshake.
        heard: largest of what all ranks have asked since it was last taken; None if nothing was
            said.
    """

    def __init__(
        self, maximum: Callable[[Sequence[float], str], list[float]], announce: Announce
    ) -> None:
        self._maximum, self._announce = maximum, announce
        self._settled: dict[str, _Settled] = {}
        self.num_full = 0
        self.asked = 0
        self.heard: int | None = None

    def agree(
        self,
        num_rows: int,
        local_world_size: int,
        signature: str,
        shared: Mapping[str, float],
        speeds: Speeds,
    ) -> Agreement:
        """Compare with all ranks; arguments and errors are those of ``agree``."""
        own, known = (num_rows, local_world_size, speeds), self._settled.get(signature)
        has_changed = known is None or known.own != own
        tag = 0.0 if known is None else known.tag
        numbers = [value if math.isfinite(value) else -math.inf for value in shared.values()]
        opposites = [-value if math.isfinite(value) else -math.inf for value in shared.values()]
        rest = [-math.inf] * (_MOST_SHARED - len(numbers))
        said = self._maximum(
            [has_changed, self.asked, tag, -tag, *numbers, *rest, *opposites, *rest], signature
        )
        self.heard = max(self.heard or 0, int(said[1]))
        largest, smallest = said[4 : 4 + _MOST_SHARED], said[4 + _MOST_SHARED :]
        is_close = all(
            high == -math.inf or _is_close(high, -low)
            for high, low in zip(largest, smallest, strict=True)
        )
        if known is not None and not said[0] and said[2] == -said[3] and is_close:
            return known.agreement
        agreement = agree(num_rows, local_world_size, signature, self._announce, shared, speeds)
        self.num_full += 1
        if len(self._settled) >= _MOST_SETTLED:
            self._settled.clear()
        self._settled[signature] = _Settled(own, agreement, _tag_of(signature, self.num_full))
        return agreement

    def take_heard(self) -> int | None:
        """Return ``heard``, and begin anew."""
        heard, self.heard = self.heard, None
        return heard


def _tag_of(signature: str, number: int) -> float:
    """Hash what was agreed on to a whole number that a float64 holds."""
    digest = hashlib.blake2b(f"{number} {signature}".encode(), digest_size=6)
    return float(int.from_bytes(digest.digest(), "little") + 1)
