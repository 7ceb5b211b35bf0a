"""Settings that differ between runs, and those only."""

from dist_siglip.report.benchmark_files import BenchmarkFile
from dist_siglip.report.sections import benchmarks
from dist_siglip.report.sections.origin import differing_settings, make
from tests.support.report_records import record


def test_only_settings_that_differ_are_listed():
    runs = [
        record("a", settings={"model.loss": "x", "data.seed": 0, "run_dir": "runs/a"}),
        record("b", settings={"model.loss": "y", "data.seed": 0, "run_dir": "runs/b", "new": 1}),
    ]
    assert differing_settings(runs) == [["model.loss", "x", "y"], ["new", "not set", "1"]]


def test_runs_with_the_same_settings_are_said_to_have_them():
    parts = make([record("a"), record("b")]).parts
    assert "The settings of these runs are the same." in parts[0]


def test_long_values_are_cut_and_passwords_left_out():
    runs = [record("a", settings={"x": "y" * 100}), record("b", settings={"x": "s3://me:pw@b/a"})]
    ((_, long, secret),) = differing_settings(runs)
    assert long == "y" * 60 + " ..."
    assert "pw" not in secret


def test_benchmarks_of_several_steps_are_drawn():
    logged = {"benchmarks/coco/acc1": [0.1, 0.2], "benchmarks/coco/once": [0.5]}
    results = [BenchmarkFile("coco", "zeroshot_classification", {"acc1": 0.2})]
    section = benchmarks.make([record(series=logged, benchmarks=results)])
    assert "acc1</text>" in section.parts[0]
    assert "once</text>" not in section.parts[0]


def test_benchmarks_are_listed_where_any_run_has_them():
    assert benchmarks.make([record()]) is None
    some = record("a", benchmarks=[BenchmarkFile("coco", "zeroshot_retrieval", {"r@5": 0.5})])
    (table,) = benchmarks.make([some, record("b")]).parts
    assert "coco, zeroshot_retrieval" in table
    assert "<td>0.5</td><td>n/a</td>" in table
