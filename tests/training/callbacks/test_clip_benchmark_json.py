import csv
import json
import sys

import pytest

from dist_siglip.evaluation import BabelImageNet, BenchmarkResult, CaptionChoice, Retrieval
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


def test_each_language_has_a_file_of_its_own(tmp_path):
    parts = {"de": {"acc1": 0.25}, "fr": {"acc1": 0.75}}
    result = BenchmarkResult({"acc1": 0.5}, {"parts": parts})
    benchmark = BabelImageNet("unused.tar", "names.json", "{}", name="babel")
    benchmark.dataset = "babel_imagenet"
    write_result(tmp_path, benchmark, result, model="m", pretrained="p", step=0)
    for path, language, acc1 in (
        ("babel.json", "mean", 0.5),
        ("parts/babel.de.json", "de", 0.25),
        ("parts/babel.fr.json", "fr", 0.75),
    ):
        read = json.loads((tmp_path / path).read_text())
        assert (read["dataset"], read["language"]) == ("babel_imagenet", language)
        assert read["metrics"] == {"acc1": acc1}


def test_each_part_of_a_choice_is_a_data_set_of_its_own(tmp_path):
    parts = {"add_att": {"acc": 0.25}, "swap_att": {"acc": 0.75}}
    benchmark = CaptionChoice("unused", name="sugar_crepe")
    result = BenchmarkResult({"acc": 0.5}, {"parts": parts})
    write_result(tmp_path, benchmark, result, model="m", pretrained="p", step=0)
    read = json.loads((tmp_path / "parts" / "sugar_crepe.swap_att.json").read_text())
    assert (read["dataset"], read["language"]) == ("sugar_crepe/swap_att", "en")
    assert json.loads((tmp_path / "sugar_crepe.json").read_text())["language"] == "en"


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
