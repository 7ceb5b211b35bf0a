"""Checksums of checkpoints, and selection of the newest sound and of the best one.

A checkpoint gets its name when it is complete, but a disk can still lose or change bytes. So they
are compared with their checksum before use, and a corrupt checkpoint is passed over for the one
before it.

A checkpoint file is a zip archive, which may end in a comment: the CRC-32 of all that is before it
(``unzip -z`` shows it; torch and Lightning read the file as ever). A folder has one more file with
size and CRC-32 of the others. One pass over the bytes finds a file cut short, a block of zeros, a
flipped bit.
"""

import json
import logging
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, cast

import torch

from dist_siglip.errors import UserError
from dist_siglip.runs.folder import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import open_regular, read_json

_MARK = b"dist_siglip CRC-32 "
_COMMENT_BYTES = len(_MARK) + 8
_COMMENT = re.compile(re.escape(struct.pack("<H", _COMMENT_BYTES) + _MARK) + b"([0-9a-f]{8})")
_CHUNK_BYTES = 1 << 20
_LIST = "checksums.json"
_END_BYTES = 22  # of an archive without a comment
logger = logging.getLogger(__name__)


class _Summed:
    """Passes bytes on to a file and sums them up."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.checksum = 0

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save_sealed(content: Any, file: BinaryIO) -> None:
    """Write what ``torch.load`` reads, and the checksum of it, into an empty file.

    Raises:
        OSError: if the file cannot be written.
    """
    summed = _Summed(file)
    try:
        torch.save(content, cast(IO[bytes], summed))
    except RuntimeError as error:
        raise cause_of(error) from None
    # The last field of an archive is the length of its comment; it was summed up as zero.
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", _COMMENT_BYTES) + _MARK + b"%08x" % summed.checksum)


def cause_of(error: Exception) -> Exception:
    """The failure to write behind a complaint of torch, else the complaint itself.

    torch's archive writer trips over its own position when a write has failed.
    """
    return error.__context__ if isinstance(error.__context__, OSError) else error


def has_checksum(path: Path) -> bool:
    """Whether a file ends in a checksum; others may be sound files of other programs."""
    try:
        with open_regular(path) as file:
            return _read_comment(file) is not None
    except OSError:
        return False


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, a file or a folder, in a few words; None if it is sound.

    Every byte is read once. Of a file that was written without a checksum only the end is looked
    at: it was not cut short.
    """
    try:
        return _damage_of_folder(path) if path.is_dir() else _damage_of_file(path)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return error.strerror or type(error).__name__


def list_checksums(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Size and checksum of files, by their name."""
    return {path.name: (path.stat().st_size, _sum(path, path.stat().st_size)) for path in paths}


def seal_folder(folder: Path, listed: Mapping[str, tuple[int, int]]) -> None:
    """Write the list of all other files of a folder."""
    write_atomically(folder / _LIST, json.dumps(dict(listed), indent=1) + "\n")


def _damage_of_folder(path: Path) -> str | None:
    try:
        listed = read_json(path / _LIST)
        expected = {str(name): (int(size), int(sum_)) for name, (size, sum_) in listed.items()}
    except (ValueError, AttributeError, TypeError):
        return f"{_LIST} is damaged"
    for name, (size, checksum) in expected.items():
        if (path / name).stat().st_size != size:
            return f"{name} has another size than when it was written"
        if _sum(path / name, size) != checksum:
            return f"{name} has another checksum than when it was written"
    return None


def _damage_of_file(path: Path) -> str | None:
    with open_regular(path) as file:
        expected = _read_comment(file)
        body = file.seek(0, os.SEEK_END) - _COMMENT_BYTES - 2
        if expected is None and _ends_without_comment(file):
            return None
    if expected is None:
        return "it does not end in its checksum: it is cut short, or not written by dist_siglip"
    found = zlib.crc32(b"\0\0", _sum(path, body))
    return None if found == expected else "its bytes have another checksum than when it was written"


def _read_comment(file: BinaryIO) -> int | None:
    """The checksum a file ends in."""
    size = file.seek(0, os.SEEK_END)
    if size < _COMMENT_BYTES + 2:
        return None
    file.seek(-_COMMENT_BYTES - 2, os.SEEK_END)
    end = file.read()
    written = _COMMENT.fullmatch(end)
    return int(written.group(1), 16) if written else None


def _ends_without_comment(file: BinaryIO) -> bool:
    """Whether a file ends as an archive does that nobody sealed."""
    if file.seek(0, os.SEEK_END) < _END_BYTES:
        return False
    file.seek(-_END_BYTES, os.SEEK_END)
    end = file.read()
    return end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0")


def _sum(path: Path, num_bytes: int) -> int:
    """CRC-32 of the first bytes of a file."""
    checksum, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    with open_regular(path) as file:
        while num_bytes > 0:
            count = file.readinto(buffer[: min(_CHUNK_BYTES, num_bytes)])
            if not count:
                break
            checksum = zlib.crc32(buffer[:count], checksum)
            num_bytes -= count
    return checksum


Mode = Literal["min", "max"]


@dataclass(frozen=True)
class BestCheckpoint:
    """Step, metric and value of the best checkpoint, as ``checkpoints/best.json`` has them."""

    step: int
    metric: str
    value: float

    def is_beaten_by(self, value: float, mode: Mode) -> bool:
        """Whether another value is better; one that is no number never is.

        Example:
            >>> best = BestCheckpoint(500, "val/loss", 0.4)
            >>> [best.is_beaten_by(value, "min") for value in (0.3, 0.4, float("nan"))]
            [True, False, False]
        """
        return value < self.value if mode == "min" else value > self.value

    def write(self, folder: RunFolder) -> None:
        """Write it down in one piece."""
        write_atomically(folder.best, json.dumps(asdict(self)) + "\n")


def read_best(folder: RunFolder, metric: str, mode: Mode) -> BestCheckpoint:
    """Return what is written down, or what anything beats if it is of no use.

    It is of use if it is about this metric and its checkpoint is there.
    """
    nothing = BestCheckpoint(-1, metric, math.inf if mode == "min" else -math.inf)
    try:
        found = BestCheckpoint(**read_json(folder.best))
        is_of_use = found.metric == metric and found.step in folder.steps_with_checkpoint()
        is_of_use = is_of_use and math.isfinite(found.value)
    except (OSError, ValueError, TypeError, OverflowError):
        return nothing
    return found if is_of_use else nothing


# Checkpoints that were verified for this start: path -> inode, size and time of change.
_verified: dict[Path, tuple[int, int, int]] = {}


def newest_sound_checkpoint(folder: RunFolder, setting: str = "run_dir") -> Path | None:
    """Return the checkpoint of the largest step whose bytes are those that were written.

    Every newer one is named in the log, with what is wrong with it. Each byte of the newest is
    read once, about a second per GB or less.

    Args:
        folder: of the run.
        setting: name of what the user said the folder by, for errors.

    Returns:
        None if the run has no checkpoint at all.

    Raises:
        UserError: if it has some and all are damaged: a run must not begin anew by itself.
    """
    steps = folder.steps_with_checkpoint()
    for step in reversed(steps):
        path = folder.checkpoint(step)
        damage = damage_of(path)
        if damage is None:
            if path.is_file() and not has_checksum(path):
                logger.warning("checkpoint %s has no checksum; only its end was looked at", path)
            note_sound(path)
            return path
        logger.warning("checkpoint %s is damaged (%s); looking for an older one", path, damage)
    if steps:
        anew = f"remove {folder.checkpoints} to begin anew"
        raise UserError(
            f"{setting} ({folder.path}) has {len(steps)} checkpoints and all are damaged; restore "
            f"one from a copy, or {anew if setting == 'run_dir' else 'name another run'}"
        )
    return None


def note_sound(path: Path) -> None:
    """Have ``check_sound`` pass a checkpoint that was verified here, or by a rank of this node.

    Nothing is noted of one that is not there: who reads it says so.
    """
    if path.exists():
        _verified[path.absolute()] = _identity(path)


def _identity(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def check_sound(path: Path) -> None:
    """Refuse a checkpoint whose bytes are not those that were written.

    A file of another program carries no checksum; whether it can be read decides. One that was
    verified for this start, and has not been replaced since, is not read again.

    Raises:
        UserError: naming the damage.
    """
    if _verified.get(path.absolute(), ()) == (_identity(path) if path.exists() else None):
        return
    damage = damage_of(path) if path.is_dir() or has_checksum(path) else None
    if damage is not None:
        raise UserError(
            f"checkpoint ({path}) cannot be read ({damage}); it is damaged; use another one"
        )
