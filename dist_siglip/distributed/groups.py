"""Process groups of the exchanges: companions of a group, and how a process leaves them.

Feature exchange must not queue behind DDP's gradient buckets, and agreeing on shapes must not
wait for a GPU. So each group that exchanges features gets two companions over the same ranks,
made on first use by those ranks alone: one of the same backend for the transfers, and one on
the CPU (gloo) for the agreement.

Leaving: gloo's threads hand tensors back under the interpreter lock. A thread that waits for it
while Python shuts down is unwound and takes the process with it (SIGABRT, "terminate called without
an active exception"). A group ends its threads when its last reference goes; a caught exception can
hold that reference in a cycle, through its traceback.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from dist_siglip.distributed.handshake import Announce, GroupAnnouncer, missing_ranks
from dist_siglip.distributed.p2p import P2PChannel
from dist_siglip.distributed.ring import Visitor
from dist_siglip.distributed.waiting import waiting_for


def leave_process_groups() -> None:
    """End every process group of this process and their threads, once the work is done.

    Distributed contract: no collective for gloo; every rank calls it after its last exchange.
    Without a group it does nothing.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Companions:
    """What serves one parent group; everything an exchange says to other ranks goes through it.

    Attributes:
        transfer: same ranks and backend as the parent; carries features and accumulators.
        channel: point-to-point transfers over ``transfer``.
        announce: carries a few bytes per call between CPUs, over gloo.
        limit_visits: wraps the visitor of every exchange; only a simulation has one.
        compared: uses whose shared numbers were read from a device, see ``read_numbers``.
    """

    transfer: ProcessGroup
    channel: P2PChannel
    announce: Announce
    limit_visits: Callable[[Visitor], Visitor] | None = None
    compared: set[str] = field(default_factory=set)


# Keyed by the parent's identity: a group that is destroyed takes its companions along.
_companions: "WeakKeyDictionary[ProcessGroup, Companions]" = WeakKeyDictionary()


def resolve_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """Return ``group``, the default group, or None in a world of one without any group."""
    if group is not None:
        return group
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return None


def companions_of(group: ProcessGroup) -> Companions:
    """Return the companions, making them on first use (collective over ``group``).

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not take part.
    """
    found = _companions.get(group)
    if found is None:
        ranks = dist.get_process_group_ranks(group)
        backend = dist.get_backend(group)
        timeout = _timeout_of(group)
        try:
            with waiting_for(lambda: "all ranks to connect for their first exchange"):
                transfer = _new_group(ranks, backend, timeout)
                control = transfer if backend == "gloo" else _new_group(ranks, "gloo", timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {group.rank()} of {group.size()} waited for all ranks to connect for their "
                f"first exchange and {missing_ranks(group, 'first-exchange')}"
            ) from error
        if backend == "nccl":
            # The first point-to-point batch of a communicator needs every rank; one without
            # rows would post none.
            dist.all_reduce(torch.zeros(1, device="cuda"), group=transfer)
        found = Companions(transfer, P2PChannel(transfer), GroupAnnouncer(control))
        _companions[group] = found
    return found


def new_cpu_group() -> ProcessGroup | None:
    """Make a gloo group of all ranks, with the time limit of the default group (collective).

    For a few bytes between hosts that must wait for no GPU. None without a process group.
    """
    world = resolve_group(None)
    if world is None:
        return None
    made = dist.new_group(backend="gloo", timeout=_timeout_of(world))
    assert isinstance(made, ProcessGroup)  # every rank is in it
    return made


def set_companions(group: ProcessGroup, companions: Companions) -> None:
    """Serve ``group`` by other companions than the usual ones (for ``simulate``)."""
    _companions[group] = companions


def _new_group(ranks: list[int], backend: str, timeout: timedelta | None) -> ProcessGroup:
    made = dist.new_group(ranks, backend=backend, timeout=timeout, use_local_synchronization=True)
    assert isinstance(made, ProcessGroup)  # a member never gets the non-member marker
    return made


def _timeout_of(group: ProcessGroup) -> timedelta | None:
    """Time limit of the parent, so that its companions give up no later than it does."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)
