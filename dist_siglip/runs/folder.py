"""Names of the files of a run folder, its lock, and its newest checkpoint.

RUN/
config.yaml            resolved configuration; ``fit --config`` of it goes on with the run
provenance.json        command, versions, commit, host
metrics.jsonl          one JSON object per logged step and per evaluation
log.txt                plain lines of progress and warnings
bad_samples.jsonl      one JSON object per bad sample, if there was any
skipped_steps.jsonl    one JSON object per skipped step, if there was any
stacks/                what every thread of a rank was doing when it was ended for a hang
tensorboard/           event files
checkpoints/           step=00000500.ckpt ..., best.json (step of the best one, if one is kept)
evaluation/            metrics.json, arrays.npz, examples.json of the newest evaluation
evaluation/history/    step=00000200.npz ...: a few pairs of a few evaluations
benchmarks/            NAME.json of each benchmark, as CLIP_benchmark writes them; details/, parts/,
                       suites/
report.html            one self-contained page
"""

import errno
import re
from dataclasses import dataclass
from pathlib import Path

from dist_siglip.errors import RunMovedError, UserError
from dist_siglip.system.process_lock import LockHeldError, ProcessLock, watched_lock

_CHECKPOINT_NAME = re.compile(r"step=([0-9]{1,18})\.ckpt")
_KEPT_NAME = re.compile(r"step=([0-9]{1,18})\.npz")
_UNFINISHED_NAME = re.compile(r"\.(step=\d+\.ckpt|best\.json)\.[0-9a-f]{32}\.(tmp|old)")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Example:
        >>> RunFolder(Path("runs/a")).checkpoint(500).as_posix()
        'runs/a/checkpoints/step=00000500.ckpt'
    """

    path: Path

    @property
    def config(self) -> Path:
        """Resolved configuration."""
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Command, versions, commit and host of every start."""
        return self.path / "provenance.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What was said, in plain lines."""
        return self.path / "log.txt"

    @property
    def bad_samples(self) -> Path:
        """One JSON object a line; missing while every sample is sound."""
        return self.path / "bad_samples.jsonl"

    @property
    def skipped_steps(self) -> Path:
        """One JSON object a line; missing while every step is taken."""
        return self.path / "skipped_steps.jsonl"

    @property
    def stacks(self) -> Path:
        """Folder of a file for each rank that was ended for a hang; missing without one."""
        return self.path / "stacks"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Folder of the newest evaluation."""
        return self.path / "evaluation"

    def kept_evaluation(self, step: int) -> Path:
        """Name of what is kept of the evaluation after ``step`` optimizer steps."""
        return self.evaluation / "history" / f"step={step:08d}.npz"

    def kept_evaluations(self) -> dict[int, Path]:
        """What is kept of evaluations, by step, earliest first."""
        folder = self.evaluation / "history"
        if not folder.is_dir():
            return {}
        matches = ((_KEPT_NAME.fullmatch(path.name), path) for path in folder.iterdir())
        return dict(sorted((int(match.group(1)), path) for match, path in matches if match))

    @property
    def benchmarks(self) -> Path:
        """Folder of the newest result of each benchmark."""
        return self.path / "benchmarks"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    def checkpoint(self, step: int) -> Path:
        """Name of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step={step:08d}.ckpt"

    @property
    def best(self) -> Path:
        """Step, metric and value of the best checkpoint; missing while none is kept."""
        return self.checkpoints / "best.json"

    def newest_checkpoint(self) -> Path | None:
        """Checkpoint of the largest step; None if there is none.

        Its name says that it was complete once; see ``newest_sound_checkpoint``.
        """
        found = self.steps_with_checkpoint()
        return self.checkpoint(max(found)) if found else None

    def steps_with_checkpoint(self) -> list[int]:
        """Steps whose checkpoint is complete: only complete ones carry their final name."""
        if not self.checkpoints.is_dir():
            return []
        matches = (_CHECKPOINT_NAME.fullmatch(path.name) for path in self.checkpoints.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def unfinished(self) -> list[Path]:
        """What writers that were killed have left: files and folders without their final name."""
        if not self.checkpoints.is_dir():
            return []
        return [p for p in self.checkpoints.iterdir() if _UNFINISHED_NAME.fullmatch(p.name)]

    @property
    def lock_file(self) -> Path:
        """File that the process that trains has a lock on."""
        return self.path / ".lock"

    def is_moved(self) -> bool:
        """Whether this process has claimed the folder, and it is no longer under its path."""
        lock = watched_lock(self.lock_file)
        return lock is not None and not lock.is_in_place()

    def moved(self) -> RunMovedError:
        """Say in one line where the folder is now, as far as this process can tell."""
        lock = watched_lock(self.lock_file)
        place = None if lock is None else lock.place_now()
        if place is None:
            there = "; start again with the --run_dir where it is now"
        else:
            newest = RunFolder(Path(place)).newest_checkpoint()
            there = f" to {place}; start again with --run_dir={place} to go on"
            there += f" from {newest.name}" if newest else ""
        return RunMovedError(f"run_dir ({self.path}) was moved away while the run went on{there}")

    def lock(self) -> ProcessLock:
        """Claim the folder for this process, and no child of it, until the lock is released.

        The operating system gives the claim back when the process ends, however it ends. While it
        is held, nothing is written into another folder that takes the place of this one.

        Raises:
            UserError: if another process holds it, or nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = ProcessLock(str(self.lock_file))
        except LockHeldError as error:
            raise UserError(
                f"run_dir ({self.path}) is in use by {error}; wait for it, end it, or choose "
                "another run_dir"
            ) from None
        except OSError as error:
            if error.errno == errno.ELOOP and self.lock_file.is_symlink():
                raise UserError(f"{self.lock_file} is a symbolic link; remove it") from None
            raise UserError(
                f"run_dir ({self.path}) cannot be written ({error.strerror}); make room, or choose "
                "another run_dir"
            ) from error
        for place in (self.checkpoints, self.evaluation):
            if place.exists() and not place.is_dir():
                lock.release()
                raise UserError(f"{place} must be a folder; move what is there away")
        lock.watch()
        return lock
