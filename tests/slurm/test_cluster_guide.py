"""The guide of a cluster run: its batch script on a real SLURM, and what follows it."""

import re
import shlex

import pytest
import yaml

from tests.support.cluster_runs import SMALL, submit_warm, write_cluster_settings
from tests.support.command import REPOSITORY
from tests.support.forked_runs import run_forked

PAGE = (REPOSITORY / "docs/guides/cluster.md").read_text(encoding="utf-8")


def commands(start):
    """Commands of the page that begin so, each as words."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        found += [shlex.split(line) for line in lines if line.startswith(start)]
    return found


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_cluster_settings(tmp_path_factory.mktemp("settings"), 6)


def test_a_cluster_run_ends_as_a_folder_with_a_card(cluster, settings, tmp_path):
    data = yaml.safe_load(settings.read_text())["data"]
    run = str(tmp_path / "shared/runs/b16")
    replaced = {
        "configs/siglip_vit_b16.yaml": str(settings),
        "/shared/runs/b16": run,
        "/shared/runs/b16/config.yaml": f"{run}/config.yaml",
        "/shared/train": str(data["train_shards"]),
        "/shared/val": str(data["val_shards"]),
        "exports/b16": str(tmp_path / "exports/b16"),
    }

    def words(start):
        (command,) = commands(start)
        return [replaced.get(word, word) for word in command]

    recipe = str(REPOSITORY / "configs/siglip_vit_b16.yaml")  # its batch suits four nodes
    render = [recipe if word == str(settings) else word for word in words("dist-siglip slurm")]
    assert "#SBATCH --nodes=4" in run_forked(*render[1:]).stderr
    _, script, *arguments = words("sbatch ")
    assert script == "slurm/train.sbatch"
    options = ("--ntasks-per-node=1", "--gpus-per-node=1", *SMALL)
    job = submit_warm(cluster, "train.sbatch", *arguments, options=options)
    job.wait_for("COMPLETED", "FAILED")
    assert job.exit_code == 0, job.output
    for start in ("report", "validate", "export"):
        done = run_forked(*words(f"dist-siglip {start}")[1:])
        assert done.returncode == 0, done.stderr
    assert "logit of a pair" in (tmp_path / "exports/b16/README.md").read_text()
