"""Why training ends before its last step, and how a callback or an alarm has it end there.

Lightning ends a run quietly when ``EarlyStopping`` or ``max_time`` has had enough: no error, fewer
steps than asked for. The reason is put into words here, so that the caller can say it.
"""

from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer


def end_training(trainer: Trainer) -> None:
    """Have training end after the step under way; ``RunCheckpoint`` saves there.

    Distributed contract: every rank calls it at the same step.
    """
    # Not should_stop, for which Lightning would evaluate first, and which min_steps overrules.
    trainer.fit_loop.epoch_loop.max_steps = trainer.global_step


def stop_again(trainer: Trainer) -> None:
    """Stop a run that goes on from the checkpoint of a stop by ``EarlyStopping``.

    Its patience is in the checkpoint and exhausted, but it looks only after the next evaluation.
    """
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's
    if any(_message(each) for each in callbacks if isinstance(each, EarlyStopping)):
        trainer.should_stop = True


def reason_of_early_end(trainer: Trainer) -> str:
    """Say why ``fit`` returned before ``max_steps``, as the end of a sentence."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and (message := _message(callback)):
            return f"EarlyStopping: {message}"
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            spent = timedelta(seconds=int(callback.time_elapsed()))  # type: ignore[attr-defined]
            return f"its time (max_time) is over: {spent} were spent training"
    if trainer.should_stop:
        return "a callback set trainer.should_stop"
    if not trainer.limit_train_batches:
        return f"trainer.limit_train_batches is {trainer.limit_train_batches}"
    progress: Any = trainer.fit_loop.epoch_progress.current
    epochs, most = progress.processed, trainer.max_epochs
    if most is not None and 0 <= most <= epochs:
        return f"trainer.max_epochs is {most}"
    return "the training data ended"


def _message(callback: EarlyStopping) -> str:
    """Why it stopped, without Lightning's farewell; empty if it did not."""
    message = callback.stopping_reason_message or ""
    return message.replace(" Signaling Trainer to stop.", "").rstrip(". ")
