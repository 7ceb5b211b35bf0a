"""What a Trainer gets that its settings leave open."""

import pytest
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from dist_siglip.cli.run import training
from dist_siglip.cli.run.start_point import recorded_precision
from dist_siglip.cli.run.trainer_parts import cuda, precision, spare_copies
from dist_siglip.cli.run.training import TrainingCLI, train
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.processes import run_ranks
from tests.support.sharded_ranks import train as train_case
from tests.support.tiny_models import ARCHITECTURES, write_config


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


@pytest.mark.e2e
def test_a_rank_that_is_not_the_first_builds_a_model_without_values(monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, command: None)
    arguments = ["fit", "--config", str(write_settings(tmp_path))]
    first = train(arguments)
    assert not any(value.is_meta for value in first.model.parameters())
    monkeypatch.setattr(training, "is_first_process", lambda: False)
    other = train(arguments)
    assert all(value.is_meta for value in other.model.parameters())
    dumped = [cli._parser("fit").dump(cli._get_all(), skip_none=False) for cli in (first, other)]
    assert dumped[0] == dumped[1]
    with pytest.raises(UserError, match="not the first process, and the Trainer runs alone"):
        other.model.configure_model()


def test_ddp_copies_no_gradients_and_buffers_of_batch_norm_alone():
    for layer, sends in ((torch.nn.LayerNorm(2), False), (torch.nn.BatchNorm1d(2), True)):
        strategy = DDPStrategy()
        spare_copies(strategy, torch.nn.Sequential(layer))
        assert strategy._ddp_kwargs == {
            "gradient_as_bucket_view": True,
            "broadcast_buffers": sends,
        }
    given = DDPStrategy(gradient_as_bucket_view=False, broadcast_buffers=True)
    spare_copies(given, torch.nn.LayerNorm(2))
    assert given._ddp_kwargs == {"gradient_as_bucket_view": False, "broadcast_buffers": True}


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["siglip", "resnet"])
def test_ranks_train_to_the_same_bits_with_and_without(tmp_path, kind):
    """A transformer, and a tower whose BatchNorm has statistics of its own on each rank."""
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES[kind])
    for plain, ours in run_ranks(_train_both_ways, 2, model, str(tmp_path), kind):
        assert ours["losses"] == plain["losses"]
        assert ours["norm"] == plain["norm"]
        for name, value in plain["state"].items():
            assert torch.equal(ours["state"][name], value), name


def _train_both_ways(rank, world_size, model, folder, kind):
    plain, ours = DDPStrategy(), DDPStrategy()
    spare_copies(ours, torch.nn.BatchNorm1d(1) if kind == "resnet" else torch.nn.Identity())
    return [
        train_case(model, folder, {"trainer": {"strategy": each}, "kind": kind}, rank, world_size)
        for each in (plain, ours)
    ]
