"""Trackers beside metrics.jsonl: each of docs/training.md, offline, in one run.

A tracker whose package is missing is left out of the run, and its test says so.
"""

import csv
import json
from importlib.util import find_spec

import pytest
import yaml
from jsonargparse import Namespace

from dist_siglip.cli import main
from dist_siglip.training.callbacks.loggers import attach_report, name_trackers, tell_settings
from tests.support.command import run_command, write_settings
from tests.support.forked_runs import run_forked

LIGHTNING = "lightning.pytorch.loggers"


def of_class(name, /, **arguments):
    return {"class_path": f"{LIGHTNING}.{name}", "init_args": arguments}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with every tracker there is, and what stands beside it."""
    folder = tmp_path_factory.mktemp("trackers")
    trackers = [
        of_class("CSVLogger", save_dir=str(folder / "csv"), name="mine"),
        of_class("TensorBoardLogger", save_dir=str(folder / "tensorboard"), name="mine"),
    ]
    if find_spec("wandb"):
        trackers.append(
            of_class("WandbLogger", project="siglip", save_dir=str(folder), offline=True)
        )
    if find_spec("mlflow"):
        address = f"sqlite:///{folder / 'mlflow.db'}"
        trackers.append(
            of_class(
                "MLFlowLogger",
                experiment_name="siglip",
                tracking_uri=address,
                artifact_location=(folder / "artifacts").as_uri(),
            )
        )
    settings = write_settings(folder, max_steps=4, val_check_interval=2, logger=trackers)
    # W&B writes its file when the interpreter ends, which that of a fork does not.
    run_it = run_command if find_spec("wandb") else run_forked
    done = run_it("fit", "--config", settings)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" not in done.stderr
    return folder


def logged(run):
    """Loss by step, as metrics.jsonl has it."""
    lines = map(json.loads, (run / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.e2e
def test_csv_has_numbers_and_settings(run):
    (path,) = (run / "csv" / "mine").glob("version_*/metrics.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    found = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert found == pytest.approx(list(logged(run).values()), rel=1e-6)
    assert any(row["val/image_to_text_recall@1"] for row in rows)
    settings = yaml.safe_load((path.parent / "hparams.yaml").read_text())
    assert settings["model.optim.learning_rate"] == 0.01
    assert settings["data.global_batch_size"] == 12


@pytest.mark.e2e
def test_tensorboard_has_numbers_and_settings(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run / "tensorboard" / "mine").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = [each.value for each in events.Scalars("train/loss")]
    assert found == pytest.approx(list(logged(run).values()), rel=1e-5)
    settings = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert settings["model.optim.learning_rate"] == 0.01


@pytest.mark.e2e
def test_wandb_has_name_numbers_settings_and_report(run):
    pytest.importorskip("wandb", reason="wandb is not installed")
    (folder,) = (run / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    written = record.read_bytes()
    for words in (b"model.optim.learning_rate", b"train/loss", b"val/image_to_text_recall@1"):
        assert words in written
    (report,) = folder.rglob("report_*.html")
    assert report.read_bytes() == (run / "run" / "report.html").read_bytes()


@pytest.mark.e2e
def test_mlflow_has_name_numbers_settings_and_report(run):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    client = mlflow.MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("siglip")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "run"
    assert found.info.status == "FINISHED"
    assert found.data.params["model.optim.learning_rate"] == "0.01"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    losses = [each.value for each in history]
    assert losses == pytest.approx(list(logged(run).values()), rel=1e-6)
    assert "val/image_to_text_recall1" in found.data.metrics  # MLflow has no @
    (report,) = (run / "artifacts").rglob("report.html")
    assert report.read_bytes() == (run / "run" / "report.html").read_bytes()


def test_a_tracker_is_named_after_its_run_unless_it_has_a_name():
    wandb = Namespace(class_path=f"{LIGHTNING}.WandbLogger", init_args=Namespace(name=None))
    mlflow = Namespace(class_path=f"{LIGHTNING}.MLFlowLogger", init_args=Namespace(run_name="own"))
    table = Namespace(class_path=f"{LIGHTNING}.CSVLogger", init_args=Namespace(name="logs"))
    name_trackers([wandb, mlflow, table], "b16")
    assert wandb.init_args.name == "b16"
    assert mlflow.init_args.run_name == "own"
    assert table.init_args.name == "logs"
    wandb.init_args.name = None
    name_trackers(wandb, "b16")
    assert wandb.init_args.name == "b16"
    for nothing in (None, True, False, []):
        name_trackers(nothing, "b16")


def test_a_tracker_that_fails_costs_a_warning(tmp_path, caplog):
    class Broken:
        told = None

        def log_hyperparams(self, params):
            self.told = params
            raise ConnectionError("no route to host")

    broken = Broken()
    settings = {"data": {"train_shards": "https://me:pass@host/a.tar", "seed": 1, "stages": None}}
    comet = of_class("CometLogger", api_key="12ab")
    tell_settings([broken], settings | {"trainer": {"logger": comet}, "loggers": [comet]})
    assert "12ab" not in str(broken.told)
    assert broken.told["trainer.logger.init_args.api_key"] == "..."
    assert broken.told["data.train_shards"] == "https://host/a.tar"
    assert broken.told["data.seed"] == 1
    assert "data.stages" not in broken.told
    assert "settings in Broken cannot be written (no route to host)" in caplog.text
    attach_report([broken], tmp_path / "report.html")  # takes no files


@pytest.mark.skipif(find_spec("comet_ml") is not None, reason="comet_ml is installed")
def test_a_tracker_without_its_package_is_told_in_one_line(tmp_path, capsys):
    settings = write_settings(tmp_path, max_steps=1, logger=of_class("CometLogger"))
    assert main(["fit", "--config", str(settings)]) == 2
    error = capsys.readouterr().err
    assert "comet" in error
    assert "pip install" in error
    assert error.count("\n", error.index("dist-siglip: error")) == 1
