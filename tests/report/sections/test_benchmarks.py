"""Results of benchmarks: listed, drawn where there are several, told in a sentence, and shown."""

import json

from dist_siglip.report.records import BenchmarkFile, Overlay, read_benchmarks
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


def test_pictures_of_a_dense_evaluation_stand_under_the_numbers():
    pictures = (Overlay("data:image/png;base64,AA", ("picture", "mask"), (("<b>", "#102030"),)),)
    results = [BenchmarkFile("voc", "patch_segmentation", {"knn_mean_iou": 0.5}, pictures)]
    _, shown = make_benchmarks([record(benchmarks=results)]).parts
    assert 'src="data:image/png;base64,AA"' in shown
    assert "From left to right: picture, mask." in shown
    assert "color:#102030" in shown
    assert "&lt;b&gt;" in shown


def write_dense(folder, examples):
    (folder / "details").mkdir(parents=True)
    result = {"dataset": "voc", "task": "patch_segmentation", "metrics": {"knn_mean_iou": 0.5}}
    (folder / "voc.json").write_text(json.dumps(result))
    (folder / "details/voc.json").write_text(json.dumps({"examples": examples}))
    (found,) = read_benchmarks(folder, [])
    return found.examples


def test_what_is_no_picture_or_colour_does_not_reach_the_page(tmp_path):
    sound = {
        "media_type": "image/jpeg",
        "base64": "/9j/",
        "panels": ["picture"],
        "classes": [
            {"name": "cat", "colour": "#00ff00"},
            {"name": "dog", "colour": "red;background:url(x)"},
            "text",
        ],
    }
    broken = [{**sound, "base64": "AAAA"}, {**sound, "media_type": "text/html"}, "text", None]
    (found,) = write_dense(tmp_path / "a", [*broken, sound])
    assert found == Overlay("data:image/jpeg;base64,/9j/", ("picture",), (("cat", "#00ff00"),))
    assert write_dense(tmp_path / "b", "text") == ()
    assert len(write_dense(tmp_path / "c", [sound] * 99)) == 16
    (tmp_path / "c/details/voc.json").unlink()
    assert read_benchmarks(tmp_path / "c", [])[0].examples == ()
