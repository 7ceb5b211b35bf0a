"""A full disk costs the record of an evaluation, never the run, and mixes no two evaluations."""

import json
import math
from types import SimpleNamespace

import numpy as np

from dist_siglip.training.callbacks import EvaluationRecord


def _record(tmp_path, step):
    trainer = SimpleNamespace(
        is_global_zero=True,
        sanity_checking=False,
        num_sanity_val_steps=0,
        default_root_dir=str(tmp_path),
        datamodule=None,
    )
    arrays = {
        "image_features": np.full((4, 2), step, dtype=np.float32),
        "text_features": np.full((4, 2), step, dtype=np.float32),
        "sample_ids": np.arange(4),
        "histogram_edges": np.linspace(-1, 1, 5),
        "positive_histogram": np.array([0, 0, 1, 3]),
        "negative_histogram": np.array([5, 0, 1, 0]),
    }
    evaluation = SimpleNamespace(metrics={"loss": math.nan}, arrays=arrays)
    module = SimpleNamespace(last_evaluation=evaluation, last_evaluated_step=step)
    EvaluationRecord().on_validation_end(trainer, module)


def test_the_newest_evaluation_replaces_the_one_before(tmp_path):
    for step in (1, 2):
        _record(tmp_path, step)
    numbers = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert numbers == {"step": 2, "loss": "nan"}
    with np.load(tmp_path / "evaluation" / "arrays.npz") as arrays:
        assert (arrays["image_features"] == 2).all()


def test_a_file_without_room_is_missing_rather_than_of_an_older_evaluation(
    tmp_path, monkeypatch, caplog
):
    from dist_siglip.training.callbacks import evaluation_record

    write = evaluation_record.write_atomically

    def only_small_files(path, content):
        if path.suffix == ".npz":
            raise OSError(28, "No space left on device")
        write(path, content)

    _record(tmp_path, 1)
    monkeypatch.setattr(evaluation_record, "write_atomically", only_small_files)
    _record(tmp_path, 2)
    files = [path.name for path in (tmp_path / "evaluation").iterdir() if path.is_file()]
    assert files == ["metrics.json"]
    assert "arrays.npz cannot be written (No space left on device)" in caplog.text
