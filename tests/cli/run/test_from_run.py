"""``fit --from_run``: a second run goes on as the first would have, and says where it came from."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from dist_siglip.cli.run.from_run import checkpoint_of, folder_of_settings, split
from dist_siglip.cli.run.training import TrainingCLI
from dist_siglip.errors import UserError
from dist_siglip.runs import RunFolder
from tests.cli.run.test_fit import losses, recording
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked
from tests.support.recording import global_batches

STOP, STEPS = 8, 15  # of 6 steps an epoch; evaluations are due at 10
HEADS = json.dumps(
    [{"class_path": "dist_siglip.objectives.Captioning", "init_args": {"layers": 1}}]
)


def test_what_from_run_names(tmp_path):
    for text, expected in (
        ("runs/a", ("runs/a", "")),
        ("runs/a:500", ("runs/a", "500")),
        ("runs/a:step=00000500.ckpt", ("runs/a", "step=00000500.ckpt")),
        ("runs/a/checkpoints/step=00000500.ckpt", ("runs/a", "step=00000500.ckpt")),
    ):
        folder, which = split(text)
        assert (folder.path.as_posix(), which) == expected
    odd = tmp_path / "a:500"  # a folder that is named so
    odd.mkdir()
    assert split(str(odd)) == (RunFolder(odd), "")
    own = RunFolder(tmp_path / "run")
    assert folder_of_settings(own, None) == own
    assert folder_of_settings(own, "runs/a:500").path.as_posix() == "runs/a"
    own.checkpoints.mkdir(parents=True)
    own.checkpoint(3).touch()
    assert folder_of_settings(own, "runs/a") == own


def test_a_run_of_damaged_checkpoints_is_named_as_it_was_given(tmp_path):
    source = RunFolder(tmp_path / "first")
    source.checkpoints.mkdir(parents=True)
    source.checkpoint(3).touch()
    with pytest.raises(UserError, match=r"from_run \(.*first\) has 1 .* name another run$"):
        checkpoint_of(str(source.path), RunFolder(tmp_path / "second"), torch.nn.Linear(1, 1))


def test_a_folder_that_has_not_begun_is_not_evaluated_as_built(tmp_path):
    settings = {"from_run": "runs/first"}
    command = SimpleNamespace(
        folder=RunFolder(tmp_path / "second"),
        model=None,
        config=settings,
        _get=lambda config, name: config.get(name),
        _choose=lambda choose: choose(),
    )
    with pytest.raises(UserError, match=r"from_run \(runs/first\) is where fit begins") as caught:
        TrainingCLI.choose_to_look_at(command)
    assert "\n" not in str(caught.value)
    settings.clear()
    assert TrainingCLI.choose_to_look_at(command) is None


def evaluated(run):
    lines = map(json.loads, RunFolder(run).metrics.read_text().splitlines())
    return {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run to its end, and one that leaves off in the middle of its schedule."""
    folder = tmp_path_factory.mktemp("runs")
    settings = write_settings(folder, max_steps=STEPS)
    for name, steps in (("whole", STEPS), ("first", STOP)):
        words = ["--run_dir", folder / name, "--trainer.max_steps", steps]
        words += ["--model.optim.schedule_steps", STEPS, *recording(folder / f"{name}-order")]
        done = run_forked("fit", "--config", settings, *words)
        assert done.returncode == 0, done.stderr
    return folder


def go_on(runs, run_dir, *more, from_run=None, **options):
    words = ["--run_dir", run_dir, "--from_run", from_run or runs / "first", *more]
    return run_forked("fit", "--config", runs / "settings.yaml", *words, **options)


@pytest.mark.e2e
def test_a_second_run_takes_the_steps_that_the_first_would_have_taken(runs, tmp_path):
    run = RunFolder(tmp_path / "second")
    done = go_on(runs, run.path, "--trainer.max_steps", 11, *recording(tmp_path / "order"))
    assert done.returncode == 2, done.stderr  # another length of a cosine
    assert "learning rate would jump" in done.stderr
    assert not run.path.exists()
    words = ["--model.optim.schedule_steps", STEPS, *recording(tmp_path / "order")]
    done = go_on(runs, run.path, "--trainer.max_steps", 11, *words)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {STOP} of {runs / 'first'}" in done.stderr
    # The same command again, as a requeued job has it: its own checkpoint, not the other run's.
    done = go_on(runs, run.path, *words)
    assert done.returncode == 0, done.stderr
    assert "step=00000011.ckpt" in done.stderr
    ours, whole = (
        torch.load(RunFolder(each).checkpoint(STEPS), weights_only=True)
        for each in (run.path, runs / "whole")
    )
    for name, value in whole["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    (theirs,), (states,) = whole["optimizer_states"], ours["optimizer_states"]
    for name, state in theirs["state"].items():
        assert all(torch.equal(states["state"][name][key], state[key]) for key in state), name
    assert states["param_groups"] == theirs["param_groups"]
    assert ours["ImageTextDataModule"] == whole["ImageTextDataModule"]
    expected = {step: loss for step, loss in losses(runs / "whole").items() if step > STOP}
    assert losses(run.path) == expected
    order = global_batches(runs / "whole-order")
    assert global_batches(tmp_path / "order") == {s: order[s] for s in range(STOP + 1, STEPS + 1)}
    # It was evaluated where it began, which the first run was at its end.
    found = evaluated(run.path)
    assert found[STOP] == evaluated(runs / "first")[STOP]
    assert {10, STEPS} <= found.keys()
    assert found[STEPS] == evaluated(runs / "whole")[STEPS]
    lineage = [{"run": str(runs / "first"), "checkpoint": "step=00000008.ckpt", "step": STOP}]
    assert json.loads(run.provenance.read_text())["lineage"] == lineage
    assert ours["lineage"] == lineage
    assert yaml.safe_load(run.config.read_text())["from_run"] == str(runs / "first")
    done = go_on(runs, run.path, from_run=runs / "whole")
    assert done.returncode == 2
    assert "holds another run: from_run" in done.stderr


@pytest.mark.e2e
def test_a_third_run_has_more_objectives_larger_pictures_and_both_names_in_its_lineage(
    runs, tmp_path
):
    end = ["--model.optim.schedule_steps", STEPS]
    words = ["--trainer.max_steps", 10, *end, "--model.objectives", HEADS]
    done = go_on(runs, tmp_path / "second", *words, from_run=f"{runs / 'first'}:{STOP}")
    assert done.returncode == 0, done.stderr
    said = "fresh: objectives.captioning ("
    assert said in done.stderr
    assert "other settings: model.objectives" in done.stderr
    words = ["--trainer.max_steps", 12, *end, "--model.objectives", HEADS]
    words += ["--model.image_size", 48, "--trainer.devices", 2]
    done = go_on(runs, tmp_path / "third", *words, from_run=tmp_path / "second", world_size=2)
    assert done.returncode == 0, done.stderr
    assert "resampled: towers.clip (1)" in done.stderr
    assert said not in done.stderr
    lineage = json.loads(RunFolder(tmp_path / "third").provenance.read_text())["lineage"]
    assert [(each["run"], each["step"]) for each in lineage] == [
        (str(runs / "first"), STOP),
        (str(tmp_path / "second"), 10),
    ]
    assert list(losses(tmp_path / "third")) == [11, 12]
    state = torch.load(RunFolder(tmp_path / "third").checkpoint(12), weights_only=True)
    assert state["state_dict"]["towers.clip.visual.positional_embedding"].shape[0] == 1 + 6 * 6
    counts = {
        name: int(each["step"]) for name, each in state["optimizer_states"][0]["state"].items()
    }
    assert counts["objectives.captioning.output.weight"] == 4
    assert counts["towers.clip.visual.positional_embedding"] == 2
    assert counts["towers.clip.visual.class_embedding"] == 12
    # What uses the model needs neither the runs before nor the heads.
    out = tmp_path / "export"
    done = run_forked("export", "--run_dir", tmp_path / "third", "--to=open_clip", "--out", out)
    assert done.returncode == 0, done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.global_batch_size", 24], "global_batch_size was 12 .* is 24 now; set it back"),
        (["--seed_everything", 4], "seed was 3 when"),
        (
            ["--trainer.max_steps", STOP],
            rf"at step {STOP} and trainer.max_steps .* none",
        ),
        (["--model.logits.bias_parameterization", "relative"], "of another architecture: missing"),
        (["--from_run", "FIRST:3"], "has no such checkpoint; its steps are 4, 8"),
        (["--from_run", "FIRST/../none"], "is no folder of a run"),
        (["--from_run", "FIRST/.."], "has no such checkpoint; its steps are none"),
        (["--run_dir", "FIRST"], "is run_dir itself|holds another run: from_run"),
        (["--ckpt_path", "FIRST/checkpoints/step=00000008.ckpt"], "both name a start"),
        (["--model.optim.optimizer", "torch.optim.SGD"], "optimizer .*SGD.* was None in from_run"),
    ],
    ids=str,
)
def test_what_does_not_go_on_is_refused_in_one_line_and_leaves_nothing(runs, tmp_path, words, said):
    before = sorted(path.name for path in (runs / "first").iterdir())
    words = [str(word).replace("FIRST", str(runs / "first")) for word in words]
    done = go_on(runs, tmp_path / "second", *words)
    assert done.returncode == 2, done.stderr
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("dist-siglip: error")]
    assert re.search(said, line)
    assert not (tmp_path / "second").exists()
    assert sorted(path.name for path in (runs / "first").iterdir()) == before
