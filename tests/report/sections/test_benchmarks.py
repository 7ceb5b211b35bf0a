"""Results of benchmarks: listed, drawn where there are several, told in a sentence."""

from dist_siglip.report.records import BenchmarkFile
from dist_siglip.report.sections.retrieval import judge_benchmarks, make_benchmarks
from tests.support.report_records import record


def test_benchmarks_of_several_steps_are_drawn():
    logged = {"benchmarks/coco/acc1": [0.1, 0.2], "benchmarks/coco/once": [0.5]}
    results = [BenchmarkFile("coco", "zeroshot_classification", {"acc1": 0.2})]
    section = make_benchmarks([record(series=logged, benchmarks=results)])
    assert "acc1</text>" in section.parts[0]
    assert "once</text>" not in section.parts[0]


def test_conclusion_names_the_first_number_of_each_benchmark():
    results = [BenchmarkFile(f"set{n}", "t", {"acc1": n / 8, "acc5": 1.0}) for n in range(6)]
    told = judge_benchmarks(record(benchmarks=results)).text
    assert "set3 0.375 (acc1), and 2 more" in told


def test_benchmarks_are_listed_where_any_run_has_them():
    assert make_benchmarks([record()]) is None
    some = record("a", benchmarks=[BenchmarkFile("coco", "zeroshot_retrieval", {"r@5": 0.5})])
    (table,) = make_benchmarks([some, record("b")]).parts
    assert "coco, zeroshot_retrieval" in table
    assert "<td>0.5</td><td>n/a</td>" in table
