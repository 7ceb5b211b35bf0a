"""``test``, and benchmarks during ``fit``, as a user starts them."""

import json

import pytest
import yaml

from dist_siglip.cli import main
from dist_siglip.cli.run.start_point import evaluated_step
from dist_siglip.cli.run.testing import json_of
from dist_siglip.evaluation import BenchmarkResult
from dist_siglip.runs import RunFolder
from tests.support.benchmark_shards import write_labelled
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked
from tests.support.tiny_models import ARCHITECTURES, write_config

pytestmark = pytest.mark.e2e


def write_tasks(folder, shards):
    """Two benchmarks on the validation shards and one of patches, in a file of their own."""
    loading = {"workers_per_rank": 0, "local_batch_size": 6}
    tasks = [
        {"class_path": f"dist_siglip.evaluation.{name}", "init_args": settings}
        for name, settings in (
            ("Retrieval", {"shards": shards, "name": "val", "loading": loading}),
            ("PairMetrics", {"shards": shards, "name": "pairs", "loading": loading}),
        )
    ]
    few = {"train_pictures": 9, "test_pictures": 5, "name": "patches", "settings": loading}
    tasks.append({"class_path": "dist_siglip.evaluation.HandwritingPatches", "init_args": few})
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump(tasks))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 15 steps with benchmarks at steps 10 and 15."""
    folder = tmp_path_factory.mktemp("tested")
    settings = write_settings(folder)
    shards = yaml.safe_load(settings.read_text())["data"]["val_shards"]
    tasks = write_tasks(folder, shards)
    best = ["--checkpoint.keep_best_of=benchmarks/pairs/loss", "--checkpoint.keep_best_mode=min"]
    done = run_forked("fit", "--config", settings, "--benchmarks.tasks", tasks, *best)
    assert done.returncode == 0, done.stdout
    return RunFolder(folder / "run")


@pytest.fixture(scope="module")
def results(trained):
    """What ``fit`` left, by benchmark."""
    return {name: read(trained, name) for name in ("val", "pairs", "patches")}


def read(folder, name):
    return json.loads((folder.benchmarks / f"{name}.json").read_text())


def logged(folder):
    """Step to what was logged of benchmarks."""
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    found = {}
    for line in lines:
        names = {name: value for name, value in line.items() if name.startswith("benchmarks/")}
        if names:
            found.setdefault(line["step"], {}).update(names)
    return found


def test_fit_logs_benchmarks_beside_every_validation(trained, results):
    found = logged(trained)
    assert sorted(found) == [10, 15]
    for name, result in results.items():
        for metric, value in result["metrics"].items():
            assert found[15][f"benchmarks/{name}/{metric}"] == pytest.approx(value, rel=1e-5)


def test_the_best_checkpoint_may_be_that_of_a_benchmark(trained):
    best = json.loads(trained.best.read_text())
    values = {step: found["benchmarks/pairs/loss"] for step, found in logged(trained).items()}
    assert values[best["step"]] == min(values.values())


def test_benchmarks_on_the_validation_pairs_agree_with_the_validation(trained, results):
    """Two ways to the same numbers: the data module and Lightning's loop, and a benchmark."""
    evaluation = json.loads((trained.evaluation / "metrics.json").read_text())
    pairs = results["pairs"]["metrics"]
    batch = {"loss", "step"}  # of a random batch of another size
    shared = set(pairs) & set(evaluation) - batch
    assert "image_to_text_recall@5" in shared
    for name in shared:
        assert float(pairs[name]) == pytest.approx(float(evaluation[name]), rel=1e-4, abs=1e-5)
    recall = results["val"]["metrics"]["text_retrieval_recall@5"]
    assert recall == pytest.approx(evaluation["image_to_text_recall@5"])


def test_the_report_shows_the_patches(trained):
    page = trained.report.read_text()
    assert "patches, patch_segmentation" in page
    assert "From left to right: picture, mask, knn, linear, text." in page
    assert page.count("data:image/jpeg;base64,") >= 4


def test_a_tower_without_patches_is_refused_before_anything_starts(trained, tmp_path, capsys):
    model = write_config(tmp_path / "resnet.json", ARCHITECTURES["resnet"])
    for command in ("fit", "test"):
        words = [command, "--config", str(trained.config), f"--run_dir={tmp_path / 'new'}"]
        assert main([*words, f"--model.model={model}"]) == 2
        assert "gives no patch tokens" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "new").exists()


def test_test_finds_what_fit_found_at_its_last_step(trained, results, capsys):
    log = trained.metrics.read_bytes()
    assert main(["test", "--config", str(trained.config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, result in results.items():
        assert found[name] == pytest.approx(result["metrics"], rel=1e-5, abs=1e-6)
        assert read(trained, name)["pretrained"] == "run step=15"
    assert trained.metrics.read_bytes() == log
    assert evaluated_step(trained) == 15


def test_two_ranks_find_the_same(trained, results):
    done = run_forked("test", "--config", trained.config, "--trainer.devices=2", world_size=2)
    assert done.returncode == 0, done.stdout
    for name, result in results.items():
        assert read(trained, name)["metrics"] == pytest.approx(
            result["metrics"], rel=1e-5, abs=1e-6
        )


def test_a_model_by_name_needs_no_run(trained, tmp_path, capsys):
    tasks = trained.path.parent / "tasks.yaml"
    model = trained.path.parent / "tiny.json"
    out = tmp_path / "alone"
    words = ["test", f"--model.model={model}", f"--benchmarks.tasks={tasks}", f"--run_dir={out}"]
    assert main([*words, "--trainer.accelerator=cpu"]) == 0
    assert "text_retrieval_recall@10" in capsys.readouterr().out
    assert read(RunFolder(out), "val")["pretrained"] == "random"
    assert [path.name for path in out.iterdir()] == ["benchmarks"]


def test_a_number_that_is_not_finite_leaves_what_is_printed_json():
    results = {"a": BenchmarkResult({"x": float("nan"), "y": 0.5}, {})}
    read = json.loads(json_of(results, None), parse_constant=pytest.fail)
    assert read == {"a": {"x": "nan", "y": 0.5}}


def suite_words(folder, *options):
    model = write_config(folder / "tiny.json", ARCHITECTURES["clip"])
    return ["test", f"--model.model={model}", "--trainer.accelerator=cpu", *options]


def test_a_suite_prints_its_averages_beside_those_of_another_run(tmp_path, capsys):
    evals = tmp_path / "evals"
    for name in ("wds_imagenet-a_test", "wds_objectnet"):
        write_labelled(evals / name)
    (evals / "wds_objectnet" / "test").rename(evals / "wds_objectnet" / "train")
    write_labelled(evals / "more")
    (evals / "more" / "test").rename(evals / "wds_objectnet" / "test")
    words = suite_words(tmp_path, "--suite=imagenet_robustness", "--suite_workers=0")
    words.append(f"--suite_folder={evals}")
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*words, f"--run_dir={first}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    mean = (found["imagenet-a"]["acc1"] + found["objectnet"]["acc1"]) / 2
    assert found["averages"] == {"Average": {"value": pytest.approx(mean), "count": 2, "of": 5}}
    written = json.loads((first / "benchmarks" / "suites" / "imagenet_robustness.json").read_text())
    assert written["averages"] == found["averages"]
    assert read(RunFolder(first), "imagenet-a")["dataset"] == "wds/imagenet-a"
    (first / "benchmarks" / "objectnet.json").unlink()
    words += ["--suite_probes", f"--compare={first}"]
    assert main([*words, f"--run_dir={second}"]) == 0
    shown = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in shown}
    acc1 = f"{found['imagenet-a']['acc1']:.4f}"
    assert rows["imagenet-a"] == ["acc1", acc1, acc1]
    assert rows["objectnet"] == ["acc1", f"{found['objectnet']['acc1']:.4f}", "-"]
    assert rows["objectnet_probe"][0] == "lp_acc1"
    assert rows["Average"] == ["2 of 5 data sets", f"{mean:.4f}", f"{acc1}*"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite=datacomp"], "suite (datacomp) needs suite_folder"),
        (["--suite=best", "--suite_folder=."], "suite (best) must be one of datacomp"),
        (["--suite=vtab", "--suite_folder=."], "suite_folder (.) has no data set of suite vtab"),
        (["--suite_folder=."], "suite_folder (.) needs suite"),
        (["--suite_probes"], "suite_probes (True) needs suite"),
        (["--suite_workers=-1"], "suite_workers (-1) must be at least 0"),
    ],
)
def test_a_mistake_of_a_suite_is_told_in_one_line(tmp_path, capsys, options, message):
    out = tmp_path / "new"
    assert main(suite_words(tmp_path, f"--run_dir={out}", *options)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test", "--benchmarks.tasks=null"], "benchmarks.tasks (null) must name at least one"),
        (["test", "--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["fit", "--benchmarks.every_steps=0"], "benchmarks.every_steps (0) must be at least 1"),
        (
            [
                "fit",
                "--benchmarks.tasks=[{class_path: dist_siglip.evaluation.Retrieval, "
                "init_args: {shards: gone.tar}}]",
            ],
            "shards of benchmark 'retrieval' ('gone.tar') names a missing file",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_starts(
    trained, tmp_path, capsys, words, message
):
    out = tmp_path / "new"
    command, *options = words
    assert main([command, "--config", str(trained.config), f"--run_dir={out}", *options]) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]
    assert not out.exists()
