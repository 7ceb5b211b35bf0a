"""What would a run of this configuration need, and does it fit these ranks?"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dist_siglip.cli.doctor_page import Finding
from dist_siglip.cli.doctor_storage import ShardSet
from dist_siglip.cli.training import TrainingCLI, cli_settings
from dist_siglip.data.remote import CacheSettings
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.training.datamodule import ImageTextDataModule
from dist_siglip.training.module import SigLipModule


class RunNeeds(NamedTuple):
    """What a configuration says about folders, shards and ranks.

    Attributes:
        run_dir: the run folder.
        shard_sets: shards of each setting.
        global_batch_size: pairs over all ranks.
        devices: of each node, as the Trainer takes it.
        num_nodes: as the Trainer takes it.
        accelerator: as the Trainer takes it.
    """

    run_dir: str
    shard_sets: tuple[ShardSet, ...]
    global_batch_size: int
    devices: str | int | list[int]
    num_nodes: int
    accelerator: str


class _Reading(TrainingCLI):
    """Parses what ``fit`` would, and runs nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def read_needs(path: str) -> RunNeeds:
    """Parse the configuration of a run as ``fit`` does.

    Raises:
        UserError: if it cannot be parsed.
    """
    cli = _Reading(
        SigLipModule, ImageTextDataModule, args=["fit", "--config", path], **cli_settings()
    )
    config: Any = cli.config.fit
    data, trainer = config.data, config.trainer
    named = [(source.name, source.shards) for source in data.train_sources or []]
    named += [(name, data[name]) for name in ("train_shards", "val_shards") if data[name]]
    return RunNeeds(
        run_dir=config.run_dir,
        shard_sets=tuple(
            ShardSet(
                name=name,
                shards=shards,
                captions=CaptionRule(**data.captions.as_dict()),
                image_extensions=tuple(data.image_extensions),
                pictures=PicturePolicy().changed(
                    transparency=data.transparency,
                    exif_orientation=data.exif_orientation,
                    truncated_pictures=data.truncated_pictures,
                    max_image_pixels=data.max_image_pixels,
                ),
                cache=CacheSettings(**data.cache.as_dict()),
            )
            for name, shards in named
        ),
        global_batch_size=data.global_batch_size,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        accelerator=str(trainer.accelerator),
    )


def judge_needs(needs: RunNeeds, world_size: int, num_nodes: int) -> Iterator[Finding]:
    """Compare what a configuration asks for with the ranks there are.

    Args:
        needs: of the configuration.
        world_size: ranks that were started; 1 if no launcher did.
        num_nodes: that they are on; 0 if not known.
    """
    is_launched = world_size > 1
    ranks = world_size
    if isinstance(needs.devices, list):
        asked = len(needs.devices)
    else:
        asked = int(needs.devices) if str(needs.devices).isdecimal() else 0
    if not is_launched:
        here = 1 if needs.accelerator == "cpu" else max(1, torch.cuda.device_count())
        ranks = (asked or here) * needs.num_nodes
    problems = []
    if needs.global_batch_size % ranks:
        near = max(ranks, round(needs.global_batch_size / ranks) * ranks)
        text = f"global_batch_size ({needs.global_batch_size}) is not divisible by {ranks} ranks"
        problems.append(Finding("FAIL", "configuration", text, f"set it to {near}"))
    if is_launched and num_nodes and asked and asked * needs.num_nodes != world_size:
        text = (
            f"trainer asks for {needs.num_nodes} nodes of {asked} devices, and {world_size} ranks "
            f"were started on {num_nodes}"
        )
        remedy = (
            f"--trainer.num_nodes {num_nodes} --trainer.devices {world_size // num_nodes}, as "
            "train.sbatch says it"
        )
        problems.append(Finding("warn", "configuration", text, remedy))
    if needs.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        text = f"trainer.accelerator is {needs.accelerator}, and this rank has no GPU"
        problems.append(Finding("FAIL", "configuration", text, "ask the job for GPUs"))
    text = (
        f"global batch of {needs.global_batch_size}, {needs.global_batch_size // ranks} for each "
        f"of {ranks} ranks"
    )
    yield from problems or [Finding("ok", "configuration", text)]
