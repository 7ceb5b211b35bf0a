"""Process groups of the exchanges: companions of a group, and how a process leaves them.

Feature exchange must not queue behind DDP's gradient buckets, and agreeing on shapes must not
wait for a GPU. So each group that exchanges features gets companions over the same ranks: one with
the backend of the features' device for the transfers, over several nodes a second one for those
between nodes, and one on the CPU (gloo) to agree.

NCCL splits a communicator only while nothing is under way on it, and with a device bound to the
default group torch splits that one, with all of its ranks. So a run makes its companions in
``connect_ranks`` before training; those of a script of one's own are made on first use.

Leaving: gloo's threads hand tensors back under the interpreter lock. A thread that waits for it
while Python shuts down is unwound and takes the process with it (SIGABRT, "terminate called without
an active exception"). A group ends its threads when its last reference goes; a caught exception can
hold that reference in a cycle, through its traceback.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from dist_siglip.distributed.handshake import GroupLink, Handshake, missing_ranks
from dist_siglip.distributed.p2p import P2PChannel
from dist_siglip.distributed.ring import Visitor
from dist_siglip.distributed.speeds import Speeds, known_speeds
from dist_siglip.distributed.waiting import waiting_for
from dist_siglip.errors import UserError

# Read by gloo when a group is made: connect two ranks when they have something to say, not each
# with every other one.
_LAZY = "TORCH_GLOO_LAZY_INIT"


def leave_process_groups() -> None:
    """End every process group of this process and their threads, once the work is done.

    Distributed contract: no collective for gloo; every rank calls it after its last exchange.
    Without a group it does nothing.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Control:
    """What the ranks of a group say to each other beside features, on the CPU.

    Attributes:
        handshake: compares what is exchanged, between CPUs, over gloo.
        group: the group it runs over; None in a simulation.
        compared: uses whose shared numbers were read from a device, see ``read_numbers``.
        speeds: of this machine by kind of device, as far as they were asked for.
    """

    handshake: Handshake
    group: ProcessGroup | None = None
    compared: set[str] = field(default_factory=set)
    speeds: dict[str, Speeds] = field(default_factory=dict)

    def speeds_of(self, device: torch.device) -> Speeds:
        """Return what this rank knows of the machines, read once."""
        if device.type not in self.speeds:
            self.speeds[device.type] = known_speeds(device.type)
        return self.speeds[device.type]


@dataclass(frozen=True)
class Transfers:
    """What carries features of one kind of device.

    Attributes:
        group: same ranks as the parent; carries features and accumulators.
        channel: point-to-point transfers over ``group``.
        crossing: those between nodes, which must not queue behind those inside of a node.
        limit_visits: wraps the visitor of every exchange; only a simulation has one.
    """

    group: ProcessGroup
    channel: P2PChannel
    crossing: P2PChannel
    limit_visits: Callable[[Visitor], Visitor] | None = None


# Keyed by the parent's identity: a group that is destroyed takes its companions along.
_controls: "WeakKeyDictionary[ProcessGroup, Control]" = WeakKeyDictionary()
_transfers: "WeakKeyDictionary[ProcessGroup, dict[str, Transfers]]" = WeakKeyDictionary()


def resolve_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """Return ``group``, the default group, or None in a world of one without any group."""
    if group is not None:
        return group
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return None


def connect_ranks(
    device: torch.device, group: ProcessGroup | None = None, *, across_nodes: bool = False
) -> None:
    """Make the companions of a group now, and not at its first exchange.

    Distributed contract: collective over ``group``, with nothing under way on any communicator.
    Without a process group, or in a group of one, it does nothing.

    Args:
        device: where features will be.
        group: process group; the default group if None.
        across_nodes: whether its ranks are on several nodes.

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not take part.
    """
    group = resolve_group(group)
    if group is None or group.size() == 1:
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    control_of(group)
    transfers_of(group, device, across_nodes=across_nodes)


def exchange_group(ranks: Sequence[int]) -> ProcessGroup | None:
    """Make a group of some ranks that exchanges features among themselves.

    Distributed contract: the ranks of the group call it; where torch has bound the default group
    to a device (Lightning does), every rank of the run: the communicator of all is split.

    Args:
        ranks: global ranks.

    Returns:
        The group; None on ranks outside of it.

    Raises:
        UserError: without a process group.
        RuntimeError: within the time limit of the group, if a rank does not take part.
    """
    world = dist.group.WORLD
    if world is None:
        raise UserError(f"ranks {list(ranks)} need a process group; initialise it first")
    made = dist.new_group(
        list(ranks), timeout=_timeout_of(world), use_local_synchronization=_bound_device() is None
    )
    device = _bound_device()
    parent = made if isinstance(made, ProcessGroup) else None
    if device is not None:
        transfer = _new_device_group(ranks, world, device)
        if parent is not None and transfer is not None:
            _warm_up(transfer, device)
            channel = P2PChannel(transfer)
            _transfers[parent] = {device.type: Transfers(transfer, channel, channel)}
    if parent is not None and parent.size() > 1:
        control_of(parent)
    return parent


def control_of(group: ProcessGroup) -> Control:
    """Return what ``group`` agrees over, making it on first use (collective over ``group``).

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not take part.
    """
    found = _controls.get(group)
    if found is None:
        config = dist.get_backend_config(group)
        has_devices = any(part.rpartition(":")[2] != "gloo" for part in config.split(","))
        with _connecting(group):
            # Of one that carries transfers as well each rank needs all others; and gloo never
            # ends a group that has connected on demand while a transfer is under way.
            made = _new_cpu_group(group, connects_on_demand=has_devices)
        link = GroupLink(made)
        found = _controls[group] = Control(Handshake(link.maximum, link.announce), made)
    return found


def transfers_of(
    group: ProcessGroup, device: torch.device, *, across_nodes: bool = False
) -> Transfers:
    """Return what carries features on ``device``, making it on first use (collective).

    Args:
        group: process group of at least two ranks.
        device: of the features.
        across_nodes: whether to make a channel of its own for what crosses between nodes.

    Raises:
        RuntimeError: within the time limit of the group, if a rank does not take part.
        UserError: if ``group`` is a part of a world whose communicators are split by all ranks.
    """
    by_device = _transfers.setdefault(group, {})
    found = by_device.get(device.type) or by_device.get("any")
    if found is not None:
        return found
    if device.type == "cpu":
        # Gloo lets a message pass one that was posted before it: one channel is enough.
        made = control_of(group).group or group
        channel = P2PChannel(made)
        found = Transfers(made, channel, channel)
    else:
        channels = [P2PChannel(_connect(group, device)) for _ in range(2 if across_nodes else 1)]
        found = Transfers(channels[0].group, channels[0], channels[-1])
    by_device[device.type] = found
    return found


def new_cpu_group() -> ProcessGroup | None:
    """Make a gloo group of all ranks, with the time limit of the default group (collective).

    For a thread of its own, whose collectives mix with no others; what the main thread has to say
    goes through ``control_of``. None without a process group.
    """
    world = resolve_group(None)
    return None if world is None else _new_cpu_group(world)


def control_group() -> ProcessGroup | None:
    """Return the gloo group over which all ranks agree, which collectives of the main thread share.

    Distributed contract: collective at its first call. None without several ranks.
    """
    world = resolve_group(None)
    return None if world is None or world.size() == 1 else control_of(world).group


def ask_all_ranks(number: int) -> None:
    """Have the next exchanges of the default group tell all ranks a number, 0 for nothing.

    The largest of all ranks' numbers is heard by ``heard_from_ranks``.
    """
    world = resolve_group(None)
    if world is not None and world.size() > 1:
        control_of(world).handshake.asked = number


def heard_from_ranks() -> int | None:
    """Return the largest number that any rank asked since this was last called.

    Returns:
        The same on all ranks; None if nothing was exchanged since.
    """
    world = resolve_group(None)
    control = None if world is None else _controls.get(world)
    return None if control is None else control.handshake.take_heard()


def set_companions(group: ProcessGroup, control: Control, transfers: Transfers) -> None:
    """Serve ``group`` by other companions than the usual ones (for ``simulate``)."""
    _controls[group] = control
    _transfers[group] = {"any": transfers}


def backend_of(group: ProcessGroup, device: torch.device) -> str:
    """Return the name of the backend that carries tensors of a device in ``group``."""
    return read_backends(dist.get_backend_config(group), device.type)


def read_backends(config: str, device_type: str) -> str:
    """Return the backend of a kind of device in a configuration such as torch keeps.

    Example:
        >>> read_backends("cpu:gloo,cuda:nccl", "cuda"), read_backends("gloo", "cuda")
        ('nccl', 'gloo')
    """
    for part in config.split(","):
        device, separator, backend = part.partition(":")
        if not separator or device == device_type:
            return backend or device
    raise UserError(
        f"process group ({config}) has no backend for features on {device_type}; initialise it "
        f"with one, for instance cpu:gloo,{device_type}:nccl"
    )


def _connect(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Make another communicator over the ranks of ``group``."""
    world, ranks = dist.group.WORLD, dist.get_process_group_ranks(group)
    if _bound_device() is not None and world is not None and group.size() < world.size():
        raise UserError(
            f"the group of ranks {ranks[:8]} has no way to send features, and torch makes one "
            "with all ranks; make the group by dist_siglip.distributed.exchange_group, which every "
            "rank calls before training"
        )
    with _connecting(group):
        made = _new_device_group(ranks, group, device)
        assert made is not None  # a member never gets the non-member marker
        _warm_up(made, device)
    return made


def _new_device_group(
    ranks: Sequence[int], parent: ProcessGroup, device: torch.device
) -> ProcessGroup | None:
    """Make a communicator for transfers; where a device is bound, all ranks of the run call it."""
    backend, timeout = backend_of(parent, device), _timeout_of(parent)
    options: Any = None
    if backend.startswith("nccl"):
        # The kernels of the towers fill the GPU: those that move features go first.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if timeout is not None:
            options._timeout = timeout
    made = dist.new_group(
        list(ranks),
        backend=backend,
        timeout=timeout,
        pg_options=options,
        use_local_synchronization=_bound_device() is None,
    )
    return made if isinstance(made, ProcessGroup) else None


def _bound_device() -> torch.device | None:
    """Return the device for which torch splits the default group to make others, if any."""
    return getattr(dist.group.WORLD, "bound_device_id", None)


def _warm_up(group: ProcessGroup, device: torch.device) -> None:
    """Connect all ranks: the first batch of transfers needs every one, and some may post none."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)


def _new_cpu_group(parent: ProcessGroup, *, connects_on_demand: bool = True) -> ProcessGroup:
    with _lazy_connections() if connects_on_demand else nullcontext():
        made = dist.new_group(
            dist.get_process_group_ranks(parent),
            backend="gloo",
            timeout=_timeout_of(parent),
            # Members only: no communicator of a device is split for it.
            use_local_synchronization=True,
        )
    assert isinstance(made, ProcessGroup)  # a member never gets the non-member marker
    return made


@contextmanager
def _lazy_connections() -> Iterator[None]:
    """Have gloo connect two ranks at their first message: thousands cannot all be connected."""
    before = os.environ.get(_LAZY)
    os.environ[_LAZY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LAZY]
        else:
            os.environ[_LAZY] = before


@contextmanager
def _connecting(group: ProcessGroup) -> Iterator[None]:
    """Say which ranks are missing if a group cannot be made."""
    try:
        with waiting_for(lambda: "all ranks to connect for their first exchange"):
            yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {group.rank()} of {group.size()} waited for all ranks to connect for their "
            f"first exchange and {missing_ranks(group, 'first-exchange')}"
        ) from error


def _timeout_of(group: ProcessGroup) -> timedelta | None:
    """Time limit of the parent, so that its companions give up no later than it does."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None
