"""A callback that writes down which samples each step was trained on."""

import json
from pathlib import Path

from lightning.pytorch import Callback


class RecordSamples(Callback):
    """Appends {"step", "rank", "sample_ids"} to FOLDER/rank-R.jsonl after each step."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "sample_ids": batch.sample_ids.tolist(),
        }
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def global_batches(folder: Path) -> dict[int, list[int]]:
    """Sample ids of each step's global batch, ranks in order; the last record of a step counts."""
    by_step: dict[int, dict[int, list[int]]] = {}
    for path in folder.glob("rank-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            by_step.setdefault(line["step"], {})[line["rank"]] = line["sample_ids"]
    return {
        step: [sample for rank in sorted(ranks) for sample in ranks[rank]]
        for step, ranks in sorted(by_step.items())
    }
