"""The index of one shard: its samples, and where their bytes lie.

A sample is what webdataset calls one: the members whose names agree up to the first dot of the base
name.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.index.tar_scan import Member
from dist_siglip.data.remote.locations import is_table, redact
from dist_siglip.data.samples.picture_policy import FORMATS, formats_of

SEPARATOR = "\0"  # cannot occur in the name of a member


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardIndex:
    """Every member of every sample of one shard.

    Attributes:
        path: the shard.
        num_samples: samples of the shard, numbered in order of first appearance.
        extensions: the extensions that occur, lower case, without the leading dot.
        joined_keys: (bytes,) uint8, all keys joined by NUL: a quarter of the size of a list.
        samples: (members,) int64, the sample each member belongs to.
        kinds: (members,) int64, its extension, as an index of ``extensions``.
        offsets: (members,) int64, its first byte in the shard.
        sizes: (members,) int64, its length in bytes.
        digest: hash of all of the above but the path, for telling changed data.
        damage: what is wrong with the shard, in one line; empty for a sound one.
        note: what is unusual about a shard that can be used; empty if nothing is.
        columns: of a Parquet file; none of a tar.
        pictures: columns among the extensions that hold pictures, whatever their names.
    """

    path: str
    num_samples: int
    extensions: tuple[str, ...]
    joined_keys: NDArray[np.uint8]
    samples: NDArray[np.int64]
    kinds: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    digest: str
    damage: str = ""
    note: str = ""
    columns: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()

    @property
    def remark(self) -> str:
        """What a user should know about a shard that is not damaged, in one line."""
        notes = [self.note] if self.note else []
        if not self.num_samples and not self.damage:
            notes.append("holds no samples")
        return f"shard {redact(self.path)!r} {'; '.join(notes)}" if notes else ""

    def keys(self) -> list[str]:
        """List the keys of the samples, in sample order."""
        joined = self.joined_keys.tobytes().decode("utf-8", "surrogateescape")
        return joined.split(SEPARATOR) if self.num_samples else []

    def members_of(self, sample: int) -> list[str]:
        """List the extensions of the members of one sample."""
        return [self.extensions[kind] for kind in self.kinds[self.samples == sample].tolist()]

    def hidden_pairs(self, pictures: Collection[str], captions: Collection[str]) -> str:
        """Tell of pairs that another sample swallows, because there is a dot in their names.

        Returns:
            One line with the first; empty if there are none.
        """
        found: dict[str, set[str]] = {}
        for extension in self.extensions:
            name, dot, last = extension.rpartition(".")
            if dot:
                found.setdefault(name, set()).add(last)
        for name, kinds in found.items():
            picture = next((kind for kind in pictures if kind in kinds), None)
            if picture is None or kinds.isdisjoint(captions):
                continue
            hidden = f"{name}.{picture}"
            is_one = self.kinds == self.extensions.index(hidden)
            key = self.keys()[int(self.samples[is_one][0])]
            return (
                f"shard {redact(self.path)!r} holds members that look like pairs of their own and "
                f"are not read: {explain_dots(key, [hidden], [picture])}"
            )
        return ""


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member name into key and extension, at the first dot of the base name.

    Returns:
        (key, lower-case extension), or None for what webdataset skips: hidden files, names without
        extension, and ``__meta__`` entries.

    Example:
        >>> split_name("a.b/0001.v2.JPG")
        ('a.b/0001', 'v2.jpg')
        >>> split_name("README") is None
        True
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base:
        return None
    top = name.split("/", 1)[0]
    if top.startswith("__") and top.endswith("__") and len(top) > 4:
        return None
    return name[:dot], name[dot + 1 :].lower()


def explain_dots(key: str, extensions: Iterable[str], wanted: Collection[str]) -> str:
    """Explain a member that is not found because there is a dot in its name.

    Returns:
        Cause, example and remedy; empty if dots are not the cause.
    """
    for extension in extensions:
        last = extension.rpartition(".")[2]
        if last != extension and last in wanted:
            return (
                f"names are split at their first dot, as webdataset does, so '{key}.{extension}' "
                f"is member {extension!r} of sample {key!r}: put no dot before the extension; "
                "dist-siglip data pack of the unpacked folder does that"
            )
    return ""


def build_index(
    path: str, members: list[Member], *, damage: str = "", note: str = ""
) -> ShardIndex:
    """Group the members of a shard into samples.

    Members of one sample need not stand next to each other. Of two members of one name the first
    counts, and the shard is damaged.
    """
    rows: dict[str, int] = {}
    kinds: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    table: list[tuple[int, int, int, int]] = []
    for member in members:
        parts = split_name(member.name)
        if parts is None:
            continue
        key, extension = parts
        place = (rows.setdefault(key, len(rows)), kinds.setdefault(extension, len(kinds)))
        if place in seen:
            damage = damage or (
                f"shard {path!r} holds member {member.name!r} twice; every key may occur once a "
                "shard: write the shard again"
            )
            continue
        seen.add(place)
        table.append((*place, member.offset, member.size))
    columns = np.array(table, dtype=np.int64).reshape(-1, 4).T.copy()
    index = index_of_members(path, list(rows), tuple(kinds), columns)
    return replace(index, damage=damage, note=note)


def index_of_members(
    path: str,
    keys: Sequence[str],
    extensions: tuple[str, ...],
    columns: NDArray[np.int64],
    content: bytes = b"",
) -> ShardIndex:
    """Describe the members of samples.

    Args:
        path: the shard.
        keys: of the samples.
        extensions: that occur.
        columns: (4, members): sample, extension, offset and size of each.
        content: what else tells changed data.
    """
    joined = SEPARATOR.join(keys).encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(extensions).encode() + b"\0" + joined + b"\0")
    digest.update(columns.astype("<i8").tobytes() + content)
    return ShardIndex(
        path=path,
        num_samples=len(keys),
        extensions=extensions,
        joined_keys=np.frombuffer(joined, dtype=np.uint8),
        samples=columns[0],
        kinds=columns[1],
        offsets=columns[2],
        sizes=columns[3],
        digest=digest.hexdigest(),
    )


def remedy_of(index: ShardIndex, setting: str, extensions: list[str], num_missing: int) -> str:
    """Say what a shard holds, and what to do about members that are not there."""
    if not index.columns:
        present = ", ".join(f".{extension}" for extension in index.extensions[:8])
        remedy = "write it again with both members of every sample"
        if is_table(index.path):
            remedy = "correct its rows, or name other columns in captions.members"
        unread = formats_of(index.extensions, extensions)
        if setting == "image_extensions" and unread:
            remedy = f"name what it has, formats: [{', '.join([*FORMATS, *unread])}]"
        return f"the shard holds {present}: {remedy}"
    if num_missing < index.num_samples:
        return "write the file without these rows, or set on_damage to skip"
    present = ", ".join(ascii(name)[1:-1] for name in index.columns[:20])
    return f"the file has the columns {present}: name the one that is meant in {setting}"
