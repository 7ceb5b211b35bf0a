"""The folder of ``embed``: claimed, and read row by row when it is finished.

Rows are numbered shard after shard. Files in clip-retrieval's layout are mapped, so a folder may be
larger than the memory; ``embeddings.parquet`` is read whole. Metadata are read for the shards that
are asked about.

``source.json`` says what the folder was made from: shards, run or model. It decides no numbers, so
shards and runs may be moved and named anew.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.remote import is_remote
from dist_siglip.data.samples.cached_features import MANIFEST, Tower
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.quantized import QUANTIZED, RowCodec, read_codecs
from dist_siglip.evaluation.embed.shard_job import ShardJob, is_all_skipped
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.redaction import redact
from dist_siglip.system.regular_file import check_regular, read_json

SOURCE_FILE = "source.json"
BLOCK_ROWS = 65_536
_MOST_JSON = 64 * 2**20
_FOLDERS: dict[Tower, str] = {"image": "img_emb", "text": "text_emb"}
_SHARDS_REMEMBERED = 32
_FILES_MAPPED = 64  # a mapped file stays open, and a process may open 1,024 by default
_CAPTION_LENGTH = 2000  # of what is shown


class RowPlace(NamedTuple):
    """What a row is of.

    Attributes:
        shard_number: of the shard in the data set.
        shard: its base name.
        key: of the sample.
        place: of the sample among the complete ones of its shard.
        caption: its first 2,000 characters.
    """

    shard_number: int
    shard: str
    key: str
    place: int
    caption: str


class _Part(NamedTuple):
    """Rows of a shard, or the file that they are mapped from."""

    shard_number: int
    rows: NDArray[Any] | Path
    metadata: Path | None = None
    num_rows: int = 0


def claim_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write what decides the numbers into a new folder, or compare it with what is there.

    Raises:
        UserError: if the folder holds something else, or cannot be written.
    """
    manifest = folder / MANIFEST
    now = json.loads(json.dumps(identity))
    try:
        if not manifest.exists():
            _check_empty(folder)
            write_atomically(manifest, json.dumps(now, indent=2) + "\n")
        before = dict(read_json(manifest))
    except OSError as error:
        raise UserError(f"out ({folder}) cannot be used: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{manifest} is damaged; give a new folder") from error
    changes = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise UserError(
            f"out ({folder}) holds other embeddings: {'; '.join(changes)}; give a new folder, or "
            "the same model, shards and settings"
        )


def _check_empty(folder: Path) -> None:
    """Refuse a folder that holds anything but what another rank has begun this moment."""
    found = sorted(os.listdir(folder)) if folder.exists() else []
    visible = [name for name in found if not name.startswith(".")]
    if visible and not (folder / MANIFEST).exists():
        raise UserError(f"out ({folder}) holds {visible[0]!r} and no {MANIFEST}; give a new folder")


def write_source(folder: Path, table: PairTable, source: Mapping[str, Any]) -> None:
    """Note what a folder is made from, if it does not say so; local paths become absolute.

    URLs with credentials are for the user alone to read.
    """
    located = [shard if is_remote(shard) else os.path.abspath(shard) for shard in table.shards]
    content = {"shards": located, "samples": list(table.counts), **source}
    with suppress(OSError, ValueError):
        if read_json(folder / SOURCE_FILE, _MOST_JSON) == content:
            return
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(folder / SOURCE_FILE, text)
    if redact(text) != text:
        (folder / SOURCE_FILE).chmod(0o600)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a folder of embeddings.

    Raises:
        UserError: if it is not there, or damaged.
    """
    try:
        found = read_json(path, _MOST_JSON)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(
            f"index ({path.parent}) has no readable {path.name} ({reason}); name a folder that "
            "embed wrote, or run embed on it again"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no settings; embed into a new folder")
    return found


def words_of(content: Mapping[str, Any], name: str, default: Sequence[str] = ()) -> list[str]:
    """Return a list of texts of a JSON object; the default where there is none.

    Raises:
        UserError: if it is something else.
    """
    found = content.get(name, list(default))
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UserError(f"index is damaged: its {name} are no list of texts; run embed again")
    return found


class StoredRows:
    """The rows of one tower in a finished folder.

    Args:
        folder: that ``embed`` wrote as ``clip-retrieval`` or ``parquet``.
        tower: whose rows.

    Attributes:
        folder: likewise.
        manifest: what decides the numbers, of embed.json.
        source: of source.json.
        shards: the rows are of.
        dtype: of the files.
        dim: columns of a row of floats.
        codec: of int8 and binary rows; None of floats.

    Raises:
        UserError: if the folder is none of ``embed``, not finished, or damaged.
    """

    def __init__(self, folder: Path, tower: Tower = "image") -> None:
        self.folder = folder
        self.manifest = read_object(folder / MANIFEST)
        self.source = read_object(folder / SOURCE_FILE)
        self.shards = words_of(self.source, "shards")
        self.dtype = str(self.manifest.get("dtype"))
        self._tower = tower
        form = self.manifest.get("format")
        if form not in ("clip-retrieval", "parquet"):
            raise UserError(
                f"index ({folder}) has format {form}; embed with --format clip-retrieval or parquet"
            )
        if self.manifest.get("towers") not in ("both", tower):
            raise UserError(
                f"index ({folder}) holds no {tower} rows; embed with --towers both or {tower}"
            )
        self.codec: RowCodec | None = None
        for quantized in QUANTIZED:
            if self.dtype == quantized:
                self.codec = read_codecs(folder, quantized, (tower,))[tower]
        self.dim = 0 if self.codec is None else self.codec.dim
        self._parts: list[_Part] = []
        self._map = lru_cache(_FILES_MAPPED)(_map_rows)
        if form == "parquet":
            self._read_parquet()
        else:
            self._find_arrays()
        if not self._parts:
            raise UserError(f"index ({folder}) holds no rows; embed shards that can be used")
        self._starts = np.cumsum([0, *(part.num_rows for part in self._parts)])
        self._table = lru_cache(_SHARDS_REMEMBERED)(self._read_table)
        self._kept: list[Tensor] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def code_blocks(self) -> Iterator[NDArray[Any]]:
        """Yield all rows as the files have them, a block after the other."""
        for part in self._parts:
            rows = self._rows_of(part)
            for start in range(0, len(rows), BLOCK_ROWS):
                yield rows[start : start + BLOCK_ROWS]

    def blocks(self) -> Iterator[Tensor]:
        """Yield all rows as float32, (B, D), a block after the other."""
        if self._kept is not None:
            yield from self._kept
            return
        for codes in self.code_blocks():
            yield self._floats(codes)

    def keep(self) -> None:
        """Keep all rows in memory as float32, for many searches."""
        self._kept = list(self.blocks())

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """Return (n, D) float32, the rows of these numbers."""
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        first = self._rows_of(self._parts[0])
        picked = np.empty((len(numbers), first.shape[1]), first.dtype)
        for owner in np.unique(owners):
            mine = owners == owner
            picked[mine] = self._rows_of(self._parts[owner])[numbers[mine] - self._starts[owner]]
        return self._floats(picked)

    def place(self, number: int) -> RowPlace:
        """Say what a row is of.

        Raises:
            UserError: if the metadata are damaged.
        """
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        shard_number = self._parts[part].shard_number
        table = self._table(part)
        row = number - int(self._starts[part])
        return RowPlace(
            shard_number,
            str(table["shard"][row]),
            str(table["image_path"][row]),
            int(table["place"][row]),
            str(table["caption"][row] or "")[:_CAPTION_LENGTH],
        )

    def _floats(self, codes: NDArray[Any]) -> Tensor:
        if self.codec is not None:
            return self.codec.decode(codes)
        return torch.from_numpy(codes.astype(np.float32))  # mapped files cannot be written to

    def _rows_of(self, part: _Part) -> NDArray[Any]:
        return self._map(part.rows) if isinstance(part.rows, Path) else part.rows

    def _add(self, part: _Part) -> None:
        """Take the rows of a shard, if there are any and they are what embed.json says."""
        rows = self._rows_of(part)
        if not len(rows):
            return
        if not self._parts and self.codec is None:
            self.dim = rows.shape[1]
        expected = {"int8": (self.dim, "i1"), "binary": (-(-self.dim // 8), "u1")}
        wide, kind = expected.get(self.dtype, (self.dim, "f"))
        if rows.shape[1] != wide or kind not in (rows.dtype.kind, rows.dtype.str[1:]):
            raise UserError(
                f"index ({self.folder}) holds {rows.dtype} rows of width {rows.shape[1]}, not "
                f"those of its {MANIFEST}; embed into a new folder"
            )
        self._parts.append(part._replace(num_rows=len(rows)))

    def _find_arrays(self) -> None:
        """Find the files of clip-retrieval's layout; every shard must have its own, or be empty."""
        samples = self.source.get("samples")
        counts = samples if isinstance(samples, list) else []
        if len(counts) != len(self.shards) or not all(type(each) is int for each in counts):
            raise UserError(f"{self.folder / SOURCE_FILE} is damaged; run embed again")
        name, digits = _FOLDERS[self._tower], len(str(len(counts)))
        missing = 0
        for number, count in enumerate(counts):
            job = ShardJob(number, str(number).zfill(digits), self.shards[number], 0, count)
            file = self.folder / "metadata" / f"metadata_{job.label}.parquet"
            if file.exists():
                self._add(_Part(number, self.folder / name / f"{name}_{job.label}.npy", file))
            elif not is_all_skipped(self.folder, job):
                missing += 1
        if missing:
            raise UserError(
                f"index ({self.folder}) is not finished: {missing} of {len(counts)} shards are "
                "missing; start embed again to go on"
            )

    def _read_parquet(self) -> None:
        """Read the column of the tower; shards are those the footer counts."""
        path = self.folder / "embeddings.parquet"
        if not path.exists():
            raise UserError(
                f"index ({self.folder}) is not finished: it has no {path.name}; start embed again "
                "to go on"
            )
        parts, self._joined = _layouts().read_joined(path, f"{self._tower}_embedding")
        for number, rows in parts:
            self._add(_Part(number, rows))

    def _read_table(self, part: int) -> Mapping[str, Sequence[Any]]:
        """Read the metadata of a part, by column."""
        _, _, metadata, rows = self._parts[part]
        if metadata is None:
            return self._joined.slice(int(self._starts[part]), rows).to_pydict()
        return _layouts().read_metadata(metadata, rows)


def _map_rows(path: Path) -> NDArray[Any]:
    try:
        check_regular(path)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no readable .npy file of numbers ({error})") from error
    if rows.ndim != 2:
        raise UserError(f"{path} must hold one (rows, D) array; embed into a new folder")
    return rows


def _layouts() -> ModuleType:
    try:
        import dist_siglip.evaluation.embed.parquet_layouts as layouts
    except ImportError as error:
        raise UserError(
            f'index needs pyarrow ({error}); pip install "dist-siglip[search]"'
        ) from error
    return layouts


__all__ = [
    "RowPlace",
    "StoredRows",
    "claim_folder",
    "read_object",
    "words_of",
    "write_source",
]
