"""Reading a run folder: resumed runs, cut lines, pictures that are not pictures."""

import base64
import json

import numpy as np
import pytest

from dist_siglip.report.records import read_run
from tests.support.run_folder import png, write_run


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run")


def _write_lines(run_dir, lines):
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def _write_pictures(run_dir, entries):
    path = run_dir / "evaluation/examples.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": entries}))
    return read_run(run_dir)


def _entry(content, media_type="image/png", row=0):
    encoded = base64.b64encode(content).decode()
    return {"row": row, "media_type": media_type, "base64": encoded}


def test_complete_folder_has_no_notes(run_dir):
    record = read_run(run_dir)
    assert record.notes == []
    assert record.series["train/loss"].steps.tolist() == list(range(2, 61, 2))
    assert len(record.pictures) == 8
    assert set(record.texts) == {"config.yaml", "provenance.json"}


def test_steps_logged_again_by_a_resumed_run_count_once_and_in_order(run_dir):
    _write_lines(run_dir, [{"step": s, "a": v} for s, v in ((1, 1), (3, 9), (2, 2), (3, 3))])
    series = read_run(run_dir).series["a"]
    assert series.steps.tolist() == [1, 2, 3]
    assert series.values.tolist() == [1, 2, 3]


def test_cut_line_is_counted_and_left_out(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')
    record = read_run(run_dir)
    assert record.notes == ["metrics.jsonl has 1 unreadable line(s), which are left out."]
    assert record.series["train/loss"].steps[-1] == 60


def test_values_that_are_not_finite_or_not_numbers_are_left_out(run_dir):
    _write_lines(
        run_dir, [{"step": 1, "a": 1.0}, {"step": 2, "a": "nan", "b": "text", "c": True, "d": []}]
    )
    series = read_run(run_dir).series
    assert set(series) == {"a"}
    assert series["a"].values.tolist() == [1.0]


@pytest.mark.parametrize(
    "entry",
    [
        _entry(b"<svg onload=alert(1)>"),
        _entry(png(0), "image/svg+xml"),
        _entry(png(0), 'image/png" onerror="x'),
        _entry(png(0), row=-1),
        _entry(png(0), row="0"),
        {"row": 0, "media_type": "image/png", "base64": '"><script>'},
        {"row": 0, "media_type": ["image/png"], "base64": ""},
        "text",
    ],
)
def test_pictures_that_are_not_pictures_are_left_out(run_dir, entry):
    record = _write_pictures(run_dir, [entry, _entry(png(1), row=1)])
    assert [picture.row for picture in record.pictures] == [1]
    assert record.notes == ["1 picture(s) of examples.json are unusable."]


def test_pictures_beyond_the_captions_are_left_out(run_dir):
    assert _write_pictures(run_dir, [_entry(png(0), row=10_000)]).pictures == []


def test_captions_that_do_not_fit_the_arrays_leave_no_gallery(run_dir):
    path = run_dir / "evaluation/examples.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"captions": ["one"]}))
    record = read_run(run_dir)
    assert record.captions == []
    assert record.pictures == []
    assert "1 captions but arrays.npz has 120 pairs" in record.notes[0]


@pytest.mark.parametrize(
    "features", [np.ones(5), np.full((120, 16), np.nan), np.ones((3, 16)), np.array(["x"])]
)
def test_features_that_do_not_fit_are_left_out(run_dir, features):
    path = run_dir / "evaluation/arrays.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **(arrays | {"text_features": features}))
    record = read_run(run_dir)
    assert "image_features" not in record.arrays
    assert "histogram_edges" in record.arrays
    assert record.notes == ["evaluation/arrays.npz has no usable features."]


def test_settings_are_read_by_dotted_name(run_dir):
    record = read_run(run_dir)
    assert record.settings == {"model": "tiny", "data.global_batch_size": 64}
    assert record.provenance["world_size"] == 2


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.system [true]", "[" * 1500])
def test_settings_that_cannot_be_read_are_named(run_dir, text):
    (run_dir / "config.yaml").write_text(text)
    record = read_run(run_dir)
    assert record.settings == {}
    assert record.notes == ["config.yaml cannot be read."]


def test_incidents_are_counted_by_reason(run_dir):
    incidents = read_run(run_dir).incidents
    assert incidents.bad_samples.counts == {"only # bytes": 3}
    assert incidents.bad_samples.examples[0] == "a.tar/7: only 7 bytes"
    assert incidents.skipped_steps.counts == {"gradient norm # is a spike": 1}


def test_cut_line_of_incidents_is_named(run_dir):
    with (run_dir / "bad_samples.jsonl").open("a") as file:
        file.write('{"shard": "b.t')
    record = read_run(run_dir)
    assert record.incidents.bad_samples.total == 3
    assert record.notes == ["bad_samples.jsonl has 1 unreadable line(s), which are left out."]


def test_kept_evaluations_are_read_in_order_with_rows_of_length_one(run_dir):
    history = read_run(run_dir).history
    assert [kept.step for kept in history] == [20, 40, 60]
    assert np.allclose(np.linalg.norm(history[0].image_features, axis=1), 1, atol=1e-12)
    assert history[0].positive_histogram.sum() == 6 * 20 * 20


@pytest.mark.parametrize(
    "arrays",
    [
        {"image_features": np.ones((2, 3))},
        {"image_features": np.full((120, 16), np.nan)},
        {"positive_histogram": np.ones(3)},
        {"image_features": np.ones((0, 16)), "text_features": np.ones((0, 16))},
    ],
)
def test_kept_evaluations_that_do_not_fit_are_named_and_left_out(run_dir, arrays):
    path = run_dir / "evaluation/history/step=00000040.npz"
    with np.load(path) as archive:
        whole = dict(archive)
    np.savez(path, **(whole | arrays))
    record = read_run(run_dir)
    assert [kept.step for kept in record.history] == [20, 60]
    assert record.notes == ["evaluation/history/step=00000040.npz cannot be used."]


def test_benchmarks_are_read_and_what_is_none_is_named(run_dir):
    (run_dir / "benchmarks/broken.json").write_text("{")
    (run_dir / "benchmarks/list.json").write_text("[1]")
    record = read_run(run_dir)
    (found,) = record.benchmarks
    assert (found.dataset, found.task) == ("handwriting", "zeroshot_retrieval")
    assert found.metrics == {"image_retrieval_recall@5": 0.75}
    assert len(record.notes) == 2
