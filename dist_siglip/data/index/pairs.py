"""The table of pairs: where the picture and the captions of each sample lie.

A ``PairTable`` joins the indices of all shards of one data set into flat arrays, 32 bytes a sample,
numbered shard after shard in the order given. Building it is the check before training: a shard
that is damaged, or a sample that lacks its picture or every caption, is found here and nowhere
later. A sound table is kept in the user's cache folder and mapped into memory the next time; it can
be deleted at any time.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import ProcessGroup

from dist_siglip.data.index.damage import MAX_BAD_FRACTION, Damage, OnDamage, log_remarks
from dist_siglip.data.index.read import DAMAGED_ARRAYS, read_index
from dist_siglip.data.index.shard_index import ShardIndex, explain_dots, remedy_of
from dist_siglip.data.parquet.scan import Wanted
from dist_siglip.data.remote import ShardCache, is_remote
from dist_siglip.data.remote.locations import is_table, redact, shard_name
from dist_siglip.distributed import gather_rows
from dist_siglip.errors import UserError
from dist_siglip.system.atomic import open_atomically, user_cache_folder, write_atomically
from dist_siglip.system.regular_file import check_regular

_LOGGER = logging.getLogger(__name__)


class ShardRows(NamedTuple):
    """The rows one shard adds to a table."""

    image_offsets: NDArray[np.int64]
    image_sizes: NDArray[np.int64]
    caption_offsets: NDArray[np.int64]
    caption_sizes: NDArray[np.int64]
    dropped: list[int]

    @property
    def num_samples(self) -> int:
        """Complete samples of the shard."""
        return len(self.image_offsets)

    @classmethod
    def of(
        cls,
        index: ShardIndex,
        pictures: list[str],
        captions: list[str],
        others: list[str],
        damage: Damage,
    ) -> "ShardRows":
        """Pick the members of every sample; tell ``damage`` what is missing."""
        if index.damage:
            damage.shard(index.damage)
        image_offsets, image_sizes = _select(index, [*pictures, *index.pictures])
        of_captions = [_select(index, [extension]) for extension in (*captions, *others)]
        caption_offsets = np.stack([offsets for offsets, _ in of_captions])
        caption_sizes = np.stack([sizes for _, sizes in of_captions])
        has_picture = image_offsets >= 0
        has_caption = (caption_offsets[: len(captions)] >= 0).any(axis=0)
        for what, has, extensions, setting in (
            ("picture", has_picture, pictures, "image_extensions"),
            ("caption", has_caption | ~has_picture, captions, "captions.members"),
        ):
            missing = np.flatnonzero(~has)
            if missing.size:
                key, hints = index.keys()[missing[0]], [index.note]
                hints.append(explain_dots(key, index.members_of(int(missing[0])), extensions))
                hint = "".join(f" ({hint})" for hint in hints if hint)
                few = f"{missing.size} of {index.num_samples} samples"
                damage.samples(
                    missing.size,
                    f"shard {redact(index.path)!r}: {few} have no {what} ({listed(extensions)}), "
                    f"first {key!r}{hint}; {remedy_of(index, setting, extensions, missing.size)}",
                )
        whole = has_picture & has_caption
        return cls(
            image_offsets[whole],
            image_sizes[whole],
            caption_offsets[:, whole],
            caption_sizes[:, whole],
            np.flatnonzero(~whole).tolist(),
        )


def _select(
    index: ShardIndex, extensions: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets (-1: none) and sizes of the preferred member of every sample of one shard."""
    offsets = np.full(index.num_samples, -1, dtype=np.int64)
    sizes = np.zeros(index.num_samples, dtype=np.int64)
    for extension in reversed(extensions):  # the preferred one is written last
        if extension in index.extensions:
            chosen = index.kinds == index.extensions.index(extension)
            offsets[index.samples[chosen]] = index.offsets[chosen]
            sizes[index.samples[chosen]] = index.sizes[chosen]
    return offsets, sizes


def listed(extensions: Sequence[str]) -> str:
    """Write extensions with their dots, for a text."""
    return ", ".join(f".{extension}" for extension in extensions)


_READERS = 8  # threads that wait for a slow file system together
_TABLE_VERSION = 3
_KEPT_TABLES = 16
_VALUES = ("shards", "caption_extensions", "fingerprint", "shard_lines", "remarks")


class Span(NamedTuple):
    """The bytes of one member: which shard, from where, how many.

    Of a Parquet shard the offset is the address of a cell, and the size about what it takes there.
    """

    shard: str
    offset: int
    size: int


@dataclass(frozen=True, eq=False, kw_only=True)
class PairTable:
    """Pictures and captions of a data set by sample id.

    Attributes:
        shards: tar and Parquet files, and tables, in order.
        starts: (shards + 1,) int64, the id of the first sample of each shard; last, the total.
        image_offsets: (samples,) int64.
        image_sizes: (samples,) int64.
        caption_extensions: members that hold captions, in order of preference, then other members
            that were asked for.
        caption_offsets: (caption_extensions, samples) int64; -1 where a sample lacks the member.
        caption_sizes: (caption_extensions, samples) int64.
        fingerprint: hash of shard names, member names, offsets and sizes.
        shard_lines: a line for each shard, "name<TAB>samples<TAB>hash", which tells changes apart.
        dropped: (dropped samples, 2) int64, the shard and the number within it of every sample
            that was left out because it is incomplete.
        remarks: what is unusual about shards that are used, a line for each.
        cache: copies of remote shards, if there are any.
        file: where the arrays are mapped from, if they are.
    """

    shards: tuple[str, ...]
    starts: NDArray[np.int64]
    image_offsets: NDArray[np.int64]
    image_sizes: NDArray[np.int64]
    caption_extensions: tuple[str, ...]
    caption_offsets: NDArray[np.int64]
    caption_sizes: NDArray[np.int64]
    fingerprint: str
    shard_lines: str
    dropped: NDArray[np.int64]
    remarks: tuple[str, ...] = ()
    cache: ShardCache | None = None
    file: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave mapped arrays out: another process maps the same file."""
        state = dict(self.__dict__)
        if self.file is not None and os.path.exists(self.file):
            state = {"cache": self.cache, "file": self.file}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "starts" not in state:
            found = read_table(state["file"], state["cache"])
            if found is None:
                raise UserError(f"table {state['file']!r} vanished; start the run again")
            state = found.__dict__
        self.__dict__.update(state)

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return int(self.starts[-1])

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(int(count) for count in np.diff(self.starts))

    def image_span(self, sample_id: int) -> Span:
        """Say where the encoded picture of a sample lies."""
        shard = self.shards[self._shard_of(sample_id)]
        return Span(shard, int(self.image_offsets[sample_id]), int(self.image_sizes[sample_id]))

    def caption_spans(self, sample_id: int) -> list[tuple[str, Span]]:
        """Say where the captions of a sample lie.

        Returns:
            (extension, span) of every member with captions that the sample has, in order of
            preference; at least one.
        """
        shard = self.shards[self._shard_of(sample_id)]
        offsets = self.caption_offsets[:, sample_id].tolist()
        sizes = self.caption_sizes[:, sample_id].tolist()
        members = zip(self.caption_extensions, offsets, sizes, strict=True)
        return [(kind, Span(shard, offset, size)) for kind, offset, size in members if offset >= 0]

    def member_span(self, sample_id: int, extension: str) -> Span | None:
        """Say where a member among ``caption_extensions`` lies; None if the sample lacks it."""
        if extension not in self.caption_extensions:
            return None
        row = self.caption_extensions.index(extension)
        offset = int(self.caption_offsets[row, sample_id])
        size = int(self.caption_sizes[row, sample_id])
        shard = self.shards[self._shard_of(sample_id)]
        return Span(shard, offset, size) if offset >= 0 else None

    def shard_range(self, sample_id: int) -> tuple[int, int]:
        """Return the first id of a sample's shard, and the id after its last."""
        shard = self._shard_of(sample_id)
        return int(self.starts[shard]), int(self.starts[shard + 1])

    def describe(self, sample_id: int) -> str:
        """Name a sample for a log line, as ``shard/key``; reads the index of its shard again."""
        shard, key = self.name(sample_id)
        place, shard = sample_id - self.shard_range(sample_id)[0], redact(shard)
        return f"{shard!r}, sample {place}" if key is None else ascii(f"{shard}/{key}")

    def name(self, sample_id: int) -> tuple[str, str | None]:
        """Return shard and key of a sample; no key if the shard changed or vanished since."""
        return self.names([sample_id])[0]

    def names(self, sample_ids: Iterable[int]) -> list[tuple[str, str | None]]:
        """Name many samples as ``name`` does; the index of each shard is read once."""
        keys: dict[int, list[str]] = {}
        found: list[tuple[str, str | None]] = []
        for sample_id in sample_ids:
            number = self._shard_of(sample_id)
            if number not in keys:
                keys[number] = self._keys_of(number)
            place = sample_id - int(self.starts[number])
            for before in self.dropped[self.dropped[:, 0] == number, 1].tolist():
                place += before <= place
            key = keys[number][place] if place < len(keys[number]) else None
            found.append((self.shards[number], key))
        return found

    def _keys_of(self, number: int) -> list[str]:
        try:
            return read_index(self.shards[number], cache=self.cache).keys()
        except (OSError, UserError):
            return []

    def _shard_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self.starts, sample_id, side="right")) - 1


def build_pair_table(
    shards: Sequence[str],
    *,
    image_extensions: Sequence[str],
    caption_extensions: Sequence[str] = ("txt",),
    other_extensions: Sequence[str] = (),
    on_damage: OnDamage = "refuse",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    cache: ShardCache | None = None,
    name: str = "shards",
) -> PairTable:
    """Index shards and join them into one table.

    A sample may hold other members (they are ignored); of several pictures the one whose
    extension comes first in ``image_extensions`` counts. Fresh side-cars are used, missing ones
    written.

    Args:
        shards: tar or Parquet files, URLs of them, or tables of paths and captions.
        image_extensions: extensions of the picture, without the dot, in order of preference.
        caption_extensions: likewise of the captions; a sample needs one of them.
        other_extensions: further members to find, which a sample may lack; they come last among
            the ``caption_extensions`` of the table.
        on_damage: "refuse", or "skip": leave out incomplete samples and what follows the damage of
            a shard, and name them in the log.
        max_bad_fraction: share of samples, and of shards, that may be skipped.
        cache: copies of remote shards.
        name: the setting the shards came from, for error texts.

    Raises:
        UserError: if a shard is damaged or a sample incomplete (with "skip": too many of them),
            or there is no sample at all.
    """
    pictures = [extension.lower().lstrip(".") for extension in image_extensions]
    captions = [extension.lower().lstrip(".") for extension in caption_extensions]
    others = [extension for extension in other_extensions if extension not in captions]
    file = None
    # The pictures of a table may change while the table does not.
    if not any(is_remote(shard) or is_table(shard) for shard in shards):
        settings = {"images": pictures, "captions": captions}
        settings |= {"others": others} if others else {}
        try:
            file = table_path(shards, settings)
        except OSError as error:
            raise UserError(f"{name}: shard cannot be read: {error}") from error
        known = read_table(file, cache)
        if known is not None:
            log_remarks(known.remarks, name)
            return known
    with ThreadPoolExecutor(max_workers=_READERS) as readers:
        wanted = Wanted(pictures, [*captions, *others])
        indices = list(readers.map(partial(_read, cache=cache, wanted=wanted), shards))
    damage = Damage(on_damage, max_bad_fraction, name)
    parts = [ShardRows.of(index, pictures, captions, others, damage) for index in indices]
    damage.settle(num_shards=len(indices), num_samples=sum(i.num_samples for i in indices))
    starts = np.cumsum([0] + [part.num_samples for part in parts], dtype=np.int64)
    if starts[-1] == 0:
        raise UserError(
            f"{name} holds no samples in {len(indices)} shards; a sample is a picture "
            f"({listed(pictures)}) and a caption ({listed(captions)}) of the same name"
        )
    digest = hashlib.blake2b(digest_size=8)
    lines = []
    for index, part in zip(indices, parts, strict=True):
        base, count = shard_name(index.path), part.num_samples
        lines.append(f"{ascii(base)[1:-1]}\t{count}\t{index.digest[:16]}")
        digest.update(f"{base}\0{count}\0{index.digest}\n".encode("utf-8", "surrogateescape"))
    table = PairTable(
        shards=tuple(shards),
        starts=starts,
        image_offsets=np.concatenate([part.image_offsets for part in parts]),
        image_sizes=np.concatenate([part.image_sizes for part in parts]),
        caption_extensions=(*captions, *others),
        caption_offsets=np.concatenate([part.caption_offsets for part in parts], axis=1),
        caption_sizes=np.concatenate([part.caption_sizes for part in parts], axis=1),
        fingerprint=digest.hexdigest(),
        shard_lines="\n".join(lines),
        dropped=np.array(
            [(n, i) for n, part in enumerate(parts) for i in part.dropped], dtype=np.int64
        ).reshape(-1, 2),
        remarks=tuple(
            remark
            for index in indices
            for remark in (index.remark, index.hidden_pairs(pictures, captions))
            if remark
        ),
        cache=cache,
    )
    log_remarks(table.remarks, name)
    # Damage is reported every time, so such a table is not kept.
    is_sound = not damage.is_noted
    if file is None or not is_sound or not write_table(file, table):
        return table
    return read_table(file, cache) or table


def table_path(shards: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Name the file that the arrays of a table are kept in.

    It belongs to exactly these shards (place, size, modification time) and settings.

    Raises:
        OSError: if a shard is missing.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([_TABLE_VERSION, settings], sort_keys=True).encode() + b"\n")
    for shard in shards:
        status = os.stat(shard)
        # As given, too: a table holds these names, and another folder may be the current one.
        place = os.fsencode(f"{os.path.abspath(shard)}\0{shard}")
        digest.update(b"%s\0%d\0%d\n" % (place, status.st_size, status.st_mtime_ns))
    return os.path.join(user_cache_folder("tables"), f"{digest.hexdigest()}.npy")


def write_table(file: str, table: PairTable) -> bool:
    """Keep a table: one array of a column for each sample, and a JSON of plain values beside it.

    Returns:
        False if the folder is closed or full.
    """
    spans = [table.image_offsets[None], table.image_sizes[None]]
    columns = np.concatenate([*spans, table.caption_offsets, table.caption_sizes])
    values: dict[str, Any] = {name: getattr(table, name) for name in _VALUES}
    values |= {"starts": table.starts.tolist(), "dropped": table.dropped.tolist()}
    try:
        with open_atomically(Path(file)) as stream:
            np.save(stream, np.ascontiguousarray(columns))
        write_atomically(Path(f"{file}.json"), json.dumps(values))
    except OSError as error:
        _LOGGER.debug("no table at %r: %s", file, error)
        return False
    with contextlib.suppress(OSError):
        _forget_old_tables(Path(file).parent)
    return True


def read_table(file: str, cache: ShardCache | None = None) -> PairTable | None:
    """Map a table into memory, whose pages all processes of a node share.

    Args:
        file: as ``table_path`` names it.
        cache: copies of remote shards.

    Returns:
        The table; None if there is none, or it is damaged.
    """
    try:
        check_regular(Path(f"{file}.json"))
        values = json.loads(Path(f"{file}.json").read_bytes())
        fields: dict[str, Any] = {name: values[name] for name in _VALUES}
        for name in ("shards", "caption_extensions", "remarks"):
            fields[name] = tuple(fields[name])
        starts = np.array(values["starts"], dtype=np.int64)
        dropped = np.array(values["dropped"], dtype=np.int64).reshape(-1, 2)
        check_regular(Path(file))
        columns = np.load(file, mmap_mode="r", allow_pickle=False)
        kinds = len(fields["caption_extensions"])
        if len(starts) != len(fields["shards"]) + 1 or columns.dtype != np.int64:
            raise ValueError("its parts do not fit together")
        if columns.shape != (2 + 2 * kinds, starts[-1]) or not columns.flags.c_contiguous:
            raise ValueError("its parts do not fit together")
    except FileNotFoundError:
        return None
    except DAMAGED_ARRAYS as error:
        _LOGGER.warning("table %r is damaged (%s) and will be made again", file, error)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)
    return PairTable(
        **fields,
        starts=starts,
        dropped=dropped,
        image_offsets=columns[0],
        image_sizes=columns[1],
        caption_offsets=columns[2 : 2 + kinds],
        caption_sizes=columns[2 + kinds :],
        cache=cache,
        file=file,
    )


def check_ranks_agree(
    table: PairTable, *, name: str, device: torch.device, group: ProcessGroup | None = None
) -> None:
    """Refuse to start if a rank (a node with its own copy, say) sees other shards than rank 0.

    Every rank must call it; one small all-gather. Without a process group there is nothing to
    compare.

    Args:
        table: what this rank sees.
        name: the setting the shards came from, for the error text.
        device: where the process group communicates.
        group: ranks to compare.

    Raises:
        UserError: on every rank, naming the first rank that differs.
    """
    mine = torch.tensor([[table.num_samples, int(table.fingerprint, 16) >> 1]], device=device)
    rows = gather_rows(mine, group).tolist()
    for rank, row in enumerate(rows):
        if row != rows[0]:
            raise UserError(
                f"{name} differ between ranks: rank 0 sees {rows[0][0]} samples, rank {rank} sees "
                f"{row[0]} (or other bytes); give every node the same shards"
            )


def _forget_old_tables(folder: Path) -> None:
    """Delete the tables unused for longest, those of an earlier format among them."""
    tables = [*folder.glob("*.npy"), *folder.glob("*.table")]
    tables.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in tables[_KEPT_TABLES:]:
        path.unlink()
        Path(f"{path}.json").unlink(missing_ok=True)


def _read(shard: str, cache: ShardCache | None, wanted: Wanted) -> ShardIndex:
    try:
        return read_index(shard, cache=cache, wanted=wanted)
    except OSError as error:
        raise UserError(f"shard {shard!r} cannot be read: {error.strerror or error}") from error
