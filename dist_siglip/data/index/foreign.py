"""What the side-cars of other tools say about a shard.

``00000.idx`` of DALI's wds2idx lists the members of ``00000.tar``; version 1.2, with their names,
spares the scan, if a look at the shard agrees with it. ``00000_stats.json`` of img2dataset says
how many samples there ought to be. Neither is believed blindly.
"""

import json
import logging
import os
import tarfile

from dist_siglip.data.index.tar_scan import Member, extra_header_bytes, next_archive, read_header
from dist_siglip.system.regular_file import descriptor_of, open_regular, open_text

_LOGGER = logging.getLogger(__name__)
_BLOCK = 512
_LOOKS = 16  # members whose headers are compared
_LARGEST = 1 << 28  # bytes of a side-car
_IDX_VERSION = "v1.2"


def members_of_idx(shard: str) -> list[Member] | None:
    """Read the members of a shard from its ``.idx``.

    Args:
        shard: local tar file.

    Returns:
        The members in file order; None if there is no such side-car, it is of another version,
        or it does not agree with the shard: where members end, sizes and names of some headers,
        and that nothing but zeros follows the last one.
    """
    path = f"{_stem(shard)}.idx"
    try:
        if os.path.getsize(path) > min(_LARGEST, os.path.getsize(shard)):
            return None  # a member has more bytes of header than of line
        with open_text(path) as file:
            version, _, count = file.readline().partition(" ")
            if version != _IDX_VERSION:
                return None
            members = [member for line in file for member in _parse(line)]
            file.seek(0)
            lines = sum(1 for _ in file) - 1
        agrees = lines == int(count) and _agrees(shard, members)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, tarfile.ReadError) as error:
        _LOGGER.warning("side-car %r is not used: %s", path, error)
        return None
    if not agrees:
        _LOGGER.warning("side-car %r does not agree with its shard and is not used", path)
        return None
    return members


def listed_samples(shard: str) -> int:
    """Say how many samples wds2idx counted for a shard; 0 if it left no count."""
    try:
        with open_text(f"{_stem(shard)}.idx") as file:
            version, _, count = file.readline(100).partition(" ")
            return int(count) if version.startswith("v1") else 0
    except (OSError, ValueError):
        return 0


def expected_samples(shard: str) -> int | None:
    """Say how many samples img2dataset counted for a shard; None if it left no count."""
    path = f"{_stem(shard)}_stats.json"
    try:
        with open_regular(path) as file:
            stats = json.loads(file.read(1 << 20))
        count = stats["successes"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return count if isinstance(count, int) and count >= 0 else None


def _stem(shard: str) -> str:
    """Cut a path at the first dot of its file name, as wds2idx does."""
    folder, name = os.path.split(shard)
    return os.path.join(folder, name.split(".", 1)[0])


def _parse(line: str) -> list[Member]:
    """Parse a line of a sample: extension, offset, size and name of each member."""
    words = line.split()
    if not words or len(words) % 4 or "\0" in line:  # a name with a space in it
        raise ValueError(f"{len(words)} words in a line")
    return [
        Member(words[i + 3], int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 4)
    ]


def _agrees(shard: str, members: list[Member]) -> bool:
    """Compare places of all members and headers of some with the shard."""
    if not members:
        return False
    descriptor = descriptor_of(shard)
    try:
        file_size, position = os.fstat(descriptor).st_size, 0
        for member in members:
            if member.offset < position + _BLOCK or member.offset % _BLOCK or member.size < 0:
                return False
            gap = member.offset - _BLOCK - position
            if gap and gap != extra_header_bytes(os.pread(descriptor, _BLOCK, position)):
                return False  # something lies there that the side-car does not list
            position = member.offset + -(-member.size // _BLOCK) * _BLOCK
        if position > file_size or os.pread(descriptor, _BLOCK, position) != bytes(_BLOCK):
            return False
        if next_archive(descriptor, position) != file_size:
            return False  # wds2idx stops at the first end
        step = -(-len(members) // _LOOKS)
        for member in {*members[::step], members[-1]}:
            header = read_header(os.pread(descriptor, _BLOCK, member.offset - _BLOCK))
            if header != (member.name, member.size):
                return False
    finally:
        os.close(descriptor)
    return True
