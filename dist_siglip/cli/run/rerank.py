"""``rerank fit`` and ``rerank validate``: a head that re-ranks what a dual encoder finds.

``fit`` and ``validate`` of a fusion head on a frozen dual encoder: the same run folder, data,
checkpoints and resuming. What a run leaves beside them is the head, ``reranker.safetensors``, and
a table of recall before and after.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table

from dist_siglip.cli.logs import set_up_logging
from dist_siglip.cli.run.training import TrainingCLI, cli_settings
from dist_siglip.cli.table import read_evaluation
from dist_siglip.distributed import leave_process_groups
from dist_siglip.errors import UserError
from dist_siglip.metrics.evaluation import describe_num_pairs
from dist_siglip.models.reranker import write_head
from dist_siglip.runs import RunFolder
from dist_siglip.training.callbacks import AtomicCheckpointIO
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module.reranker import RerankerModule
from dist_siglip.training.strategies import FullyShardedStrategy

logger = logging.getLogger(__name__)

SUBCOMMANDS = {
    "fit": "train a head that re-ranks, or go on with a run",
    "validate": "evaluate a checkpoint of a head",
}
HEAD_NAME = "reranker.safetensors"


def run(command: str, arguments: Sequence[str]) -> int:
    """Run ``rerank fit`` or ``rerank validate``."""
    set_up_logging()
    settings = {**cli_settings(), "parser_kwargs": {"prog": f"dist-siglip {command}"}}
    cli = RerankCLI(RerankerModule, ImageTextDataModule, args=list(arguments), **settings)
    leave_process_groups()
    return cli.exit_code


class RerankCLI(TrainingCLI):
    """The command line of ``fit`` around another module."""

    model: RerankerModule  # type: ignore[assignment]  # all that is asked of it is there

    @property
    def head_path(self) -> Path:
        """Where the head of the run is written."""
        return self.folder.path / HEAD_NAME

    def before_fit(self) -> None:
        """Refuse what a head cannot use, then check as ``fit`` does."""
        if self.datamodule.train_features is not None:
            raise UserError(
                f"train_features ({self.datamodule.train_features}) hold no tokens, which rerank "
                "reads; leave them out"
            )
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            raise UserError(
                "trainer.strategy (FullyShardedStrategy) shards what trains, and a fusion head is "
                "small; leave it out"
            )
        super().before_fit()

    def validate(self, model: LightningModule, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Evaluate a checkpoint of the head, else the head as built, and print both tables."""
        super().validate(model, ckpt_path, **kwargs)
        if self.trainer.is_global_zero:
            print_reranking(self.folder)

    def _owes_end(self, step: int) -> bool:
        return super()._owes_end(step) or not self.head_path.exists()

    def _conclude(self, source: Path | None = None) -> None:
        """Evaluate the last step, write the head, leave a report and a table."""
        super()._conclude(source)
        if not self.trainer.is_global_zero:
            return
        if source is not None:
            self.model.load_state_dict(AtomicCheckpointIO().load_checkpoint(source)["state_dict"])
        write_head(self.head_path, self.model.head, self.model.built)
        logger.info("head written to %s", self.head_path)
        if self.datamodule.val_shards is not None:
            print_reranking(self.folder)


def print_reranking(folder: RunFolder) -> None:
    """Print recall of the newest evaluation, by the dual encoder alone and re-ranked."""
    metrics = read_evaluation(folder)
    table = Table(
        title=f"step {int(metrics['step'])}, gallery of {describe_num_pairs(metrics)}, "
        f"{int(metrics['rerank_candidates'])} candidates re-ranked"
    )
    for column in ("retrieval", "recall@1", "re-ranked", "recall@5", "re-ranked"):
        table.add_column(column, justify="left" if column == "retrieval" else "right")
    for direction in ("image_to_text", "text_to_image"):
        names = [f"{prefix}{direction}_recall@{k}" for k in (1, 5) for prefix in ("", "reranked_")]
        numbers = [f"{metrics[name]:.3f}" for name in names]
        table.add_row(direction.replace("_", " "), *numbers)
    Console().print(table)
