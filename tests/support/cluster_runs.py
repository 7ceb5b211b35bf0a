"""Runs of ``fit`` as jobs of the sandbox cluster, slow for as long as a test wants them to be.

The batch scripts are started unchanged; ``python`` is the one that needs no imports, as a site puts
its own on the path. ``tests/slurm/test_own_requeue.py`` has ranks that import.
"""

import json
from pathlib import Path

import torch
import yaml

from dist_siglip.runs import RunFolder
from tests.support.command import write_settings
from tests.support.forked_runs import warm_python
from tests.support.recording import global_batches
from tests.support.slurm_cluster import Job, SlurmCluster, wait_until

SMALL = ("--cpus-per-task=1", "--mem=500")


class ClusterRun:
    """A run folder, and the options every job of it is started with.

    Args:
        folder: of the run and its brake.
        settings: the configuration.
    """

    def __init__(self, folder: Path, settings: Path) -> None:
        self.run = RunFolder(folder)
        self.brake = folder.with_name(f"{folder.name}.slow")
        self.samples = folder.with_name(f"{folder.name}.samples")
        self.settings = settings

    def submit(self, cluster: SlurmCluster, script: str = "train.sbatch", ranks_per_node=1) -> Job:
        """Submit a batch script for this run on two nodes."""
        tasks = 1 if script == "train_torchrun.sbatch" else ranks_per_node
        options = (f"--ntasks-per-node={tasks}", f"--gpus-per-node={ranks_per_node}", *SMALL)
        arguments = ("--run_dir", self.run.path, *self.observed())
        return submit_warm(cluster, script, self.settings, *arguments, options=options)

    def observed(self) -> list[str]:
        """Options that make steps slow while the brake is on, and write down their samples."""
        return [
            "--trainer.callbacks+=tests.support.slow_steps.SlowSteps",
            f"--trainer.callbacks.while_exists={self.brake}",
            "--trainer.callbacks+=tests.support.recording.RecordSamples",
            f"--trainer.callbacks.folder={self.samples}",
        ]

    def newest(self) -> int:
        """Return the step of the newest checkpoint; 0 if there is none."""
        return max(self.run.steps_with_checkpoint(), default=0)

    def wait_for_checkpoint_after(self, step: int, job: Job) -> None:
        """Wait until a checkpoint is there that was written after a step."""

        def is_there() -> bool:
            assert job.state != "FAILED", job.output
            return self.newest() > step

        wait_until(is_there, lambda: job.output)

    def wait_for_batch_after(self, step: int, job: Job) -> None:
        """Wait until a step after this one is being made, and no stop at this one can be agreed."""
        wait_until(lambda: max(global_batches(self.samples), default=0) > step, lambda: job.output)

    def starts(self) -> list[int]:
        """Steps the run went on from, in turn, as its log tells."""
        lines = self.run.log.read_text().splitlines()
        return [int(line.split("step=")[1][:8]) for line in lines if "going on from" in line]

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """Return weights and the optimizer's moments at a checkpoint, by name."""
        content = torch.load(self.run.checkpoint(step), weights_only=True)
        moments = {
            f"{name} {key}": torch.as_tensor(value)
            for optimizer in content["optimizer_states"]
            for name, values in optimizer["state"].items()
            for key, value in values.items()
        }
        return {**content["state_dict"], **moments}

    def losses(self) -> dict[int, float]:
        """Return the loss of every step; the last one where a step was made twice."""
        lines = map(json.loads, self.run.metrics.read_text().splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def submit_warm(cluster: SlurmCluster, script: str, *arguments: object, options=()) -> Job:
    """Submit a batch script whose ``python`` needs no imports."""
    setup = warm_python().with_name("setup.sh")
    setup.write_text(f'export PATH="{setup.parent}:$PATH"\n')
    return cluster.submit(script, *arguments, options=options, DIST_SIGLIP_SETUP=str(setup))


def write_cluster_settings(folder: Path, max_steps: int) -> Path:
    """Write shards and a configuration that agrees and saves every few steps."""
    path = write_settings(folder, max_steps=max_steps, val_check_interval=max_steps)
    settings = yaml.safe_load(path.read_text())
    # After the first step of every start DDP lays out its buckets anew, and gloo rounds a sum of
    # four by its place in a bucket; this one leaves them as they are: bits can be compared.
    settings["trainer"]["strategy"] = "ddp_find_unused_parameters_true"
    settings["stop"] = {"agree_every_steps": 2}
    settings["checkpoint"] = {"every_steps": 5}
    path.write_text(yaml.safe_dump(settings))
    return path
