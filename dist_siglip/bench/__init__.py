"""``bench``: what training costs: measured here, predicted for a cluster, simulated."""

from collections.abc import Sequence

from dist_siglip.cli.parser import run_subcommand

SUBCOMMANDS = {
    "loss": ("dist_siglip.bench.loss", "time and memory beside other losses, on this machine"),
    "data": ("dist_siglip.bench.data", "images/s of our loader beside open_clip's"),
    "train": (
        "dist_siglip.bench.train",
        "samples/s of a whole run, where its time goes, open_clip_train beside it",
    ),
    "naflex": (
        "dist_siglip.bench.naflex",
        "an image tower at each sequence length, beside that of squares",
    ),
    "checkpoint": (
        "dist_siglip.bench.checkpoint",
        "what a checkpoint costs training, at once or in the background",
    ),
    "plan": ("dist_siglip.bench.plan", "predicted cost of every exchange on a cluster"),
    "simulate": (
        "dist_siglip.bench.simulate",
        "one rank of a large world, run on this machine",
    ),
}


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse ``bench SUBCOMMAND ...`` and run the subcommand."""
    return run_subcommand(command, SUBCOMMANDS, arguments)
