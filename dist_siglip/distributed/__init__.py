"""The world of a run, and how features reach other ranks. Imports torch only."""

from dist_siglip.distributed.collectives import (
    copy_from_first_rank,
    gather_rows,
    max_over_ranks,
    sum_over_ranks,
)
from dist_siglip.distributed.exchange import (
    Combine,
    Exchange,
    ExchangeName,
    circulate,
    prepare_exchange,
)
from dist_siglip.distributed.groups import resolve_group
from dist_siglip.distributed.ring import AccumulatorSpec
from dist_siglip.distributed.world import World, is_first_process

__all__ = [
    "AccumulatorSpec",
    "Combine",
    "Exchange",
    "ExchangeName",
    "World",
    "circulate",
    "copy_from_first_rank",
    "gather_rows",
    "is_first_process",
    "max_over_ranks",
    "prepare_exchange",
    "resolve_group",
    "sum_over_ranks",
]
