"""From which source of a mixture does position p draw, and its how-many-th draw is that?

Positions are cut into rounds of 65,536. A round holds a fixed number of draws of each source, in
proportion to the weights, in an order shuffled by (seed, round). So the draws of a source before
any position are known without walking there, the shares are exact to 1/65,536 in every round, and
every source goes through its own epochs at its own pace, leaving out no sample.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUND = 1 << 16
# Keeps these draws apart from those of ``order``, which count sources and blocks there.
_STREAM = 1 << 63


class Mixture:
    """Which source every position of an endless stream draws from.

    Args:
        seed: >= 0.
        weights: > 0, one of each source; only their ratios matter.

    Example:
        >>> mixture = Mixture(0, [3, 1])
        >>> mixture.draws_before(2 * ROUND).tolist()
        [98304, 32768]
        >>> np.bincount(mixture.sources(0, 4 * ROUND)).tolist()
        [196608, 65536]
    """

    def __init__(self, seed: int, weights: Sequence[float]) -> None:
        self._seed = seed
        self.quotas = apportion(weights, ROUND)
        self._round = -1
        self._arrangement = np.zeros(0, dtype=np.int64)

    def sources(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the source of each position from ``start`` to ``stop - 1``, as int64."""
        parts = [np.zeros(0, dtype=np.int64)]
        while start < stop:
            number, place = divmod(start, ROUND)
            part = self._arranged(number)[place : place + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def draws_before(self, position: int) -> NDArray[np.int64]:
        """Return how often each source was drawn at positions below ``position``, as int64."""
        number, place = divmod(position, ROUND)
        rest = np.bincount(self._arranged(number)[:place], minlength=len(self.quotas))
        return number * self.quotas + rest

    def _arranged(self, number: int) -> NDArray[np.int64]:
        if number != self._round:
            key = np.array([self._seed, number], dtype=np.uint64)
            counter = np.array([0, 0, _STREAM, 0], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
            sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
            self._round, self._arrangement = number, generator.permutation(sources)
        return self._arrangement


def apportion(weights: Sequence[float], seats: int) -> NDArray[np.int64]:
    """Share ``seats`` in proportion to weights: largest remainders, and nobody gets none.

    Args:
        weights: > 0.
        seats: at least one for each weight.

    Example:
        >>> apportion([1.0, 1.0, 1.0], 8).tolist()
        [3, 3, 2]
        >>> apportion([1000.0, 1e-9], 8).tolist()
        [7, 1]
    """
    wanted = np.asarray(weights, dtype=np.float64)
    wanted = wanted / wanted.sum() * seats
    shares = np.maximum(np.floor(wanted), 1).astype(np.int64)
    while shares.sum() < seats:
        shares[np.argmax(wanted - shares)] += 1
    while shares.sum() > seats:
        shares[np.argmax(shares - wanted + np.where(shares > 1, seats, 0))] -= 1
    return shares
