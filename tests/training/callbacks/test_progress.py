"""The lines of a run in a log."""

from types import SimpleNamespace

import torch

from dist_siglip.training.callbacks import ProgressReport


def lines_of(caplog, steps, max_steps=430, total=800, metrics=()):
    """Lines of a training that is told to end at ``max_steps`` of ``total``."""
    caplog.set_level("INFO", "dist_siglip")
    trainer = SimpleNamespace(
        global_step=0,
        max_steps=total,
        is_global_zero=True,
        progress_bar_callback=None,
        callback_metrics=dict(metrics),
    )
    report = ProgressReport(line_seconds=0.0)
    report.on_train_start(trainer, None)
    trainer.max_steps = max_steps
    for trainer.global_step in steps:
        report.on_train_batch_end(trainer, None, None, None, 0)
    return [record.getMessage() for record in caplog.records]


def test_a_line_without_metrics_has_no_hole(caplog):
    _, line = lines_of(caplog, [7])
    assert line.startswith("step 7/800, 0:")
    assert line.endswith(" left")


def test_a_run_that_is_stopped_keeps_the_length_it_was_to_have(caplog):
    _, line = lines_of(caplog, [430], metrics={"train/loss": torch.tensor(1.5)}.items())
    assert line.startswith("step 430/800, loss 1.5000, 0:")
