"""SIGTERM ends a rank at once, and with it the run.

Lightning answers SIGTERM with a broadcast inside the signal handler. If the signal reaches one
rank in the middle of an exchange, every rank then waits for another one. Ending at once costs the
steps since the last checkpoint; the other ranks notice the closed connection and end too.
"""

import signal
import threading

from lightning.pytorch import Callback, LightningModule, Trainer


class EndOnTermination(Callback):
    """Puts the system's own handling of SIGTERM back after Lightning has replaced it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first training step."""
        _restore()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before an evaluation, which may run without a fit."""
        _restore()


def _restore() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
