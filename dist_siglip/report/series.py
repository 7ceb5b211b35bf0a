"""What is one logged quantity of a run?"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Series:
    """One logged quantity over steps, sorted, one value per step, finite values only.

    Attributes:
        steps: (n,) int64, n at least 1.
        values: (n,) float64.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """Value of the last step."""
        return float(self.values[-1])

    @property
    def median(self) -> float:
        """Median over the logged steps."""
        return float(np.median(self.values))

    def tail(self, share: float) -> np.ndarray:
        """Values of the last ``share`` of the steps, at least one.

        Example:
            >>> Series(np.arange(4), np.arange(4.0)).tail(0.5).tolist()
            [2.0, 3.0]
        """
        return self.values[-max(1, round(share * len(self.values))) :]
