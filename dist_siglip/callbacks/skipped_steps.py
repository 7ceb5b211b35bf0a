"""Which step was skipped, why, and which samples were in it?

A line of RUN/skipped_steps.jsonl is {"step": optimizer steps done with it, "time": Unix seconds,
"reason": text, "loss": of the global batch, "grad_norm": before clipping, "not_finite": samples
whose features were not, "samples": {shard: keys} of the global batch}. Without shards samples are
numbers, those of ``sample_ids``.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.remote.locations import redact
from dist_siglip.distributed import gather_rows, sum_over_ranks
from dist_siglip.optim import StepFinding
from dist_siglip.system.best_effort import LineLog


@dataclass(frozen=True)
class SkippedStep:
    """A skipped step, the same on every rank.

    Attributes:
        step: optimizer steps done, this one counted.
        loss: of the global batch.
        norm: of the gradient before clipping.
        sample_ids: of the global batch, in rank order.
        bad_ids: of samples with a feature that is not finite.
        scale: of a GradScaler; None if there is none.
    """

    step: int
    loss: float
    norm: float
    sample_ids: list[int]
    bad_ids: list[int]
    scale: float | None

    @property
    def is_search_for_scale(self) -> bool:
        """Whether a GradScaler only tried too large a factor, which is no failure."""
        is_large = self.scale is not None and self.scale > 1
        return is_large and math.isfinite(self.loss) and not math.isfinite(self.norm)

    @property
    def reason(self) -> str:
        """Why it was skipped, in words."""
        if not math.isfinite(self.loss):
            return "loss is not finite"
        if not math.isfinite(self.norm):
            return "gradient is not finite"
        return f"gradient norm {self.norm:.4g} is a spike"


def collect(step: int, finding: StepFinding, world_size: int) -> SkippedStep:
    """Bring together what the ranks know about a skipped step.

    Distributed contract: every rank calls it with its own finding; three small collectives.
    """
    ids = gather_rows(finding.sample_ids).tolist()
    bad = gather_rows(finding.bad_rows).tolist()
    return SkippedStep(
        step=step,
        loss=sum_over_ranks(finding.loss).item() / world_size,
        norm=finding.norm.item(),
        sample_ids=ids,
        bad_ids=[sample_id for sample_id, is_bad in zip(ids, bad, strict=True) if is_bad],
        scale=finding.scale,
    )


class SkippedStepLog:
    """Appends to RUN/skipped_steps.jsonl, on the first rank.

    Args:
        path: the file.
        table: that names the samples; None if they have no shards.
    """

    def __init__(self, path: Path, table: PairTable | None) -> None:
        self._lines = LineLog(path, "skipped steps")
        self._table = table

    def append(self, skipped: SkippedStep) -> str:
        """Add one line; return a short description for the log."""
        bad = self._list(skipped.bad_ids)
        record = {
            "step": skipped.step,
            "time": round(time.time(), 3),
            "reason": skipped.reason,
            "loss": _as_json(skipped.loss),
            "grad_norm": _as_json(skipped.norm),
            "not_finite": bad,
            "samples": self._group(skipped.sample_ids),
        }
        self._lines.append(json.dumps(record))
        if not bad:
            return skipped.reason
        whose = f"{len(bad)} of {len(skipped.sample_ids)} samples"
        return f"{skipped.reason}; {whose} gave features that are not, first {bad[0]}"

    def _list(self, sample_ids: list[int]) -> list[Any]:
        if self._table is None:
            return sample_ids
        return [
            f"{redact(shard)}/{_key(key, sample_id)}"
            for (shard, key), sample_id in self._named(self._table, sample_ids)
        ]

    def _group(self, sample_ids: list[int]) -> list[int] | dict[str, list[str]]:
        if self._table is None:
            return sample_ids
        grouped: dict[str, list[str]] = {}
        for (shard, key), sample_id in self._named(self._table, sample_ids):
            grouped.setdefault(redact(shard), []).append(_key(key, sample_id))
        return grouped

    @staticmethod
    def _named(
        table: PairTable, sample_ids: list[int]
    ) -> Iterable[tuple[tuple[str, str | None], int]]:
        return zip(table.names(sample_ids), sample_ids, strict=True)


def _key(key: str | None, sample_id: int) -> str:
    """Key of a sample; its number in the data set if the shard has changed since."""
    return f"sample {sample_id}" if key is None else key


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
