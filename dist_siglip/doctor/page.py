"""One page of findings: what is ok, what to look at, what will fail, and the remedy.

A check may ask a file system that is dead or a rank that is gone. So each has a time limit and runs
in a thread of its own, which is left behind when its time is over; what fails or hangs becomes a
line of the page.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

from dist_siglip.health.start_check import list_ranks

Status = Literal["ok", "warn", "FAIL", "-"]
_MOST_ALIKE = 4  # different findings of one kind
_WIDTH = 14


class Finding(NamedTuple):
    """One line of the page.

    Attributes:
        status: "FAIL" is what ends or hangs a run; "warn" what makes it slow or is worth a look;
            "-" was not looked at.
        check: what was looked at, one or two words.
        text: what was found.
        remedy: what to do about it; "" for what is ok.
    """

    status: Status
    check: str
    text: str
    remedy: str = ""


def merge(by_rank: Sequence[Sequence[Finding] | None]) -> list[Finding]:
    """Make one list of the findings of all ranks, each said once, in the order of the first rank.

    What is ok is told of the first rank that says so. Complaints name their ranks; of one kind no
    more than four different ones are listed.

    Args:
        by_rank: findings in rank order; None for a rank that is not there.

    Example:
        >>> bad, fine = Finding("warn", "disk", "slow", "buy one"), Finding("ok", "disk", "fast")
        >>> for finding in merge([[fine], [bad], [bad]]):
        ...     print(finding.status, finding.text)
        warn rank 1-2: slow
    """
    ranks_of: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings or ():
            ranks_of.setdefault(finding, []).append(rank)
    order = {check: place for place, check in enumerate(dict.fromkeys(f.check for f in ranks_of))}
    merged = []
    for check in order:
        of_check = [finding for finding in ranks_of if finding.check == check]
        complaints = [finding for finding in of_check if finding.status in ("warn", "FAIL")]
        if not complaints:
            merged.append(of_check[0])
        complaints.sort(key=lambda finding: finding.status != "FAIL")
        for finding in complaints[:_MOST_ALIKE]:
            ranks = ranks_of[finding]
            who = f"rank {list_ranks(ranks)}: " if len(by_rank) > 1 else ""
            merged.append(finding._replace(text=f"{who}{finding.text}"))
        if more := complaints[_MOST_ALIKE:]:
            merged.append(Finding(more[0].status, check, f"and {len(more)} more of the kind"))
    return merged


def render(title: str, findings: Sequence[Finding]) -> str:
    """Write the page.

    Args:
        title: its first line.
        findings: its lines; a remedy stands below its finding.

    Example:
        >>> print(render("two ranks", [Finding("FAIL", "clock", "an hour ahead", "start chronyd")]))
        two ranks
        <BLANKLINE>
        FAIL  clock         an hour ahead
                            -> start chronyd
        <BLANKLINE>
        1 failed, 0 warnings, 0 ok
    """
    lines = [title, ""]
    for finding in findings:
        lines.append(f"{finding.status:<6}{finding.check:<{_WIDTH - 1}} {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<{6 + _WIDTH}}-> {finding.remedy}")
    count = {status: sum(f.status == status for f in findings) for status in ("FAIL", "warn", "ok")}
    lines += ["", f"{count['FAIL']} failed, {count['warn']} warnings, {count['ok']} ok"]
    return "\n".join(lines)


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
