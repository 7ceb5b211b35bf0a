"""What a Trainer gets that its settings leave open."""

import pytest
import yaml
from lightning.pytorch.plugins import MixedPrecision

from dist_siglip.cli.run import training
from dist_siglip.cli.run.start_point import recorded_precision
from dist_siglip.cli.run.trainer_parts import cuda, precision
from dist_siglip.cli.run.training import TrainingCLI, train
from dist_siglip.runs import RunFolder
from tests.support.command import write_settings


@pytest.fixture
def gpu(monkeypatch):
    """What torch says of a GPU that computes in bfloat16."""
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "is_bf16_supported", lambda *, including_emulation: True)


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_a_new_run_computes_in_bfloat16_where_the_gpu_does(gpu, monkeypatch, accelerator):
    settings = {"accelerator": accelerator, "precision": None, "strategy": "auto"}
    assert precision(settings, None) == "bf16-mixed"
    monkeypatch.setattr(cuda, "is_bf16_supported", lambda *, including_emulation: False)
    assert precision(settings, None) is None
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    assert precision(settings, "bf16-mixed") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"accelerator": "cpu"},
        {"accelerator": "gpu", "precision": "32-true"},
        {"accelerator": "gpu", "plugins": MixedPrecision("bf16-mixed", "cpu")},
        {"accelerator": "gpu", "strategy": "ddp_fork"},  # would find CUDA in use
    ],
)
def test_what_is_set_or_has_no_gpu_is_left_alone(gpu, settings):
    assert precision(settings, None) is None


def test_a_run_goes_on_in_its_own_precision(gpu, tmp_path):
    folder = RunFolder(tmp_path)
    settings = {"accelerator": "gpu"}
    assert recorded_precision(folder) is None
    for recorded, expected in ((None, "32-true"), ("bf16-mixed", "bf16-mixed")):
        folder.config.write_text(yaml.safe_dump({"trainer": {"precision": recorded}}))
        assert recorded_precision(folder) is None  # no step of it is there
        folder.checkpoints.mkdir(exist_ok=True)
        folder.checkpoint(4).touch()
        assert precision(settings, recorded_precision(folder)) == expected
        folder.checkpoint(4).unlink()


@pytest.mark.e2e
def test_the_choice_reaches_the_trainer_and_the_record(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, command: None)
    monkeypatch.setattr(training, "precision", lambda settings, recorded: "bf16-mixed")
    cli = train(["fit", "--config", str(write_settings(tmp_path))])
    assert cli.trainer.precision == "bf16-mixed"
    assert cli._get_all().trainer.precision == "bf16-mixed"
