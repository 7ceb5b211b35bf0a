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


class Parcel(NamedTuple):
    """Tensors that go to, or come from, one rank.

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


class Posted(NamedTuple):
    """Transfers under way."""

    works: tuple[Work, ...] = ()
    outgoing: tuple[Parcel, ...] = ()
    arriving: tuple[Parcel, ...] = ()


class Mail:
    """Sends and receives parcels within ``group``, which must serve nothing else."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def post(self, outgoing: Iterable[Parcel], arriving: Iterable[Parcel]) -> Posted:
        """Start all transfers of a step as one batch.

        Raises:
            RuntimeError: if a peer is gone; names what was to be sent to and received from whom.
        """
        posted = Posted((), tuple(outgoing), tuple(arriving))
        operations = [
            # `group_peer`, not `peer`: ranks here count inside the group.
            dist.P2POp(function, tensor, group=self.group, tag=parcel.tag, group_peer=parcel.peer)
            for function, parcels in ((dist.isend, posted.outgoing), (dist.irecv, posted.arriving))
            for parcel in parcels
            for tensor in parcel.tensors
            if tensor.numel()
        ]
        if not operations:
            return posted
        try:
            return posted._replace(works=tuple(dist.batch_isend_irecv(operations)))
        except RuntimeError as error:
            raise RuntimeError(self._complaint(posted)) from error

    def wait(self, posted: Posted) -> None:
        """Wait for a batch.

        Raises:
            RuntimeError: within the time limit of the group, if a peer does not answer; names
                what this rank waited for.
        """
        try:
            with waiting_for(lambda: self._describe(posted)):
                for work in posted.works:
                    work.wait()
        except RuntimeError as error:
            raise RuntimeError(self._complaint(posted)) from error

    def _complaint(self, posted: Posted) -> str:
        return (
            f"rank {self.group.rank()} of {self.group.size()} waited for {self._describe(posted)}, "
            "and the transfer failed: one of these ranks ended, raised, or makes another call; "
            "look at its log"
        )

    def _describe(self, posted: Posted) -> str:
        def listed(parcels: Sequence[Parcel], preposition: str) -> str:
            return ", ".join(f"{p.what} {preposition} rank {p.peer}" for p in parcels) or "nothing"

        return f"{listed(posted.arriving, 'from')} while sending {listed(posted.outgoing, 'to')}"
