"""Settings that differ between runs, and those only."""

from dist_siglip.report.sections.comparison import differing_settings, make_origin
from tests.support.report_records import record


def test_only_settings_that_differ_are_listed():
    runs = [
        record("a", settings={"model.loss": "x", "data.seed": 0, "run_dir": "runs/a"}),
        record("b", settings={"model.loss": "y", "data.seed": 0, "run_dir": "runs/b", "new": 1}),
    ]
    assert differing_settings(runs) == [["model.loss", "x", "y"], ["new", "not set", "1"]]


def test_runs_with_the_same_settings_are_said_to_have_them():
    parts = make_origin([record("a"), record("b")]).parts
    assert "The settings of these runs are the same." in parts[0]


def test_long_values_are_cut_and_passwords_left_out():
    runs = [record("a", settings={"x": "y" * 100}), record("b", settings={"x": "s3://me:pw@b/a"})]
    ((_, long, secret),) = differing_settings(runs)
    assert long == "y" * 60 + " ..."
    assert "pw" not in secret
