"""Checks with a time limit: of a file system that may be dead, of a rank that may be gone.

Each runs in a thread of its own, which is left behind when its time is over. What fails or hangs
becomes a line of the page.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from dist_siglip.doctor.page import Finding

_Result = TypeVar("_Result")


class BoundedChecks:
    """Checks one after another, within one limit for all of them.

    Args:
        limit_seconds: from now on.

    Attributes:
        findings: of the checks so far.
        has_hung: whether one of them never came back; its thread is still there.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.findings: list[Finding] = []
        self.has_hung = False
        self._deadline = time.monotonic() + limit_seconds

    def run(self, check: str, look: Callable[[], _Result], *, remedy: str = "") -> _Result | None:
        """Return what ``look`` returns; None if it fails or hangs, which is then a finding.

        Args:
            check: name of the line.
            look: called in another thread.
            remedy: for a failure.

        Example:
            >>> checks = BoundedChecks(0.05)
            >>> checks.run("sum", lambda: 1 + 1), checks.run("sleep", lambda: time.sleep(1))
            (2, None)
            >>> checks.findings[0].text
            'did not come back within 0.05 s'
        """
        done: list[_Result] = []
        failed: list[Exception] = []

        def call() -> None:
            try:
                done.append(look())
            except Exception as error:  # noqa: BLE001 - whatever it is, the page tells it
                failed.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(max(0.01, self._deadline - time.monotonic()))
        if done:
            return done[0]
        if failed:
            text = " ".join(str(failed[0]).split())[:300] or type(failed[0]).__name__
            self.findings.append(Finding("FAIL", check, text, remedy))
        else:
            self.has_hung = True
            text = f"did not come back within {self.limit_seconds:g} s"
            self.findings.append(Finding("FAIL", check, text, remedy or "look what it waits for"))
        return None

    def take(self, check: str, look: Callable[[], list[Finding]], *, remedy: str = "") -> None:
        """Add the findings of ``look``."""
        self.findings += self.run(check, look, remedy=remedy) or []
