import csv
import json
import sys

import pytest

from dist_siglip.evaluation import BenchmarkResult, Retrieval
from dist_siglip.training.callbacks.benchmarks import write_result


def write(folder, metrics):
    result = BenchmarkResult(metrics, {"left_out": 0})
    benchmark = Retrieval("unused.tar", name="coco")
    write_result(folder, benchmark, result, model="ViT-B-32", pretrained="laion2b", step=7)


def test_it_is_the_file_that_clip_benchmark_writes(tmp_path):
    write(tmp_path, {"image_retrieval_recall@5": 0.5})
    assert json.loads((tmp_path / "coco.json").read_text()) == {
        "dataset": "coco",
        "model": "ViT-B-32",
        "pretrained": "laion2b",
        "task": "zeroshot_retrieval",
        "metrics": {"image_retrieval_recall@5": 0.5},
        "language": "en",
        "step": 7,
    }
    assert json.loads((tmp_path / "details" / "coco.json").read_text()) == {"left_out": 0}


def test_a_number_that_is_not_finite_leaves_the_file_json(tmp_path):
    write(tmp_path, {"a": float("nan"), "b": float("-inf")})
    read = json.loads((tmp_path / "coco.json").read_text(), parse_constant=pytest.fail)
    assert read["metrics"] == {"a": "nan", "b": "-inf"}


# CLIP_benchmark leaves the files it reads to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_clip_benchmark_builds_its_table_from_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("clip_benchmark")
    from clip_benchmark.cli import main_build

    write(tmp_path, {"image_retrieval_recall@5": 0.5})
    table = tmp_path / "table.csv"

    class Arguments:
        files = [str(tmp_path)]  # noqa: RUF012 - as argparse gives them
        output = str(table)

    monkeypatch.setattr(sys, "argv", ["clip_benchmark"])
    main_build(Arguments)
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert row["model_fullname"] == "ViT-B-32 laion2b"
    assert row["image_retrieval_recall@5"] == "0.5"
