"""When checkpoints are written and kept, and what happens when one cannot be written."""

import json
import logging
import os
import threading
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from dist_siglip.errors import RunFailedError, UserError
from dist_siglip.runs import RunFolder
from dist_siglip.runs.checkpoints.io import Snapshot
from dist_siglip.training.callbacks import AtomicCheckpointIO, RunCheckpoint

LOSSES = {4: 3.0, 8: 1.0, 12: 2.0, 16: float("nan"), 20: 0.5}


class Counter(LightningModule):
    """Adds one to its only weight in every step; its validation loss is written above."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return -self.weight

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", LOSSES.get(self.global_step, 9.0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(folder, callback, steps=20, writer=None, callbacks=(), **settings):
    loader = torch.utils.data.DataLoader(torch.zeros(40), batch_size=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        callbacks=[callback, *callbacks],
        plugins=[writer or AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.path,
        **{"val_check_interval": 4, "num_sanity_val_steps": 0, **settings},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about workers
        newest = folder.newest_checkpoint()
        trainer.fit(Counter(), loader, loader, ckpt_path=newest, weights_only=True)
    return trainer


def weight_of(folder, step):
    path = folder.checkpoint(step)
    return AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["weight"].item()


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


@pytest.fixture
def said(monkeypatch):
    lines = []
    for level in (logging.info, logging.warning):
        monkeypatch.setattr(
            f"dist_siglip.runs.checkpoints.callback.logger.{level.__name__}",
            lambda text, *values: lines.append(text % values),
        )
    return lines


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_are_kept_and_the_last_step_is_written(run, asynchronous):
    train(run, RunCheckpoint(every_steps=6, keep=2, asynchronous=asynchronous))
    assert run.steps_with_checkpoint() == [18, 20]
    assert [weight_of(run, step) for step in (18, 20)] == [18, 20]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("mode", "step"), [("min", 20), ("max", 4)])
def test_the_best_is_kept_besides_and_written_down(run, mode, step, asynchronous):
    """Evaluations every 4 steps, checkpoints every 6: that of the best is written for it."""
    callback = RunCheckpoint(6, 1, "val/loss", mode, asynchronous)
    train(run, callback, steps=22)
    assert run.steps_with_checkpoint() == sorted({step, 22})
    assert weight_of(run, step) == step
    assert json.loads(run.best.read_text()) == {
        "step": step,
        "metric": "val/loss",
        "value": LOSSES[step],
    }


def test_the_best_of_an_earlier_start_stays_the_best(run):
    train(run, RunCheckpoint(100, 1, "val/loss"), steps=10)
    assert run.steps_with_checkpoint() == [8, 10]
    train(run, RunCheckpoint(100, 1, "val/loss"), steps=18)
    assert run.steps_with_checkpoint() == [8, 18]
    train(run, RunCheckpoint(100, 1, "val/loss"), steps=21)
    assert run.steps_with_checkpoint() == [20, 21]


def test_going_on_from_a_checkpoint_of_an_evaluation_takes_the_same_steps(run):
    train(run, RunCheckpoint(100, 1, "val/loss"), steps=10)
    run.checkpoint(10).unlink()
    train(run, RunCheckpoint(100, 1, "val/loss"), steps=14)
    assert weight_of(run, 14) == 14


def test_a_metric_that_is_not_there_is_named_with_those_that_are(run):
    with pytest.raises(UserError, match=r"\(val/recall\) is no metric .* use one of val/loss"):
        train(run, RunCheckpoint(keep_best_of="val/recall"))
    with pytest.raises(UserError, match=r"needs evaluations; name data\.val_shards"):
        train(run, RunCheckpoint(keep_best_of="val/loss"), limit_val_batches=0)


class Failing(AtomicCheckpointIO):
    """Cannot write the checkpoints of some steps."""

    def __init__(self, *steps):
        self.steps = steps

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if checkpoint["global_step"] in self.steps:
            raise OSError(28, "No space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_after_misses_and_tries_again(run, said, asynchronous):
    callback = RunCheckpoint(4, 2, asynchronous=asynchronous, allowed_misses=2)
    train(run, callback, writer=Failing(4, 8, 16))
    assert run.steps_with_checkpoint() == [12, 20]
    assert said == [
        f"checkpoint of step {step} was not written (No space left on device); {there}; training "
        f"goes on, miss {miss} of 2 in a row"
        for step, there, miss in (
            (4, "there is none yet", 1),
            (8, "there is none yet", 2),
            (16, "the newest is step=00000012.ckpt", 1),
        )
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_ends_after_too_many_misses_in_a_row(run, asynchronous):
    callback = RunCheckpoint(4, 2, asynchronous=asynchronous, allowed_misses=2)
    with pytest.raises(RunFailedError) as caught:
        train(run, callback, steps=30, writer=Failing(8, 12, 16))
    line = str(caught.value)
    assert line.startswith("3 checkpoints in a row could not be written, the last one of step 16")
    assert "No space left on device" in line
    assert "step=00000004.ckpt" in line
    assert "\n" not in line
    assert run.steps_with_checkpoint() == [4]


def test_the_last_checkpoint_has_to_be_written(run):
    with pytest.raises(RunFailedError, match="the last checkpoint, of step 10, could not"):
        train(run, RunCheckpoint(4), steps=10, writer=Failing(10))
    assert run.steps_with_checkpoint() == [4, 8]


def test_a_last_step_that_was_missed_in_the_background_is_tried_again(run):
    class Once(Failing):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            try:
                super().save_checkpoint(checkpoint, path, storage_options)
            finally:
                self.steps = ()

    train(run, RunCheckpoint(10, asynchronous=True), steps=10, writer=Once(10))
    assert run.steps_with_checkpoint() == [10]


class Late(Snapshot):
    """Copies nothing before training must not go on without it, like a device that lags behind."""

    def __init__(self, value):
        self.value, self.is_held = value, threading.Event()

    def hold(self):
        self.content = Snapshot(self.value).read()
        self.is_held.set()

    def read(self):
        assert self.is_held.wait(20)
        return self.content


@pytest.mark.parametrize("every_steps", [4, 5])
def test_a_copy_that_is_late_holds_what_it_was_made_of(run, monkeypatch, every_steps):
    """Before the next step changes the weights, and before an evaluation that follows at once."""
    monkeypatch.setattr("dist_siglip.runs.checkpoints.callback.Snapshot", Late)
    train(run, RunCheckpoint(every_steps, 9, asynchronous=True), 14)
    steps = [*range(every_steps, 14, every_steps), 14]
    assert run.steps_with_checkpoint() == steps
    assert [weight_of(run, step) for step in steps] == steps


class Slow(AtomicCheckpointIO):
    """Waits until it may write; counts how many write at once."""

    def __init__(self):
        self.may_write = threading.Event()
        self.writing = 0
        self.most = 0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.writing += 1
        self.most = max(self.most, self.writing)
        assert self.may_write.wait(20)
        super().save_checkpoint(checkpoint, path, storage_options)
        self.writing -= 1


def test_training_goes_on_while_a_checkpoint_is_written_and_its_content_does_not(run):
    from lightning.pytorch import Callback

    writer = Slow()

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 9:
                assert run.steps_with_checkpoint() == []
                assert writer.writing == 1
                writer.may_write.set()

    train(run, RunCheckpoint(5, 9, asynchronous=True), 14, writer, [Watch()])
    assert writer.most == 1
    assert run.steps_with_checkpoint() == [5, 10, 14]
    assert [weight_of(run, step) for step in (5, 10, 14)] == [5, 10, 14]


def test_an_error_in_training_lets_the_background_write_end(run):
    writer = Slow()

    class Stumble(RunCheckpoint):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 7:
                threading.Timer(0.2, writer.may_write.set).start()
                raise ArithmeticError

    with pytest.raises(ArithmeticError):
        train(run, Stumble(5, asynchronous=True), 14, writer)
    assert run.steps_with_checkpoint() == [5]


def test_what_a_killed_writer_left_is_removed_at_the_next_start(run, said):
    run.checkpoints.mkdir()
    hexes = "0123456789abcdef" * 2
    for name in (f".step=00000004.ckpt.{hexes}.tmp", f".best.json.{hexes}.tmp", ".kept.tmp"):
        (run.checkpoints / name).touch()
    (run.checkpoints / f".step=00000002.ckpt.{hexes}.old" / "deep").mkdir(parents=True)
    train(run, RunCheckpoint(), steps=2)
    assert sorted(os.listdir(run.checkpoints)) == [".kept.tmp", "step=00000002.ckpt"]
    assert said == ["removed 3 checkpoints that a killed process had begun"]


def test_a_damaged_newer_one_does_not_cost_the_one_that_is_gone_on_from(run):
    """Kept are the newest up to this step; a newer one can only be damaged."""
    train(run, RunCheckpoint(), steps=4)
    run.checkpoint(9).write_bytes(b"")
    damaged = run.checkpoint(9).rename(run.path / "aside")
    callback = RunCheckpoint(2, keep=1)
    # Put back after the start was chosen.
    callback.on_fit_start = lambda *_: damaged.rename(run.checkpoint(9))
    train(run, callback, steps=6)
    assert run.steps_with_checkpoint() == [6, 9]


@pytest.mark.parametrize(
    ("name", "value"),
    [("every_steps", 0), ("keep", 0), ("allowed_misses", -1), ("keep_best_mode", "best")],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=rf"checkpoint.{name} \({value}\) must be"):
        RunCheckpoint(**{name: value})
