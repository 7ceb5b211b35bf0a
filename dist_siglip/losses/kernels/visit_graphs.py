"""Replay of visits as CUDA graphs, where the addresses and shapes of a visit repeat.

A visit of a small shard is bound by its launches. Which work it is follows from the settings of the
pass and from the tensors it touches. Once the same work at the same addresses has been done in a
few passes, which compile and warm up whatever needs it, it is captured and from then on launched as
one. Nothing is copied, and what lies at an address may change: a replay that finds one address
moved, one shape or setting changed is none, and the visit is made as usual. So the numbers never
depend on whether addresses repeat, only the time does.

Only visits of other ranks' shards: the own one, of which there is one in a pass, has a diagonal and
begins the gradients. Only where Triton computes the terms: torch.compile may compile again at any
call, and ``kernel="eager"`` or ``"compiled"`` so is the way to do without graphs. Never under
anomaly detection, nor inside of somebody else's capture.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Passes in which a visit is made as usual before it is captured.
WARM_UP_PASSES = 3
# Graphs that are kept, and visits whose passes are counted.
MOST_GRAPHS = 32
MOST_COUNTED = 256
# Passes without a replay after which a graph may give way to another. A capture waits for the
# device and empties its caches: graphs that are in use must not drive out each other.
IDLE_PASSES = 100

Replay = Callable[[], None]


class VisitGraphs:
    """Graphs of one device.

    Args:
        capture: returns what repeats the work of a function, without doing it.
    """

    def __init__(self, capture: Callable[[Callable[[], None]], Replay]) -> None:
        self._capture = capture
        self._passes: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()
        self._replays: OrderedDict[Hashable, tuple[Replay, int]] = OrderedDict()
        self._has_failed = False

    def visit(self, key: Hashable, number: int, work: Callable[[], None]) -> None:
        """Do the work: by its graph if there is one.

        Args:
            key: equal for equal work at equal addresses.
            number: of the pass.
            work: launches on the current stream and nothing else.
        """
        replay = self._replays.pop(key, (None, 0))[0]
        if replay is None and self._is_warm(key, number) and self._has_room(number):
            replay = self._captured(work)
        if replay is None:
            work()
            return
        self._replays[key] = replay, number
        replay()

    def _is_warm(self, key: Hashable, number: int) -> bool:
        count, last = self._passes.pop(key, (0, -1))
        if last != number:
            count += 1
        self._passes[key] = (count, number)
        if len(self._passes) > MOST_COUNTED:
            self._passes.popitem(last=False)
        return count > WARM_UP_PASSES and not self._has_failed

    def _has_room(self, number: int) -> bool:
        """Whether a graph more may be kept; drops the one that has idled longest, if it has."""
        if len(self._replays) < MOST_GRAPHS:
            return True
        longest, (_, last) = next(iter(self._replays.items()))
        is_idle = number - last > IDLE_PASSES
        if is_idle:
            del self._replays[longest]
        return is_idle

    def _captured(self, work: Callable[[], None]) -> Replay | None:
        try:
            return self._capture(work)
        except RuntimeError as error:
            self._has_failed = True
            logger.warning(
                "visits are not replayed as CUDA graphs: %s", (str(error).splitlines() or [""])[0]
            )
            return None


def graphs_for(device: torch.device) -> VisitGraphs | None:
    """Return the graphs of a device; None where visits are made as usual."""
    if device.type != "cuda" or torch.is_anomaly_enabled():
        return None
    return None if torch.cuda.is_current_stream_capturing() else _graphs_of(device)


@lru_cache
def _graphs_of(device: torch.device) -> VisitGraphs:
    return VisitGraphs(_capture_on_gpu)


def _capture_on_gpu(work: Callable[[], None]) -> Replay:
    graph = torch.cuda.CUDAGraph()
    # Threads of NCCL ask for events meanwhile, which only this mode allows.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def key_of(settings: Hashable, tensors: Sequence[Tensor]) -> Hashable:
    """Return what is equal for equal work at equal addresses, on one stream.

    Args:
        settings: all that says which work it is, beside tensors.
        tensors: all that the work reads or writes.
    """
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    places = tuple((t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) for t in tensors)
    return settings, stream, torch.get_float32_matmul_precision(), places
