"""The examples of docs/evaluation.md, and the tasks of configs/benchmarks."""

import re

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from dist_siglip.evaluation import Benchmark
from tests.support.benchmark_models import known_model, text_map
from tests.support.benchmark_shards import write_captioned
from tests.support.command import REPOSITORY
from tests.support.shards import tokenize
from tests.support.tiny_models import ARCHITECTURES, write_config

PAGE = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
FILES = sorted((REPOSITORY / "configs" / "benchmarks").glob("*.yaml"))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def build(tasks):
    """Make the benchmarks of a list, as the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", type=list[Benchmark])
    made = parser.instantiate_classes(parser.parse_object({"tasks": tasks}))
    return made.tasks


def test_the_tasks_of_the_page_are_benchmarks():
    (block,) = blocks("yaml")
    names = [each.name for each in build(yaml.safe_load(block))]
    own = ["pets", "my_parts", "coco", "other_pairs", "voc"]
    assert names == [*own, "pets_probe", "winoground", "crossmodal3600"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_tasks_has_its_command_at_the_head(path):
    head = path.read_text(encoding="utf-8").split("\n-")[0]
    assert f"--benchmarks.tasks configs/benchmarks/{path.name}" in head
    assert len(build(yaml.safe_load(path.read_text(encoding="utf-8")))) >= 2


def test_the_benchmark_of_ones_own_runs():
    found = {}
    exec(blocks("python")[0], found)
    pairs = [("car", "automobile"), ("sofa", "couch")]
    result = found["Synonyms"](pairs).evaluate(known_model())
    first, second = (text_map(tokenize(list(texts))) for texts in zip(*pairs, strict=True))
    assert result.metrics["cosine"] == pytest.approx(float((first * second).sum(1).mean()))


def test_the_script_without_lightning_runs(tmp_path, capsys):
    torch.manual_seed(0)
    write_captioned(tmp_path)
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    script = blocks("python")[1].replace('"ViT-B-32", "laion2b_s34b_b79k"', repr(model))
    exec(script.replace("/data/coco/test", str(tmp_path / "test")), {})
    assert "image_retrieval_recall@5" in capsys.readouterr().out
