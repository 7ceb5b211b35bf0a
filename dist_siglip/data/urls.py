"""Which shard files does the user mean?

A shard specification is a path, a folder, a brace pattern or a list of these; the answer is the
list of local files, in the order given (a folder in the order of its file names). Everything
that is not a path on this machine is refused here, so nothing behind this file ever opens a
URL or starts a command.
"""

import os
import re
from collections.abc import Sequence

from dist_siglip.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_ALLOWED = "allowed: a local .tar file, a folder of .tar files, a brace pattern, or a list of these"


def expand_shards(spec: str | Sequence[str], *, name: str = "shards") -> list[str]:
    """List the local shard files that a specification names.

    A path that exists is taken literally, even if its name holds braces. Otherwise braces are
    expanded and ``::`` separates alternatives, as in webdataset.

    Args:
        spec: path, folder, brace pattern such as ``"train/{00000..00127}.tar"``, or a list.
        name: the setting it came from, for the error text.

    Returns:
        Existing files in the order given; a folder contributes its ``*.tar``, sorted.

    Raises:
        UserError: if a file is missing or named twice, a folder holds no shard, nothing is
            named, or the specification is not local (``pipe:``, ``https:``, ``s3:``, ...).
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    paths = [path for pattern in patterns for path in _expand(pattern, name)]
    if not paths:
        raise UserError(f"{name} ({spec!r}) names no shard; {_ALLOWED}")
    seen: set[str] = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"{name} names {path!r} twice; list every shard once")
        seen.add(real)
    return paths


def _expand(pattern: str, name: str) -> list[str]:
    """Expand one element of a specification into existing files."""
    literal = os.path.expanduser(pattern)
    if os.path.isdir(literal):
        return _list_folder(literal, name)
    if os.path.isfile(literal):
        return [literal]
    paths: list[str] = []
    missing: list[str] = []
    for part in _expand_braces(pattern, name):
        path = os.path.expanduser(part)
        if os.path.isdir(path):
            paths.extend(_list_folder(path, name))
        elif os.path.isfile(path):
            paths.append(path)
        else:
            missing.append(path)
    if missing:
        files = "a missing file" if len(missing) == 1 else f"{len(missing)} missing files, first"
        raise UserError(f"{name} ({pattern!r}) names {files} {missing[0]!r}; {_ALLOWED}")
    return paths


def _expand_braces(pattern: str, name: str) -> list[str]:
    """Expand braces and ``::`` with webdataset's own rules, and refuse what is not local."""
    if "${" in pattern:  # webdataset would read the environment
        raise UserError(f"{name} ({pattern!r}) holds a variable ${{...}}; write the path out")
    # Read once, at webdataset's first import: no pickles, no commands, whoever calls it later.
    os.environ["WDS_SECURE"] = "1"
    from webdataset.shardlists import expand_urls

    try:
        parts: list[str] = expand_urls(pattern)
    except ValueError as error:  # unbalanced braces
        raise UserError(f"{name} ({pattern!r}) is not a brace pattern: {error}") from error
    for part in parts:
        if _SCHEME.match(part):
            raise UserError(f"{name} ({part!r}) is not a path on this machine; {_ALLOWED}")
    return parts


def _list_folder(folder: str, name: str) -> list[str]:
    """List the shards directly inside a folder, sorted by name."""
    names = sorted(entry for entry in os.listdir(folder) if entry.endswith(".tar"))
    if not names:
        raise UserError(f"{name} ({folder!r}) is a folder without .tar files; {_ALLOWED}")
    return [os.path.join(folder, entry) for entry in names]
