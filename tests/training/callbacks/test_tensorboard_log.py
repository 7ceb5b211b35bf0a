"""TensorBoard on a full disk costs a warning, never the run."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_siglip.training.callbacks import TensorBoardLog
from tests.support.hostile import in_child
from tests.support.small_disk import room_for


def _steps(tmp_path):
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars("x")]


def test_a_full_disk_is_told_once_and_switches_it_off(tmp_path, caplog):
    def write():
        log = TensorBoardLog(str(tmp_path), name="", version="tensorboard")
        with room_for(2000):
            for step in range(200):
                log.log_metrics({"x": 1.0}, step=step)
                log.save()
            log.finalize("success")
        log.log_metrics({"x": 1.0}, step=200)
        log.finalize("success")
        return caplog.text

    said = in_child(write)
    assert said.count("TensorBoard cannot be written") == 1
    steps = _steps(tmp_path)
    assert steps[0] == 0
    assert steps[-1] < 199


def test_event_files_that_cannot_be_opened_are_tried_once(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        tries.append(1)
        raise OSError(28, "No space left on device")

    tries = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fail)
    log = TensorBoardLog(str(tmp_path), name="", version="tensorboard")
    assert not hasattr(log, "experiment")  # Lightning asks before the run starts
    for step in range(5):
        log.log_metrics({"x": 1.0}, step=step)
        log.save()
    assert len(tries) == 1
    assert len(caplog.messages) == 1


def test_a_value_it_does_not_know_is_still_refused(tmp_path):
    log = TensorBoardLog(str(tmp_path), name="", version="tensorboard")
    with pytest.raises(ValueError, match="not supported"):
        log.log_metrics({"x": object()}, step=0)
    log.finalize("success")
