"""Steps that take their time while something else is to happen to a run."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class SlowSteps(Callback):
    """Waits in every step for as long as a file is there.

    Args:
        while_exists: the file.
        seconds: of each step.
    """

    def __init__(self, while_exists: str, seconds: float = 0.3) -> None:
        self.path = Path(while_exists)
        self.seconds = seconds

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait before the step."""
        if self.path.exists():
            time.sleep(self.seconds)
