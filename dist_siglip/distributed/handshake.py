"""Every rank says what it is about to send, and all hear it, before anything is sent.

Point-to-point transfers trust the caller: a wrong shape or dtype hangs or delivers garbage. So
each exchange begins with one all-gather of 256 bytes per rank over a CPU group: a readable
signature and the number of rows. Row counts may differ between ranks; nothing else may.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.errors import UserError

_MESSAGE_BYTES = 256
_ROWS_BYTES = 8


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


def agree_on_rows(num_rows: int, signature: str, control: ProcessGroup) -> tuple[int, ...]:
    """Compare signatures over all ranks and return every rank's number of rows.

    Distributed contract: one all-gather of 256 bytes per rank on ``control``. Every rank gets
    the same answer, so either all go on or all raise.

    Args:
        num_rows: rows this rank is about to send.
        signature: what must be equal on all ranks, readable; cut at 248 bytes.
        control: CPU process group.

    Raises:
        UserError: if signatures differ; names the ranks that differ from the majority.
    """
    text = signature.encode()[: _MESSAGE_BYTES - _ROWS_BYTES]
    message = num_rows.to_bytes(_ROWS_BYTES, "little") + text.ljust(
        _MESSAGE_BYTES - _ROWS_BYTES, b"\0"
    )
    mine = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    world_size = dist.get_world_size(control)
    everyone = torch.empty(world_size * _MESSAGE_BYTES, dtype=torch.uint8)
    dist.all_gather_into_tensor(everyone, mine, group=control)
    messages = [bytes(part.tolist()) for part in everyone.split(_MESSAGE_BYTES)]
    signatures = [part[_ROWS_BYTES:].rstrip(b"\0").decode(errors="replace") for part in messages]
    usual, _ = Counter(signatures).most_common(1)[0]
    odd = [rank for rank, value in enumerate(signatures) if value != usual]
    if odd:
        raise UserError(
            f"rank {', '.join(map(str, odd))} passes [{signatures[odd[0]]}] but rank "
            f"{signatures.index(usual)} passes [{usual}]; only the number of rows may differ "
            "between ranks"
        )
    return tuple(int.from_bytes(part[:_ROWS_BYTES], "little") for part in messages)
