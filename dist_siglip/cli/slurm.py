"""``slurm``: a batch script for a run, printed, or printed and submitted.

The scripts in ``slurm/`` are complete; a job replaces their resources, adds lines for the site, and
puts the run in the place of the arguments. Nothing else is changed: what is printed is submitted.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from dist_siglip.cli.parser import CommandParser, introduction_of
from dist_siglip.errors import UserError, check_least
from dist_siglip.system.regular_file import read_regular
from dist_siglip.system.yaml_text import MOST_BYTES, load_yaml

Script = Literal["train", "train_torchrun", "train_container", "sweep_array"]
Runtime = Literal["pyxis", "apptainer"]

_FOLDER = Path(__file__).parent / "slurm_scripts"
_NAME = re.compile(r"[A-Za-z0-9][\w.,+@-]*")
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)")
# Its signal may come so much too early.
_EARLY_SECONDS = 60


@dataclass(frozen=True)
class SlurmJob:
    """Resources, site and run of a job.

    On the command line, what follows -- goes to dist-siglip fit.

    Args:
        config: configuration of the run, a file.
        run_dir: folder of the run, on a file system all nodes share; of a sweep, the folder of its
            runs.
        script: which batch script; train fits most clusters.
        nodes: number of nodes, of each run.
        gpus_per_node: GPUs of each node, which is also the ranks of each node.
        cpus_per_gpu: CPUs of each rank.
        time: limit of each start, as [DAYS-]HH:MM:SS.
        save_seconds: seconds before the limit, or earlier, at which ranks are asked to save.
        job_name: name of the job in the queue and of its output.
        partition: partition; null takes the cluster's default.
        account: account that is charged; null takes yours.
        directives: further options of sbatch, such as --constraint=a100.
        setup: script that is sourced on the nodes first: modules, a virtual environment.
        max_requeues: times the job may be requeued, by a stop or by SLURM.
        sweep: for sweep_array: a file with options of fit, a line for each run.
        at_once: for sweep_array: runs at a time.
        container: for train_container: what starts containers.
        image: for train_container: the image.
        mounts: for train_container: folders the container sees.

    Raises:
        UserError: if a value is out of range, or does not go with the script.
    """

    config: str
    _: KW_ONLY
    run_dir: str
    script: Script = "train"
    nodes: int = 2
    gpus_per_node: int = 8
    cpus_per_gpu: int = 12
    time: str = "24:00:00"
    save_seconds: int = 180
    job_name: str = "dist-siglip"
    partition: str | None = None
    account: str | None = None
    directives: Sequence[str] = ()
    setup: str | None = None
    max_requeues: int = 100
    sweep: str | None = None
    at_once: int = 2
    container: Runtime | None = None
    image: str | None = None
    mounts: str | None = None

    def __post_init__(self) -> None:
        names = ("nodes", "gpus_per_node", "cpus_per_gpu", "at_once", "save_seconds")
        check_least(1, **{name: getattr(self, name) for name in names})
        check_least(0, max_requeues=self.max_requeues)
        for name in ("job_name", "partition", "account"):
            value = getattr(self, name)
            if value is not None and not _NAME.fullmatch(value):
                raise UserError(f"{name} ({value}) may have letters, digits and . , + @ _ - only")
        if self.job_name in ("bash", "interactive"):
            raise UserError(
                f"job_name ({self.job_name}) makes Lightning take the job for no job of SLURM; "
                "choose another"
            )
        self._check_time()
        for name in ("config", "run_dir", "setup", "sweep", "image", "mounts"):
            if not (getattr(self, name) or "-").isprintable() or getattr(self, name) == "":
                raise UserError(f"{name} ({getattr(self, name)!r}) must be one printable line")
        for name in ("config", "setup", "sweep"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise UserError(f"{name} ({path}) is no file; give the path of one")
        own = re.compile(r"--(nodes|ntasks|gpus|cpus-per-task|time|signal|array|job-name|output)\b")
        for line in self.directives:
            if not line.startswith("--") or not line.isprintable() or own.match(line):
                raise UserError(
                    f"directives ({line}) must be long options of sbatch, one a line, that no "
                    "other option here sets"
                )
        self._check_script()

    def _check_time(self) -> None:
        found = _TIME.fullmatch(self.time)
        if found is None:
            raise UserError(f"time ({self.time}) must be [DAYS-]HH:MM:SS, as in 24:00:00")
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if limit <= self.save_seconds + _EARLY_SECONDS:
            raise UserError(
                f"time ({self.time}) must be longer than save_seconds ({self.save_seconds}) and "
                f"{_EARLY_SECONDS} seconds: SLURM may ask so much too early"
            )

    def _check_script(self) -> None:
        needs = {"sweep_array": ("sweep",), "train_container": ("container", "image", "mounts")}
        for script in get_args(Script):
            for name in needs.get(script, ()):
                value = getattr(self, name)
                if script == self.script and value is None:
                    raise UserError(f"script ({script}) needs {name}; give it")
                if script != self.script and value is not None:
                    raise UserError(f"{name} ({value}) is for script {script}; leave it out")

    def render(self, fit_options: Sequence[str] = ()) -> str:
        """Return the batch script, complete: it is submitted without arguments.

        Args:
            fit_options: options of ``dist-siglip fit``; of a sweep, for all its runs.

        Raises:
            UserError: if an option has no place in a line, or the batch does not fit the ranks.
        """
        for option in fit_options:
            if not option.isprintable():
                raise UserError(f"option of fit ({option!r}) must be one printable line")
        self._check_batch(fit_options)
        text = (_FOLDER / f"{self.script}.sbatch").read_text(encoding="utf-8")
        text = "#!/bin/bash\n# Rendered by dist-siglip slurm.\n" + text[text.index("#SBATCH --") :]
        for key, value in self._resources().items():
            pattern = re.compile(rf"^#SBATCH --{key}=\S+", flags=re.MULTILINE)
            text, found = pattern.subn(f"#SBATCH --{key}={value}", text)
            assert found == 1, key
        site = {"partition": self.partition, "account": self.account}
        lines = [f"#SBATCH --{key}={value}\n" for key, value in site.items() if value is not None]
        lines += [f"#SBATCH {line}\n" for line in self.directives]
        run = [self.config, self.run_dir]
        if self.script == "sweep_array":
            run = [self.config, str(self.sweep), self.run_dir]
        else:
            run = [self.config, "--run_dir", self.run_dir]
        exports = "".join(
            f"export {name}={shlex.quote(str(value))}\n"
            for name, value in self._variables().items()
            if value is not None
        )
        start = f"set -euo pipefail\n{exports}set -- {shlex.join([*run, *fit_options])}\n"
        return text.replace("set -euo pipefail\n", "".join(lines) + start, 1)

    def _resources(self) -> Mapping[str, object]:
        """Values of the #SBATCH lines."""
        one_task = self.script == "train_torchrun"
        resources: dict[str, object] = {
            "job-name": self.job_name,
            "nodes": self.nodes,
            "ntasks-per-node": 1 if one_task else self.gpus_per_node,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_gpu * (self.gpus_per_node if one_task else 1),
            "time": self.time,
            "signal": f"USR1@{self.save_seconds}",
        }
        if self.sweep is not None:
            resources["array"] = f"0-{_count_lines(Path(self.sweep)) - 1}%{self.at_once}"
        return resources

    def _variables(self) -> Mapping[str, object]:
        """Variables the script reads; None leaves one as it is."""
        return {
            "DIST_SIGLIP_SETUP": self.setup,
            "DIST_SIGLIP_MAX_REQUEUES": self.max_requeues,
            "DIST_SIGLIP_CONTAINER": self.container,
            "DIST_SIGLIP_IMAGE": self.image,
            "DIST_SIGLIP_MOUNTS": self.mounts,
        }

    def _check_batch(self, fit_options: Sequence[str]) -> None:
        """Refuse a world that does not divide the global batch, before it waits in a queue."""
        world_size = self.nodes * self.gpus_per_node
        batch = _global_batch_size(Path(self.config), fit_options)
        if batch is not None and batch % world_size:
            fitting = batch - batch % world_size or world_size
            raise UserError(
                f"data.global_batch_size ({batch}) must be divisible by nodes x gpus_per_node "
                f"({self.nodes} x {self.gpus_per_node}); use {fitting}"
            )


def _global_batch_size(config: Path, fit_options: Sequence[str]) -> int | None:
    """Return the global batch of a configuration or the options after it; None if not said."""
    key = "--data.global_batch_size"
    words = [word for option in fit_options for word in option.split("=", 1)]
    if key in words[:-1]:
        asked: Any = words[len(words) - 1 - words[::-1].index(key) + 1]
    else:
        try:
            content = load_yaml(read_regular(config, MOST_BYTES).decode())
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"config ({config}) cannot be read: {reason}") from error
        data = content.get("data") if isinstance(content, dict) else None
        asked = data.get("global_batch_size") if isinstance(data, dict) else None
    return int(asked) if str(asked).isdigit() and int(asked) > 0 else None


def _count_lines(sweep: Path) -> int:
    """Return the number of runs of a sweep."""
    lines = read_regular(sweep).decode().splitlines()
    empty = [number + 1 for number, line in enumerate(lines) if not line.strip()]
    if empty or not lines:
        line = empty[0] if empty else 1
        raise UserError(f"sweep ({sweep}) has no options in line {line}; every line is a run")
    return len(lines)


SUBCOMMANDS = {
    "render": "print the batch script of a run",
    "submit": "print it, and submit exactly that",
}


def run(command: str, arguments: Sequence[str]) -> int:
    """Parse ``slurm SUBCOMMAND CONFIG --run_dir RUN ... [-- OPTIONS OF FIT]`` and do it.

    Raises:
        UserError: if there is no such subcommand, a value is refused, or sbatch refuses the job.
    """
    subcommand, *rest = arguments
    if subcommand not in SUBCOMMANDS:
        raise UserError(f"{command} ({subcommand}) must be one of {', '.join(SUBCOMMANDS)}")
    job, fit_options = parse(subcommand, rest)
    script = job.render(fit_options)
    sys.stdout.write(script)
    sys.stdout.flush()
    if subcommand == "submit":
        sys.stdout.write(f"\n{submit(script)}\n")
    return 0


def parse(subcommand: str, arguments: Sequence[str]) -> tuple[SlurmJob, list[str]]:
    """Return the job, and the options of ``fit`` that follow ``--``."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    made = CommandParser(
        prog=f"dist-siglip slurm {subcommand}", description=introduction_of(SlurmJob)
    )
    made.add_class_arguments(SlurmJob, as_group=False, as_positional=True)
    settings = made.parse_args(words[:end])
    return SlurmJob(**made.instantiate_classes(settings).as_dict()), words[end + 1 :]


def submit(script: str) -> str:
    """Give a script to sbatch; return what it answers.

    Raises:
        UserError: if there is no sbatch here, or it refuses the job.
    """
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not on this machine; submit on a login node of the cluster, or give sbatch "
            "there what dist-siglip slurm render prints"
        ) from error
    if done.returncode:
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip()
