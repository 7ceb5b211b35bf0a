"""SIGTERM ends a rank at once, and with it the run.

Lightning answers SIGTERM with a broadcast inside the signal handler. If the signal reaches one
rank in the middle of an exchange, every rank then waits for another one. Ending at once costs the
steps since the last checkpoint; the other ranks notice the closed connection and end too.

For the same reason Lightning also asks the first rank in every step whether it was signalled, by a
broadcast and a read of its result, for which the host waits until the device has caught up. No
rank lives to be asked, so that is taken out.
"""

import signal
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

_QUESTION = "_broadcast_sigterm_tensor"


class EndOnTermination(Callback):
    """Puts the system's own handling of SIGTERM back after Lightning has replaced it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first training step."""
        _restore()
        loop: Any = trainer.fit_loop.epoch_loop
        if hasattr(loop, _QUESTION):  # Lightning 2.6
            setattr(loop, _QUESTION, _ask_nobody)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before an evaluation, which may run without a fit."""
        _restore()


def _ask_nobody() -> None:
    """Stand in for a broadcast in every step."""


def _restore() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
