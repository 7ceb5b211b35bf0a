"""Time that passes only when a test says so: what is measured is exact on any machine."""


class CountedClock:
    """Stands in for the module ``time`` where seconds are measured.

    Attributes:
        now: seconds; each look at the clock adds ``TICK``.
    """

    TICK = 1e-6

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """Return the time, and let a little of it pass."""
        self.now += self.TICK
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass, in no time."""
        self.now += seconds
