"""metrics.jsonl has whole lines, each JSON, and no step twice after a resume."""

import json
from types import SimpleNamespace

from dist_siglip.training.callbacks import MetricsLog
from dist_siglip.training.callbacks.progress import ProgressReport, describe


def _lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_json_even_for_values_that_are_not_finite(tmp_path):
    log = MetricsLog(tmp_path)
    log.log_metrics({"train/loss": float("nan"), "x": float("inf"), "epoch": 0.0}, step=3)
    (line,) = _lines(tmp_path)
    assert line.pop("time") > 0
    assert line == {"step": 3, "train/loss": "nan", "x": "inf"}


def test_lines_are_numbered_by_optimizer_steps(tmp_path):
    log = MetricsLog(tmp_path)
    log.follow(lambda: 7)
    log.log_metrics({"train/loss": 1.0}, step=6)
    assert _lines(tmp_path)[0]["step"] == 7


def test_lines_after_the_checkpoint_and_a_torn_line_are_discarded(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.log_metrics({"train/loss": float(step)}, step=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    log.discard_after(2)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]
    log.log_metrics({"train/loss": 3.5}, step=3)
    assert _lines(tmp_path)[-1]["train/loss"] == 3.5


def test_lines_wait_while_the_disk_is_full(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.log_metrics({"train/loss": 1.0}, step=step)
    log.finalize("success")
    assert "2 lines of metrics still wait for room" in caplog.messages[-1]
    path.unlink()
    log.log_metrics({"train/loss": 1.0}, step=3)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]
    assert sum("cannot be written" in message for message in caplog.messages) == 1


def test_a_line_cut_in_the_middle_of_the_file_is_discarded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr\n{"step": 2}\n{"step": 3}\n')
    MetricsLog(tmp_path).discard_after(2)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]


def test_a_full_disk_does_not_keep_steps_that_are_done_again(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.log_metrics({"train/loss": 1.0}, step=step)
    monkeypatch.setattr("dist_siglip.system.atomic.os.fsync", refuse)
    log.discard_after(1)
    assert [line["step"] for line in _lines(tmp_path)] == [1]


def test_nothing_to_discard_is_no_file(tmp_path):
    MetricsLog(tmp_path).discard_after(0)
    assert list(tmp_path.iterdir()) == []


def test_a_line_of_progress_has_what_is_known_in_order():
    metrics = {"train/grad_norm": 0.5, "train/loss": 2.0, "val/loss": 9.0}
    assert describe(metrics) == "loss 2.0000, grad norm 0.500"


def test_progress_writes_plain_lines_without_a_terminal(caplog):
    trainer = SimpleNamespace(
        is_global_zero=True,
        global_step=0,
        max_steps=2,
        callback_metrics={"train/loss": 1.0},
    )
    report = ProgressReport(line_seconds=1e9)
    with caplog.at_level("INFO", logger="dist_siglip"):
        report.on_train_start(trainer, None)
        for step in (1, 2):
            trainer.global_step = step
            report.on_train_batch_end(trainer, None, None, None, 0)
    assert caplog.messages[0] == "training from step 0 to 2"
    assert caplog.messages[-1] == "step 2/2, loss 1.0000, 0:00:00 left"
    assert len(caplog.messages) == 2
