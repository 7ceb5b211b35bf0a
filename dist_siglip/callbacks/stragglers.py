"""Which rank do the others wait for, and does it stay the same one?"""

import logging
from collections.abc import Sequence
from statistics import median_low

from dist_siglip.health.step_timing import RankPace

logger = logging.getLogger(__name__)

_FACTOR = 1.5  # over the median of ranks, in what a rank does alone
_LEAST_SHARE = 0.05  # of the interval that the others lose
_IN_A_ROW = 3  # intervals before it is said
_TOLD = (1, 10, 100, 1000)  # at which such row it is said


class Stragglers:
    """Looks at the pace of all ranks at every logged step."""

    def __init__(self) -> None:
        self._num_intervals = 0
        self._suspect: int | None = None
        self._num_in_a_row = 0
        self._num_rows = 0

    def look(self, paces: Sequence[RankPace], *, tells: bool) -> dict[str, float]:
        """Return metrics of the slowest rank; warn if one stays slow.

        Args:
            paces: of every rank, in rank order.
            tells: whether this is the rank that warns.

        Returns:
            train/slowest_rank, train/slowest_rank_data_wait_percent and
            train/slowest_rank_encode_percent.
        """
        self._num_intervals += 1
        slowest = max(range(len(paces)), key=lambda rank: paces[rank].own_seconds)
        pace = paces[slowest]
        # The first interval starts the loaders, and translates towers.
        if self._num_intervals > 1:
            self._judge(slowest, paces, tells=tells)
        seconds = pace.seconds or 1.0  # no whole step yet
        return {
            "train/slowest_rank": float(slowest),
            "train/slowest_rank_data_wait_percent": 100 * pace.data_seconds / seconds,
            "train/slowest_rank_encode_percent": 100 * pace.encode_seconds / seconds,
        }

    def _judge(self, slowest: int, paces: Sequence[RankPace], *, tells: bool) -> None:
        if not is_straggler(slowest, paces):
            self._suspect, self._num_in_a_row = None, 0
            return
        self._num_in_a_row = self._num_in_a_row + 1 if slowest == self._suspect else 1
        self._suspect = slowest
        if self._num_in_a_row % _IN_A_ROW:
            return
        self._num_rows += 1
        if self._num_rows in _TOLD and tells:
            pace = paces[slowest]
            logger.warning(
                "rank %d keeps the others waiting: %.0f %% of its time for data and %.0f %% in the "
                "towers, the median of ranks %.0f %% and %.0f %%, over %d logged intervals; look "
                "at its node",
                slowest,
                100 * pace.data_seconds / pace.seconds,
                100 * pace.encode_seconds / pace.seconds,
                100 * median_low(p.data_seconds for p in paces) / pace.seconds,
                100 * median_low(p.encode_seconds for p in paces) / pace.seconds,
                self._num_in_a_row,
            )


def is_straggler(rank: int, paces: Sequence[RankPace]) -> bool:
    """Whether a rank takes much longer alone than the median of ranks, and it matters.

    Example:
        >>> usual, slow = RankPace(0.1, 3.0, 10.0), RankPace(4.0, 3.0, 10.0)
        >>> is_straggler(1, [usual, slow, usual]), is_straggler(0, [usual, slow, usual])
        (True, False)
    """
    own = paces[rank].own_seconds
    usual = median_low(pace.own_seconds for pace in paces)
    return own > _FACTOR * usual and own - usual > _LEAST_SHARE * paces[rank].seconds
