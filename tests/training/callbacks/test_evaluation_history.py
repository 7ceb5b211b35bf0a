"""A few evaluations of a run stay, spread over it, and none of a future that is done again."""

from types import SimpleNamespace

import numpy as np
import pytest

from dist_siglip.runs import RunFolder
from dist_siglip.training.callbacks import EvaluationRecord
from dist_siglip.training.callbacks import evaluation_record as evaluation_history
from dist_siglip.training.callbacks.evaluation_record import keep_evaluation, surplus


def _arrays(num_pairs=3, num_bins=20_000):
    histogram = np.zeros(num_bins, dtype=np.int64)
    histogram[[0, num_bins // 2, num_bins - 1]] = 5, 7, 9
    return {
        "image_features": np.full((num_pairs, 4), 0.5, dtype=np.float32),
        "text_features": np.full((num_pairs, 4), -0.5, dtype=np.float32),
        "sample_ids": np.arange(num_pairs),
        "histogram_edges": np.linspace(-1, 1, num_bins + 1),
        "positive_histogram": histogram,
        "negative_histogram": histogram[::-1],
    }


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def _kept(run, step):
    with np.load(run.kept_evaluation(step), allow_pickle=False) as file:
        return dict(file)


def test_few_pairs_are_kept_in_half_precision(run):
    keep_evaluation(run, 10, _arrays(num_pairs=1200))
    kept = _kept(run, 10)
    assert kept["image_features"].shape == kept["text_features"].shape == (500, 4)
    assert kept["image_features"].dtype == np.float16
    assert kept["sample_ids"].tolist() == list(range(500))


def test_histograms_lose_bins_but_no_pair(run):
    keep_evaluation(run, 10, _arrays())
    kept = _kept(run, 10)
    assert len(kept["histogram_edges"]) == 401
    assert kept["histogram_edges"][[0, 200, -1]].tolist() == [-1, 0, 1]
    assert kept["positive_histogram"][[0, 200, 399]].tolist() == [5, 7, 9]
    assert kept["negative_histogram"].sum() == 21


def test_at_most_eight_stay_and_the_first_and_last_are_among_them(run):
    for step in range(0, 5000, 100):
        keep_evaluation(run, step, _arrays())
    steps = list(run.kept_evaluations())
    assert len(steps) == 8
    assert (steps[0], steps[-1]) == (0, 4900)
    assert max(np.diff(steps)) <= 4 * 4900 / 7


@pytest.mark.parametrize(
    ("steps", "given_up"),
    [([], []), ([5], []), ([1, 2, 3], []), ([0, 1, 2, 9], [1]), ([0, 7, 8, 9], [8])],
)
def test_the_most_crowded_goes_first(steps, given_up):
    assert surplus(steps, 3) == given_up


def test_an_evaluation_of_the_same_step_replaces_the_one_before(run):
    keep_evaluation(run, 10, _arrays(num_pairs=3))
    keep_evaluation(run, 10, _arrays(num_pairs=2))
    assert list(run.kept_evaluations()) == [10]
    assert len(_kept(run, 10)["sample_ids"]) == 2


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(run):
    for step in (10, 20, 30):
        keep_evaluation(run, step, _arrays())
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(run.path), global_step=20)
    EvaluationRecord().on_train_start(trainer, None)
    assert list(run.kept_evaluations()) == [10, 20]


def test_a_full_disk_costs_what_is_kept_and_nothing_else(run, monkeypatch, caplog):
    keep_evaluation(run, 10, _arrays())

    def no_room(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_history, "write_atomically", no_room)
    keep_evaluation(run, 20, _arrays())
    assert list(run.kept_evaluations()) == [10]
    assert "of the evaluation of step 20 cannot be written" in caplog.text
