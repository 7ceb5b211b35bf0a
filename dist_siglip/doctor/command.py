"""Checks of ``doctor``, those of a configuration among them, and the page it shows.

Alone it looks at this machine; started as training is, by srun or torchrun, at every rank and at
what is between them. Every wait has a limit, so that a rank or a file system that hangs is named.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_siglip.cli.parser import CommandParser, call, parser_of_function
from dist_siglip.cli.run.training import TrainingCLI, cli_settings
from dist_siglip.data.order.position import SEQUENCE_LENGTHS
from dist_siglip.data.remote import CacheSettings
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.loader import Feed
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS, PicturePolicy, with_formats
from dist_siglip.doctor.gpu import accept
from dist_siglip.doctor.machine import Plan
from dist_siglip.doctor.page import Finding, render
from dist_siglip.doctor.storage import ShardSet
from dist_siglip.doctor.together import (
    Features,
    Launch,
    Outcome,
    detect_launch,
    examine_alone,
    examine_together,
)
from dist_siglip.errors import UserError
from dist_siglip.models.architecture import override_architecture
from dist_siglip.models.naflex import is_naflex
from dist_siglip.models.weight_source import HF_HUB, resolve_model
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
        workers_per_rank: loader processes.
        prefetch_factor: batches that those of a rank prepare ahead.
        picture: height and width that the model is fed.
    """

    run_dir: str
    shard_sets: tuple[ShardSet, ...]
    global_batch_size: int
    devices: str | int | list[int]
    num_nodes: int
    accelerator: str
    workers_per_rank: int = 0
    prefetch_factor: int = 2
    picture: tuple[int, int] = (224, 224)


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
                image_extensions=with_formats(data.image_extensions, data.formats),
                pictures=PicturePolicy().changed(
                    transparency=data.transparency,
                    exif_orientation=data.exif_orientation,
                    truncated_pictures=data.truncated_pictures,
                    max_image_pixels=data.max_image_pixels,
                    formats=tuple(data.formats),
                    intensity_window=data.intensity_window,
                ),
                cache=CacheSettings(**data.cache.as_dict()),
            )
            for name, shards in named
        ),
        global_batch_size=data.global_batch_size,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        accelerator=str(trainer.accelerator),
        workers_per_rank=data.workers_per_rank,
        prefetch_factor=data.prefetch_factor,
        picture=_picture_size(config.model, data.sequence_lengths),
    )


def _picture_size(model: Any, lengths: list[int] | None) -> tuple[int, int]:
    """Height and width of what a model sees; that of most where a server would have to say.

    Of pictures of any shape that of the longest strip of patches.
    """
    image_size: int | None = model.image_size
    size: int | list[int] = image_size or 224
    if image_size is None and not model.model.startswith(HF_HUB):
        architecture = override_architecture(
            resolve_model(model.model, with_weights=False).architecture,
            num_patches=model.num_patches,
            name=model.model,
        )
        vision = architecture["vision_cfg"]
        size = vision.get("image_size", size)
        if is_naflex(architecture):
            patch: int = vision.get("patch_size") or 16
            return patch, patch * max(lengths or SEQUENCE_LENGTHS)
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def judge_needs(needs: RunNeeds, world_size: int, num_nodes: int) -> Iterator[Finding]:
    """Compare what a configuration asks for with the ranks there are.

    Args:
        needs: of the configuration.
        world_size: ranks that were started; 1 if no launcher did.
        num_nodes: that they are on; 0 if not known.
    """
    is_launched = world_size > 1
    asked = _asked_devices(needs)
    ranks, of_node = _ranks(needs, world_size, num_nodes)
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
    if needs.workers_per_rank:
        free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
        yield judge_feed(needs, max(1, needs.global_batch_size // ranks), of_node, free)


def _asked_devices(needs: RunNeeds) -> int:
    """Devices of a node that the configuration names; 0 if it takes what there is."""
    if isinstance(needs.devices, list):
        return len(needs.devices)
    return int(needs.devices) if str(needs.devices).isdecimal() else 0


def _ranks(needs: RunNeeds, world_size: int, num_nodes: int) -> tuple[int, int]:
    """Ranks of the run, and of a node of it."""
    if world_size > 1:
        return world_size, -(-world_size // max(1, num_nodes))
    here = 1 if needs.accelerator == "cpu" else max(1, torch.cuda.device_count())
    of_node = _asked_devices(needs) or here
    return of_node * needs.num_nodes, of_node


def judge_feed(needs: RunNeeds, local_batch: int, ranks: int, free_bytes: int) -> Finding:
    """Compare what loader processes of a node have ready with its shared memory.

    Args:
        needs: of the configuration.
        local_batch: pairs of a rank.
        ranks: of a node.
        free_bytes: of its shared memory.

    Example:
        >>> needs = RunNeeds("runs/a", (), 32768, 8, 1, "gpu", workers_per_rank=8)
        >>> judge_feed(needs, 4096, 8, 64 << 30).text.split("have ")[1]
        'at most 13.8 GiB of pictures in shared memory, of 64.0 free'
    """
    feed = Feed(local_batch, needs.workers_per_rank, needs.prefetch_factor)
    most = feed.picture_bytes(*needs.picture) * ranks
    text = (
        f"{ranks} ranks x {needs.workers_per_rank} loader processes have at most "
        f"{most / 2**30:.1f} GiB of pictures in shared memory, of {free_bytes / 2**30:.1f} free"
    )
    if most <= free_bytes:
        return Finding("ok", "loaders", text)
    remedy = (
        "give the container more (docker: --shm-size, --ipc=host), or lower data.prefetch_factor "
        "or data.workers_per_rank"
    )
    return Finding("warn", "loaders", text, remedy)


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse the options of ``doctor`` and run it."""
    return call(doctor, parser(command), arguments)


def parser(command: str) -> CommandParser:
    """Return the parser of the options: the signature of ``doctor``."""
    return parser_of_function(command, doctor)


def doctor(
    config: str | None = None,
    run_dir: str | None = None,
    shards: str | list[str] | None = None,
    captions: CaptionRule = CaptionRule(),  # noqa: B008 - frozen dataclass
    image_extensions: tuple[str, ...] = PICTURE_EXTENSIONS,
    cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen dataclass
    num_shards: int = 4,
    write_mib: int = 64,
    local_batch_size: int = 2048,
    embed_dim: int = 512,
    timeout_seconds: float = 90.0,
    gpu: str | None = None,
) -> int:
    """Look at machines, ranks, run folder and shards; exit code 1 if a run would fail.

    Started like training (srun dist-siglip doctor, torchrun -m dist_siglip doctor) it looks at all
    ranks and what is between them; alone, at this machine. It trains nothing and leaves nothing in
    the run folder.

    Args:
        config: configuration of a run, whose folder, shards and batch are looked at.
        run_dir: run folder, in place of the configuration's.
        shards: file, folder, pattern, list file or URL, or a JSON list of these, in place of the
            configuration's.
        captions: where the captions of shards are; a configuration says it for its own.
        image_extensions: members of shards that are the picture of a sample.
        cache: copies of remote shards.
        num_shards: shards of each setting that are opened.
        write_mib: MiB written to the run folder.
        local_batch_size: rows of features each rank sends through every exchange.
        embed_dim: width of these features.
        timeout_seconds: longest wait for other ranks, and for what is looked at; inside a process
            group a third of it.
        gpu: folder for the JSON and the page of the acceptance run on the first GPU of this
            machine, ten minutes at most (five on a GPU below 64 GiB); nothing else is looked at.
            Null: no such run.
    """
    if gpu is not None:
        return accept(gpu)
    numbers = {
        "num_shards": num_shards,
        "write_mib": write_mib,
        "local_batch_size": local_batch_size,
        "embed_dim": embed_dim,
        "timeout_seconds": timeout_seconds,
    }
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} ({value}) must be at least 1")
    launch = detect_launch(os.environ)
    if launch.is_silent:
        return 1
    needs, told = _read(config)
    sets = needs.shard_sets if needs else ()
    if shards is not None:
        sets = (ShardSet("shards", shards, captions, image_extensions, PicturePolicy(), cache),)
    folder = run_dir or (needs.run_dir if needs else None)
    plan = Plan(Path(folder) if folder else None, sets, num_shards, write_mib * 2**20)
    told += [launch.complaint] if launch.complaint else []
    if launch.world.world_size == 1:
        outcome = examine_alone(launch, plan, timeout_seconds)
    else:
        features = Features(local_batch_size, embed_dim)
        outcome = examine_together(launch, plan, features, timeout_seconds)
    if needs is not None:
        told += judge_needs(needs, launch.world.world_size, outcome.num_nodes)
    return _leave(launch, [*told, *outcome.findings], outcome)


def _read(config: str | None) -> tuple["RunNeeds | None", list[Finding]]:
    """Parse the configuration, if there is one; what is wrong with it is a finding."""
    if config is None:
        return None, []
    try:
        return read_needs(config), []
    except UserError as error:
        return None, [Finding("FAIL", "configuration", str(error), "mend it: fit refuses it")]


def _leave(launch: Launch, findings: list[Finding], outcome: Outcome) -> int:
    """Show the page, where this process speaks, and return the exit code."""
    code = int(outcome.has_failed or any(finding.status == "FAIL" for finding in findings))
    if outcome.speaks:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        size = launch.world.world_size
        who = launch.host if size == 1 else f"rank {launch.world.rank} of {size} ({launch.host})"
        sys.stdout.write(render(f"dist-siglip doctor on {who}, {now}", findings) + "\n")
        sys.stdout.flush()
    if outcome.has_hung:
        # A thread that never comes back would hold the process.
        os._exit(code)
    return code
