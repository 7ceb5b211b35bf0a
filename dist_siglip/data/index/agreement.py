"""Does every rank see the same data?"""

import torch
from torch.distributed import ProcessGroup

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError


def check_ranks_agree(
    table: PairTable, *, name: str, device: torch.device, group: ProcessGroup | None = None
) -> None:
    """Refuse to start if a rank (a node with its own copy, say) sees other shards than rank 0.

    Every rank must call it; one small all-gather. Without a process group there is nothing to
    compare.

    Args:
        table: what this rank sees.
        name: the setting the shards came from, for the error text.
        device: where the process group communicates.
        group: ranks to compare.

    Raises:
        UserError: on every rank, naming the first rank that differs.
    """
    mine = torch.tensor([[table.num_samples, int(table.fingerprint, 16) >> 1]], device=device)
    rows = gather_rows(mine, group).tolist()
    for rank, row in enumerate(rows):
        if row != rows[0]:
            raise UserError(
                f"{name} differ between ranks: rank 0 sees {rows[0][0]} samples, rank {rank} sees "
                f"{row[0]} (or other bytes); give every node the same shards"
            )
