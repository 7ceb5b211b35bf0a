"""What each of two ranks does in the data tests; one pair of processes serves them all."""

import torch

from dist_siglip.data.index.pairs import build_pair_table, check_ranks_agree
from dist_siglip.data.samples.bad_samples import BadSampleLimit
from dist_siglip.errors import UserError

CPU = torch.device("cpu")


def compare_and_count(rank, world_size, same, other):
    """Messages of: equal shards; other shards on rank 1; too many bad samples on rank 1."""
    return {
        "equal": _compare(same),
        "unequal": _compare(other if rank == 1 else same),
        "bad": _count_bad(rank),
    }


def _compare(shards):
    table = build_pair_table(shards, image_extensions=("png",))
    return _message(lambda: check_ranks_agree(table, name="train_shards", device=CPU))


def _count_bad(rank):
    limit = BadSampleLimit(0.1, check_steps=2)
    limit.count(5 if rank == 1 else 0)
    return [_message(lambda: limit.finish_step(10, CPU)) for _ in range(3)]


def _message(call):
    """The text of the user error that a call raises, or "fine"."""
    try:
        call()
    except UserError as error:
        return str(error)
    return "fine"
