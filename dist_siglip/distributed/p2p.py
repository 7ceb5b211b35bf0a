"""Point-to-point transfers between ranks of one group, started together and waited for together.

Safe on NCCL and gloo alike: the group serves nothing else, ranks count inside it, both ends post
in the same order, all transfers of a step are one batch (so that both directions of a link work
at once), and the result of ``batch_isend_irecv`` is a list of any length. Buffers stay alive
until ``wait``, which orders the current stream on CUDA; a buffer may then be reused on it.
A backend that cannot launch a batch as one, gloo, is given its transfers directly: the checks of
``batch_isend_irecv`` cost more than all else that a hop does in Python.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from dist_siglip.distributed.waiting import waiting_for


class Message(NamedTuple):
    """Tensors for, or from, one rank.

    Attributes:
        peer: the other rank, counted inside the group.
        tensors: contiguous tensors; empty ones are not sent, which both ends know.
        tag: keeps streams of messages between the same two ranks apart on gloo. NCCL, which
            ignores tags, matches them by the order of posting.
        what: names the content in an error, together with ``owner``.
        owner: rank whose rows they are.
    """

    peer: int
    tensors: tuple[Tensor, ...]
    tag: int
    what: str
    owner: int


class PendingBatch(NamedTuple):
    """Transfers that were started and not yet waited for."""

    works: tuple[Work, ...] = ()
    outgoing: tuple[Message, ...] = ()
    arriving: tuple[Message, ...] = ()


class P2PChannel:
    """Send and receive messages within ``group``, which must serve nothing else."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._as_one: dict[torch.device, bool] = {}

    def post(self, outgoing: Sequence[Message], arriving: Sequence[Message]) -> PendingBatch:
        """Start all transfers of a step as one batch.

        Raises:
            RuntimeError: if a peer is gone; names what was to be sent to and received from whom.
        """
        batch = PendingBatch((), tuple(outgoing), tuple(arriving))
        device = next((m.tensors[0].device for m in batch.outgoing + batch.arriving), None)
        if device is None:
            return batch
        start = self._start_as_one if self._launches_batches(device) else self._start
        try:
            return PendingBatch(tuple(start(batch)), batch.outgoing, batch.arriving)
        except RuntimeError as error:
            raise RuntimeError(self._failure(batch)) from error

    def _launches_batches(self, device: torch.device) -> bool:
        """Whether the backend launches the transfers of a batch together, as NCCL must."""
        if device not in self._as_one:
            backend = self.group._get_backend(device)
            self._as_one[device] = bool(getattr(backend, "supports_coalescing", False))
        return self._as_one[device]

    def _start(self, batch: PendingBatch) -> list[Work]:
        return [
            function([tensor], message.peer, message.tag)
            for function, messages in (
                (self.group.send, batch.outgoing),
                (self.group.recv, batch.arriving),
            )
            for message in messages
            for tensor in message.tensors
            if tensor.numel()
        ]

    def _start_as_one(self, batch: PendingBatch) -> list[Work]:
        operations = [
            # `group_peer`, not `peer`: ranks here count inside the group.
            dist.P2POp(function, tensor, group=self.group, tag=message.tag, group_peer=message.peer)
            for function, messages in ((dist.isend, batch.outgoing), (dist.irecv, batch.arriving))
            for message in messages
            for tensor in message.tensors
            if tensor.numel()
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    def wait(self, batch: PendingBatch) -> None:
        """Wait for a batch.

        Raises:
            RuntimeError: within the time limit of the group, if a peer does not answer; names
                what this rank waited for.
        """
        try:
            with waiting_for(lambda: self._describe(batch)):
                for work in batch.works:
                    work.wait()
        except RuntimeError as error:
            raise RuntimeError(self._failure(batch)) from error

    def _failure(self, batch: PendingBatch) -> str:
        return (
            f"rank {self.group.rank()} of {self.group.size()} waited for {self._describe(batch)}, "
            "and the transfer failed: one of these ranks ended, raised, or makes another call; "
            "look at its log"
        )

    def _describe(self, batch: PendingBatch) -> str:
        def listed(messages: Sequence[Message], preposition: str) -> str:
            return (
                ", ".join(f"{p.what} {p.owner} {preposition} rank {p.peer}" for p in messages)
                or "nothing"
            )

        return f"{listed(batch.arriving, 'from')} while sending {listed(batch.outgoing, 'to')}"
