"""The ranks of a run, and the exchange of features between them. Imports torch only."""

from dist_siglip.distributed.collectives import (
    copy_from_first_rank,
    fetch_rows,
    gather_rows,
    max_over_ranks,
    sum_over_ranks,
)
from dist_siglip.distributed.combine import Combine
from dist_siglip.distributed.exchange import (
    Exchange,
    ExchangeName,
    agree_once,
    circulate,
    prepare_exchange,
)
from dist_siglip.distributed.groups import (
    ask_all_ranks,
    connect_ranks,
    control_group,
    exchange_group,
    heard_from_ranks,
    leave_process_groups,
    new_cpu_group,
    resolve_group,
)
from dist_siglip.distributed.ring import AccumulatorSpec
from dist_siglip.distributed.world import (
    World,
    group_from_mesh,
    is_first_process,
    set_local_world_size,
)

__all__ = [
    "AccumulatorSpec",
    "Combine",
    "Exchange",
    "ExchangeName",
    "World",
    "agree_once",
    "ask_all_ranks",
    "circulate",
    "connect_ranks",
    "control_group",
    "copy_from_first_rank",
    "exchange_group",
    "fetch_rows",
    "gather_rows",
    "group_from_mesh",
    "heard_from_ranks",
    "is_first_process",
    "leave_process_groups",
    "max_over_ranks",
    "new_cpu_group",
    "prepare_exchange",
    "resolve_group",
    "set_local_world_size",
    "sum_over_ranks",
]
