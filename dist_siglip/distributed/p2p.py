"""Point-to-point transfers between ranks of one group, started together and waited for together.

Safe on NCCL and gloo alike: the group serves nothing else, ranks count inside it, both ends post
in the same order, all transfers of a step are one batch (so that both directions of a link work
at once), and the result of ``batch_isend_irecv`` is a list of any length. Buffers stay alive
until ``wait``, which orders the current stream on CUDA; a buffer may then be reused on it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
        what: names the content in an error.
    """

    peer: int
    tensors: tuple[Tensor, ...]
    tag: int
    what: str


class PendingBatch(NamedTuple):
    """Transfers that were started and not yet waited for."""

    works: tuple[Work, ...] = ()
    outgoing: tuple[Message, ...] = ()
    arriving: tuple[Message, ...] = ()


class P2PChannel:
    """Send and receive messages within ``group``, which must serve nothing else."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def post(self, outgoing: Iterable[Message], arriving: Iterable[Message]) -> PendingBatch:
        """Start all transfers of a step as one batch.

        Raises:
            RuntimeError: if a peer is gone; names what was to be sent to and received from whom.
        """
        batch = PendingBatch((), tuple(outgoing), tuple(arriving))
        operations = [
            # `group_peer`, not `peer`: ranks here count inside the group.
            dist.P2POp(function, tensor, group=self.group, tag=message.tag, group_peer=message.peer)
            for function, messages in ((dist.isend, batch.outgoing), (dist.irecv, batch.arriving))
            for message in messages
            for tensor in message.tensors
            if tensor.numel()
        ]
        if not operations:
            return batch
        try:
            return batch._replace(works=tuple(dist.batch_isend_irecv(operations)))
        except RuntimeError as error:
            raise RuntimeError(self._failure(batch)) from error

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
            return ", ".join(f"{p.what} {preposition} rank {p.peer}" for p in messages) or "nothing"

        return f"{listed(batch.arriving, 'from')} while sending {listed(batch.outgoing, 'to')}"
