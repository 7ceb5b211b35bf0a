"""The quickstart as a newcomer runs it, shortened; killed and gone on with by ``fit``."""

import json
import shutil
import tarfile

import pytest
import torch

from dist_siglip.runs import RunFolder
from tests.support.command import kill_when, run_command
from tests.support.forked_runs import run_forked, warm_python

pytestmark = pytest.mark.e2e

STEPS = 60  # one checkpoint at 50 on the way, and far too few for the floor


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    words = ["quickstart", f"--out={folder}", f"--steps={STEPS}"]
    return folder, run_command(*words, python=warm_python())


def losses(folder):
    lines = map(json.loads, RunFolder(folder).metrics.read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_too_few_steps_print_the_table_and_fail_the_floor(short):
    folder, done = short
    assert done.returncode == 1, done.stderr
    assert "is below the floor (0.5)" in done.stderr
    printed = " ".join(done.stdout.split())
    for words in (
        "gallery of 500 pairs",
        "recall@1",
        "median rank",
        "an identical caption counts as a hit",
        "modality gap",
        "margin",
        "relative bias",
        "training pairs per second",
    ):
        assert words in printed, words
    assert done.stdout.splitlines()[-2:] == [
        f"run folder: {folder}",
        f"report: {RunFolder(folder).report}",
    ]
    assert RunFolder(folder).report.is_file()


def json_members(shard):
    with tarfile.open(shard) as archive:
        for member in archive:
            if member.name.endswith(".json"):
                yield json.load(archive.extractfile(member))


def test_no_handwriting_is_in_both_splits(short):
    """The members of the shards say which rows of load_digits they show."""
    used = {}
    for split in ("train", "val"):
        shards = sorted((short[0] / "data").glob(f"{split}-*.tar"))
        notes = [note for shard in shards for note in json_members(shard)]
        rows = {row for note in notes for row in note["handwriting"]}
        used[split] = (len(notes), len(shards), rows)
    assert used["train"][0] >= 20_000
    assert used["train"][1] >= 8
    assert used["val"][0] == 500
    assert used["train"][2].isdisjoint(used["val"][2])


def test_killed_midway_and_gone_on_with_fit_ends_the_same(short, tmp_path):
    """SIGKILL of every process after the first checkpoint; ``fit`` on the folder finishes it.

    What happens until that checkpoint is that of the other run: it is not made again.
    """
    folder = RunFolder(tmp_path / "run")
    copy_until(50, RunFolder(short[0]), folder)
    begun = "training from step 50"
    kill_when(
        ["quickstart", f"--out={folder.path}", f"--steps={STEPS}"],
        lambda: begun in folder.log.read_text(),
        python=warm_python(),
    )
    assert folder.steps_with_checkpoint() == [50]
    done = run_forked("fit", "--config", folder.config, world_size=2)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    uninterrupted = losses(short[0])
    resumed = losses(folder.path)
    assert resumed.keys() | {50} == uninterrupted.keys()
    # Another order of samples would change every loss after step 50.
    assert resumed == pytest.approx({s: uninterrupted[s] for s in resumed}, rel=1e-5)
    for ours, theirs in zip(
        weights(folder).values(), weights(RunFolder(short[0])).values(), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def copy_until(step, source, target):
    """Copy what a run has left behind by a checkpoint."""
    shutil.copytree(source.path, target.path)
    target.checkpoint(STEPS).unlink()
    target.report.unlink()
    shutil.rmtree(target.evaluation)
    lines = source.metrics.read_text().splitlines(keepends=True)
    target.metrics.write_text("".join(x for x in lines if json.loads(x)["step"] <= step))


def weights(folder):
    return torch.load(folder.checkpoint(STEPS), weights_only=True)["state_dict"]


def test_a_second_call_shows_the_finished_run(short):
    folder, _ = short
    before = RunFolder(folder).checkpoint(STEPS).stat().st_mtime_ns
    done = run_forked("quickstart", f"--out={folder}", f"--steps={STEPS}")
    assert done.returncode == 1
    assert f"is complete: step {STEPS} of {STEPS}" in done.stderr
    assert RunFolder(folder).checkpoint(STEPS).stat().st_mtime_ns == before


def test_another_seed_in_the_folder_is_refused(short):
    done = run_forked("quickstart", f"--out={short[0]}", "--seed=1")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "seed" in line
