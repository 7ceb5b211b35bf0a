"""Read what went wrong with the data and the steps of a run, without keeping all of it.

Files of lines may be long: they are read line by line, and reasons are counted.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_siglip.data.remote.locations import redact
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
        reason = str(line.get("reason", "no reason given"))
        place = redact(f"{line.get('shard')}/{line.get('key')}")
        bad.add(reason, f"{place}: {reason[:_MOST_LETTERS]}")
    for line in _lines(folder.skipped_steps, notes):
        reason = str(line.get("reason", "no reason given"))
        skipped.add(reason, f"step {line.get('step')}: {reason}")
    return Incidents(bad, skipped)


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    damaged = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict):
                yield line
            else:
                damaged += 1
    if damaged:
        notes.append(f"{path.name} has {damaged} unreadable line(s), which are left out.")
