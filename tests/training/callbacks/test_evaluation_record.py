"""A full disk costs the record of an evaluation, never the run, and mixes no two evaluations."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dist_siglip.data.samples.regions import Window
from dist_siglip.training.callbacks import EvaluationRecord
from dist_siglip.training.callbacks.evaluation_record import with_boxes
from dist_siglip.training.module.objective_measures import FoundRegion


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_boxes_are_drawn_where_they_are_in_the_whole_picture(kind):
    """What the model saw was the middle of it; the decoder's box may be upside down."""
    region = FoundRegion("a fox", (0.0, 0.0, 0.5, 0.5), (1.0, 1.0, 0.5, 0.5))
    data = with_boxes(Image.new("RGB", (200, 100)), Window(0, 0.25, 1, 0.75), region, kind)
    image = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    green = image[..., 1] - image[..., 0] > 60
    orange = image[..., 0] - image[..., 2] > 100
    for mask, rows, columns in ((green, (0, 49), (50, 99)), (orange, (50, 99), (100, 149))):
        places = np.nonzero(mask)
        for found, expected in zip(places, (rows, columns), strict=True):
            assert abs(found.min() - expected[0]) <= 1
            assert abs(found.max() - expected[1]) <= 1
        assert not mask[rows[0] + 10 : rows[1] - 10, columns[0] + 10 : columns[1] - 10].any()
