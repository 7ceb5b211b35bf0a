"""What is one place in the stream of samples?"""

from typing import NamedTuple


class Slot(NamedTuple):
    """One place in the stream of samples; everything random about a sample is a function of it.

    Attributes:
        epoch: which pass over the data.
        position: place within the order of that epoch.
        sample_id: the sample that stands there.
        is_padding: whether it only fills up the batches of an evaluation.
        source: number of the source of a mixture it was drawn from; epoch and position count
            within that source.
    """

    epoch: int
    position: int
    sample_id: int
    is_padding: bool = False
    source: int = 0

    def key(self, seed: int) -> tuple[int, ...]:
        """Return the key of every random draw about this slot: (seed, epoch, position, source).

        Example:
            >>> Slot(1, 5, 42).key(0)
            (0, 1, 5, 0)
        """
        return (seed, self.epoch, self.position, self.source)
