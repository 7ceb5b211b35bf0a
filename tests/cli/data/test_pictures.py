"""Pictures are seen alike by every command, and by a run of before as it always saw them."""

import pytest
import yaml

from dist_siglip.cli.run.start_point import check_same_run
from dist_siglip.cli.run.training import TrainingCLI, train
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
from dist_siglip.training.module import SigLipModule
from tests.support.shards import write_shards
from tests.support.tiny_models import ARCHITECTURES, write_config


@pytest.fixture
def built_command(tmp_path, monkeypatch):
    """Builds what ``fit`` would run, and runs nothing."""
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, command: None)
    shards = write_shards(tmp_path / "shards", (4,))
    model = write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    options = [f"--model.model={model}", f"--data.train_shards={shards[0]}"]
    options += ["--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'run'}"]
    return lambda *more: train(["fit", *options, *more])


def leave_a_run(command, folder, **settings):
    """Leave a configuration and the name of a checkpoint, as a run does."""
    config = yaml.safe_load(command._parser("fit").dump(command._get_all(), skip_none=False))
    for name, value in settings.items():
        if value is None:
            del config["data"][name]
        else:
            config["data"][name] = value
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(config))
    run.checkpoint(1).touch()
    return config


def test_a_new_run_lays_pictures_on_white_and_writes_it_down(built_command):
    command = built_command()
    settings = yaml.safe_load(command._parser("fit").dump(command._get_all(), skip_none=False))
    assert settings["data"]["transparency"] == "#ffffff"
    assert settings["data"]["exif_orientation"] == "ignore"
    assert command.datamodule.pictures == command.model.inputs.pictures
    assert isinstance(command.model, SigLipModule)


def test_what_is_asked_for_reaches_data_model_and_benchmarks(built_command):
    command = built_command(
        "--data.transparency=#102030",
        "--data.exif_orientation=apply",
        "--data.truncated_pictures=use",
        "--data.formats=[gif, png, bmp]",
        "--data.intensity_window=[0, 4095]",
    )
    for policy in (
        command.datamodule.pictures,
        command.model.inputs.pictures,
        command.model.built.pictures,
    ):
        assert policy.of_model == {"transparency": "#102030", "exif_orientation": "apply"}
        assert policy.truncated_pictures == "use"
        assert (policy.formats, policy.intensity_window) == (("png", "gif", "bmp"), (0.0, 4095.0))


def test_a_run_of_before_goes_on_with_alpha_dropped(built_command, tmp_path):
    new = dict.fromkeys(("transparency", "exif_orientation", "truncated_pictures"))
    leave_a_run(built_command(), tmp_path / "run", **new)
    command = built_command()
    assert command.datamodule.pictures.transparency == "drop"
    settings = yaml.safe_load(command._parser("fit").dump(command._get_all(), skip_none=False))
    check_same_run(command.folder, settings)
    changed = built_command("--data.transparency=white")
    settings = yaml.safe_load(changed._parser("fit").dump(changed._get_all(), skip_none=False))
    with pytest.raises(UserError, match=r"data\.transparency \('drop' in the folder, '#ffffff'"):
        check_same_run(changed.folder, settings)


def test_a_run_goes_on_as_it_began_without_saying_it_again(built_command, tmp_path):
    leave_a_run(built_command("--data.transparency=#102030"), tmp_path / "run")
    assert built_command().datamodule.pictures.transparency == "#102030"


def test_a_colour_without_quotes_in_yaml_is_refused(built_command, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data:\n  transparency: #102030\n")
    with pytest.raises((SystemExit, UserError)):
        built_command(f"--config={tmp_path / 'c.yaml'}")
