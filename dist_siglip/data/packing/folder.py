"""The folder that shards are packed into: which are finished, and who may add more.

``pack.json`` holds the settings and how far packing got; it is renewed after every shard, once the
shard is safely on disk under its final name. A call that finished no shard leaves nothing that
stands in the way of another table or other settings. One process at a time writes, under a lock on
``.lock``. Nothing that was not written here is ever overwritten.
"""

import filecmp
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from dist_siglip.errors import UserError
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.process_lock import LockHeldError, ProcessLock
from dist_siglip.system.regular_file import open_text, read_json

_VERSION = 1


class Progress(NamedTuple):
    """How far packing got.

    Attributes:
        shards: shards under their final name.
        rows: rows that need not be read again.
        samples: samples in the shards.
        skipped: rows that could not be used.
        skipped_bytes: length of the list of these.
        finished: whether there is nothing left to do.
    """

    shards: int = 0
    rows: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_bytes: int = 0
    finished: bool = False


class PackFolder:
    """A folder that shards are packed into, as a context manager that holds its lock.

    Args:
        path: made if missing.
        identity: what decides the bytes of the shards, plain values by name.

    Attributes:
        progress: what is safe on disk.
        seen: the same, and what has been read since.

    Raises:
        UserError: on entry, if the folder belongs to something else, to another table or
            to other settings, or another process writes into it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.progress = Progress()
        self.seen = self.progress
        self._identity = json.loads(json.dumps(identity))
        self._manifest = path / "pack.json"
        self._skip_list = path / "pack_skipped.jsonl"
        self._skips: BinaryIO | None = None
        self._held: ProcessLock | None = None
        self._partial: tuple[Path, BinaryIO] | None = None

    def __enter__(self) -> "PackFolder":
        try:
            self._open()
        except OSError as error:
            self._close()
            raise UserError(f"out ({self.path}) cannot be used: {error.strerror}") from error
        except UserError:
            self._close()
            raise
        self.seen = self.progress
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def skip(self, record: Mapping[str, Any]) -> None:
        """Count a row that cannot be used, and add it to the list."""
        line = json.dumps(record).encode() + b"\n"
        assert self._skips is not None
        self._skips.write(line)
        self._skips.flush()
        self.seen = self.seen._replace(
            rows=self.seen.rows + 1,
            skipped=self.seen.skipped + 1,
            skipped_bytes=self.seen.skipped_bytes + len(line),
        )

    def first_skipped(self) -> str:
        """Return the first line of the list of rows that could not be used."""
        with open_text(self._skip_list) as file:
            return file.readline().strip()

    @contextmanager
    def shards(
        self, samples_per_shard: int, shard_bytes: int
    ) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Yield a function that writes a sample; the last shard is finished on leaving.

        On an error, the shard that is being written is dropped.
        """
        os.environ["WDS_SECURE"] = "1"  # read once, at webdataset's first import
        from webdataset import ShardWriter

        writer = None

        def write(sample: dict[str, Any]) -> None:
            nonlocal writer
            if writer is None:
                writer = ShardWriter(
                    str(self.path).replace("%", "%%") + "/%05d.tar",
                    maxcount=samples_per_shard,
                    maxsize=shard_bytes,
                    start_shard=self.progress.shards,
                    opener=self._open_partial,
                    post=self._publish,
                    verbose=0,
                    encoder=False,
                    compress=False,
                    mtime=0,  # an integer: plain ustar headers, and the same bytes every time
                )
            writer.write(sample)  # publishes the shard before, if it is full
            self.seen = self.seen._replace(rows=self.seen.rows + 1, samples=self.seen.samples + 1)

        try:
            yield write
            if writer is not None:
                writer.close()
                writer = None
        except OSError as error:
            raise UserError(f"out ({self.path}) cannot be written: {error.strerror}") from error
        finally:
            if writer is not None:  # an error: end the tar, so that nothing writes to it later
                writer.post = None
                with suppress(OSError, ValueError, AttributeError):
                    writer.close()
            self._drop_partial()

    def finish(self) -> None:
        """Record that every row is done."""
        self._record(self.seen._replace(finished=True))

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._manifest.exists():
            for name in os.listdir(self.path):
                if name != self._skip_list.name and not name.startswith("."):
                    raise UserError(
                        f"out ({self.path}) holds {name!r} and no pack.json; give a new folder"
                    )
        self._lock()
        self._skips = self._open_skip_list()
        for pattern in (".pack.json.*.tmp", ".*.tar.partial"):  # left by a killed process
            for left in self.path.glob(pattern):
                left.unlink()
        if self._manifest.exists():
            found = self._read_manifest()
            if found is None:
                self._record(Progress())
            self.progress = found or Progress()
            self._check_shards()
        else:
            self._record(self.progress)
        if os.fstat(self._skips.fileno()).st_size < self.progress.skipped_bytes:
            raise UserError(
                f"{self._skip_list} lost lines since packing stopped; pack into a new folder"
            )
        self._skips.truncate(self.progress.skipped_bytes)

    def _lock(self) -> None:
        """Keep other processes out."""
        try:
            self._held = ProcessLock(str(self.path / ".lock"))
        except LockHeldError as error:
            raise UserError(
                f"out ({self.path}) is being written by {error}; wait for it, or end it"
            ) from error

    def _open_skip_list(self) -> BinaryIO:
        """Open the list of rows that could not be used, never what a link leads to."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.fdopen(os.open(self._skip_list, flags, 0o666), "ab")

    def _read_manifest(self) -> Progress | None:
        """Compare identities and return how far packing got; None if another call left no shard."""
        try:
            manifest = read_json(self._manifest)
            version, before = manifest["version"], dict(manifest["settings"])
            progress = Progress(**manifest["progress"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{self._manifest} is damaged; pack into a new folder") from error
        if version != _VERSION:
            raise UserError(f"{self._manifest} is of version {version}; pack into a new folder")
        changes = [
            f"{name} was {before.get(name)!r} and is {self._identity.get(name)!r}"
            for name in sorted({*before, *self._identity})
            if before.get(name) != self._identity.get(name)
        ]
        if changes and not progress.shards:
            return None
        if changes:
            raise UserError(
                f"out ({self.path}) was packed differently: {'; '.join(changes)}; give the same "
                "table and settings to go on, or a new folder"
            )
        return progress

    def _check_shards(self) -> None:
        for number in range(self.progress.shards):
            name = f"{number:05d}.tar"
            if not (self.path / name).is_file():
                raise UserError(
                    f"out ({self.path}) lacks {name}, which was finished; bring it back, or pack "
                    "into a new folder"
                )

    def _open_partial(self, name: str) -> BinaryIO:
        """Open the hidden file that becomes the shard."""
        final = Path(name)
        partial = final.with_name(f".{final.name}.partial")
        file = partial.open("xb")
        self._partial = (partial, file)
        return file

    def _publish(self, name: str) -> None:
        """Give a finished shard its name, and only then record it."""
        assert self._partial is not None
        partial, file = self._partial
        file.flush()
        os.fsync(file.fileno())
        file.close()
        final = Path(name)
        # A process killed between renaming and recording left this very shard.
        if not os.path.lexists(final):
            partial.rename(final)
        elif final.is_symlink() or not filecmp.cmp(partial, final, shallow=False):
            raise UserError(f"{final} exists and is not the shard of these rows; move it away")
        else:
            partial.unlink()
        assert self._skips is not None
        os.fsync(self._skips.fileno())
        # Written atomically in the same folder, whose entry of the shard is synced with it.
        self._record(self.seen._replace(shards=self.progress.shards + 1))

    def _record(self, progress: Progress) -> None:
        content = {
            "version": _VERSION,
            "progress": progress._asdict(),
            "settings": self._identity,
        }
        write_atomically(self._manifest, json.dumps(content, indent=2) + "\n")
        self.progress = self.seen = progress

    def _drop_partial(self) -> None:
        if self._partial is not None:
            partial, file = self._partial
            with suppress(OSError):
                file.close()
            partial.unlink(missing_ok=True)
            self._partial = None

    def _close(self) -> None:
        """Let go of the lock."""
        if self._skips is not None:
            self._skips.close()
            self._skips = None
        if self._held is not None:
            self._held.release()
            self._held = None
