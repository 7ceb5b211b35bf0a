"""A mistake of the user is one line with the value and the remedy, code 2, and nothing written."""

import re

import pytest
import torch
import yaml

from dist_siglip.cli import main
from tests.support.command import write_settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_settings(tmp_path_factory.mktemp("errors"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An empty folder, and weights of another model."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    torch.save({"visual.conv1.weight": torch.zeros(3, 3)}, folder / "other.pt")
    return folder


CASES = {
    "missing shard": (
        ["--data.train_shards={wrong}/none-{{00..03}}.tar"],
        r"train_shards .* 4 missing files, first .*none-00\.tar",
    ),
    "empty folder": (["--data.train_shards={wrong}/empty"], "empty"),
    "unknown model": (["--model.model=ViT-B-99"], r"model \(ViT-B-99\) is unknown; did you mean"),
    "unknown tag": (
        ["--model.model=ViT-B-32", "--model.pretrained=laion99"],
        r"pretrained \(laion99\)",
    ),
    "weights of another model": (
        ["--model.pretrained={wrong}/other.pt"],
        r"other\.pt.*",
    ),
    "indivisible batch": (
        ["--data.global_batch_size=13", "--trainer.devices=2"],
        r"global_batch_size \(13\) must be divisible by world_size \(2\); use 12 or 14",
    ),
    "batch above the data": (["--data.global_batch_size=96"], r"global_batch_size \(96\)"),
    "unknown key": (["--model.modle=x"], r"key \(model\.modle\) is unknown; did you mean model"),
    "weight of a source": (
        [
            "--data.train_shards=null",
            '--data.train_sources=[{{"name": "a", "shards": "x.tar", "weight": -1}}]',
        ],
        r"data.train_sources\[0\].weight \(-1.0\) must be above 0",
    ),
    "unknown exchange": (["--model.loss.init_args.exchange=rings"], r"rings"),
    "wrong learning rate": (["--model.optim.learning_rate=-1"], r"learning_rate \(-1\.0\)"),
    "accumulation": (
        ["--trainer.accumulate_grad_batches=2"],
        r"accumulate_grad_batches \(2\) must be 1: accumulation changes a contrastive loss",
    ),
    "no length": (["--trainer.max_steps=-1"], r"trainer\.max_steps \(-1\) must be at least 1"),
    "missing checkpoint": (["--ckpt_path={wrong}/none.ckpt"], r"none\.ckpt\) does not exist"),
}


@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_nothing_is_written(case, settings, folders, tmp_path, capsys):
    options, message = CASES[case]
    run = tmp_path / "run"
    arguments = ["fit", "--config", str(settings), f"--run_dir={run}"]
    code = main([*arguments, *(option.format(wrong=folders) for option in options)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("dist-siglip: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not run.exists()


def test_an_unknown_key_in_a_file_is_named(settings, tmp_path, capsys):
    content = yaml.safe_load(settings.read_text())
    content["data"]["global_batchsize"] = 4
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(tmp_path / "wrong.yaml")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "data.global_batchsize" in line
    assert "did you mean data.global_batch_size?" in line


def test_an_unknown_verb_is_named(capsys):
    assert main(["fti"]) == 2
    assert "there is no command 'fti'; did you mean fit?" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps=0", "--devices=0", "--seed=-1"])
def test_quickstart_refuses_impossible_numbers(option, tmp_path, capsys):
    assert main(["quickstart", f"--out={tmp_path / 'q'}", option]) == 2
    assert "must be at least" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_no_verb_is_a_mistake_with_help(capsys):
    assert main([]) == 2
    assert "usage: dist-siglip COMMAND" in capsys.readouterr().out
