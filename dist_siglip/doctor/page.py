"""One page of findings: what is ok, what to look at, what will fail, and the remedy."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

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
