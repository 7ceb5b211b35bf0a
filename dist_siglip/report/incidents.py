"""Read what went wrong with the data and the steps of a run, without keeping all of it.

Files of lines may be long: they are read line by line, and reasons are counted.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_siglip.data.remote.locations import redact
from dist_siglip.report.damage import objects_of, printable
from dist_siglip.runs import RunFolder

_MOST_EXAMPLES = 5
_MOST_LETTERS = 120
_NUMBER = re.compile(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Reasons:
    """Incidents of one kind.

    Attributes:
        counts: how often, by reason; numbers in a reason are replaced by "#", so that "12 bytes"
            and "13 bytes" are one.
        examples: the first few, as they are.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, example: str) -> None:
        """Count one."""
        self.counts[_NUMBER.sub("#", reason[:_MOST_LETTERS])] += 1
        if len(self.examples) < _MOST_EXAMPLES:
            self.examples.append(example)

    @property
    def total(self) -> int:
        """All of them."""
        return self.counts.total()


@dataclass(frozen=True)
class Incidents:
    """What went wrong.

    Attributes:
        bad_samples: by reason; a sample that is met twice counts twice.
        skipped_steps: by reason.
    """

    bad_samples: Reasons
    skipped_steps: Reasons


def read_incidents(folder: RunFolder, notes: list[str]) -> Incidents:
    """Read both files; a missing one means that nothing went wrong."""
    bad, skipped = Reasons(), Reasons()
    for line in _lines(folder.bad_samples, notes):
        reason = printable(str(line.get("reason", "no reason given")))
        place = printable(redact(f"{line.get('shard')}/{line.get('key')}"))
        bad.add(reason, f"{place}: {reason[:_MOST_LETTERS]}")
    for line in _lines(folder.skipped_steps, notes):
        reason = printable(str(line.get("reason", "no reason given")))
        skipped.add(reason, printable(f"step {line.get('step')}: {reason}"))
    return Incidents(bad, skipped)


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    damaged = 0
    try:
        for line in objects_of(path):
            if line is None:
                damaged += 1
            else:
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror or error}).")
    if damaged:
        notes.append(f"{path.name} has {damaged} unreadable line(s), which are left out.")
