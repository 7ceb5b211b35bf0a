"""Every rank says what it is about to send, and all hear it, before anything is sent.

Point-to-point transfers trust the caller: a wrong shape or dtype hangs or delivers garbage. So
each exchange begins with one all-gather of 256 bytes per rank over a CPU group: a readable
signature, the number of rows and the ranks per node. The numbers may differ between ranks; the
signature may not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.distributed.renamed import all_gather_single
from dist_siglip.distributed.roll_call import name_missing
from dist_siglip.distributed.waiting import waiting_for
from dist_siglip.errors import UserError

# Tells every rank one message and returns the messages of all ranks, in rank order.
Announce = Callable[[bytes], list[bytes]]

_MESSAGE_BYTES = 256
_NUMBER_BYTES = 8
_TEXT_BYTES = _MESSAGE_BYTES - 2 * _NUMBER_BYTES


class Agreement(NamedTuple):
    """What every rank said, in rank order.

    Attributes:
        row_counts: rows of its shard.
        local_world_sizes: ranks of its node, 0 where it cannot tell.
    """

    row_counts: tuple[int, ...]
    local_world_sizes: tuple[int, ...]


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


def agree(num_rows: int, local_world_size: int, signature: str, announce: Announce) -> Agreement:
    """Compare signatures over all ranks and return every rank's numbers.

    Distributed contract: one all-gather of 256 bytes per rank. Every rank gets the same answer,
    so either all go on or all raise.

    Args:
        num_rows: rows this rank is about to send.
        local_world_size: ranks of this rank's node as far as it knows.
        signature: what must be equal on all ranks, readable; cut at 240 bytes.
        announce: carries the messages.

    Raises:
        UserError: if signatures differ; names the ranks that differ from the majority.

    Example:
        >>> agree(3, 1, "float32 (*, 8)", lambda message: [message, message])
        Agreement(row_counts=(3, 3), local_world_sizes=(1, 1))
    """
    numbers = b"".join(n.to_bytes(_NUMBER_BYTES, "little") for n in (num_rows, local_world_size))
    text = signature.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    messages = announce(numbers + text)
    signatures = [m[2 * _NUMBER_BYTES :].rstrip(b"\0").decode(errors="replace") for m in messages]
    usual, _ = Counter(signatures).most_common(1)[0]
    odd = [rank for rank, value in enumerate(signatures) if value != usual]
    if odd:
        raise UserError(
            f"rank {', '.join(map(str, odd))} passes [{signatures[odd[0]]}] but rank "
            f"{signatures.index(usual)} passes [{usual}]; only the number of rows may differ "
            "between ranks"
        )
    return Agreement(
        tuple(int.from_bytes(m[:_NUMBER_BYTES], "little") for m in messages),
        tuple(int.from_bytes(m[_NUMBER_BYTES : 2 * _NUMBER_BYTES], "little") for m in messages),
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
            raise RuntimeError(self._complaint(message)) from error
        return [bytes(part.tolist()) for part in everyone.split(len(message))]

    def _complaint(self, message: bytes) -> str:
        return (
            f"rank {self.group.rank()} of {self.group.size()} waited for "
            f"{self._describe(message)} and " + name_missing(self.group, f"exchange-{self.calls}")
        )

    def _describe(self, message: bytes) -> str:
        signature = message[2 * _NUMBER_BYTES :].rstrip(b"\0").decode(errors="replace")
        return (
            f"all ranks to say what they exchange [{signature}] (exchange {self.calls} of this "
            "group)"
        )
