"""Expansion of a shard specification to a list of locations.

A specification is a path, a folder, a pattern of braces or stars, a URL, a text file of these or a
list of them; locations come in the order given (those of a folder or of stars sorted by name).
Local files must exist; whether a remote one does is found when it is indexed.
"""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from glob import glob

from dist_siglip.data.remote.locations import (
    check_location,
    is_parquet,
    is_remote,
    is_table,
    redact,
)
from dist_siglip.data.remote.transfer import glob_remote, list_remote
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import open_text

__all__ = ["expand_shards", "is_remote"]

_ALLOWED = (
    "allowed: a local .tar or .parquet file, a folder of these, a .csv or .jsonl of paths and "
    "captions or the folder with it, a pattern of braces or *, a .txt file of these, a URL of "
    "http, https, s3, gs or hf, or a list of these"
)
_LOGGER = logging.getLogger(__name__)
_COMPRESSED = re.compile(r"\.(tar\.(gz|zst|xz|bz2|lz4|Z)|tgz|tzst|txz|tbz2?)$")
_MOST = 10_000_000  # locations of one pattern
_DEEPEST = 20  # braces in braces
_TOKEN = re.compile(r"\\.|[{},]", re.DOTALL)
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
_IPV6 = re.compile(r"(https?://(?:[^/@]*@)?\[[0-9A-Fa-f:.]+\](?::\d+)?)(/.*)")


def expand_shards(
    spec: str | Sequence[str], *, name: str = "shards", allow_remote: bool = True
) -> list[str]:
    """List the shards that a specification names.

    A path that exists is taken literally, even if its name holds braces. Otherwise braces are
    expanded and ``::`` separates alternatives, as in webdataset; then ``*`` stands for any part of
    a name, and ``**`` for any folders.

    Args:
        spec: path, folder, pattern such as ``"train/{00000..00127}.tar"`` or
            ``"hf://datasets/me/set/**/*.parquet"``, URL, ``.txt`` file with one of these a line
            (``#`` begins a comment line, relative paths count from its folder), or a list. A URL
            of s3, gs or hf that ends in ``/`` is a folder.
        name: the setting it came from, for the error text.
        allow_remote: whether URLs are taken.

    Returns:
        Existing files and URLs in the order given; a folder contributes its ``*.tar``, or else its
        ``*.parquet``, sorted, but for hidden ones, or else its one table of paths and captions.

    Raises:
        UserError: if a file is missing or named twice, a folder holds no shard, nothing is
            named, or something is no path and no URL that is opened (``pipe:``, ``file:``, ...).
        RemoteError: if a remote folder cannot be listed.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    paths = [path for pattern in patterns for path in _expand(pattern, name, allow_remote)]
    if not paths:
        raise UserError(f"{name} ({redact(repr(spec))}) names no shard; {_ALLOWED}")
    seen: set[str] = set()
    for path in paths:
        real = path if is_remote(path) else os.path.realpath(path)
        if real in seen:
            raise UserError(f"{name} names {redact(path)!r} twice; list every shard once")
        seen.add(real)
    return paths


def _expand(pattern: str, name: str, allow_remote: bool, folder: str | None = None) -> list[str]:
    """Expand one element; ``folder`` is that of the list file it stands in."""
    if "\0" in pattern or not _can_be_a_path(pattern):
        raise UserError(f"{name} ({redact(pattern)!r}) holds a control character; {_ALLOWED}")
    literal = _local(pattern, folder)
    if os.path.isdir(literal):
        return _list_folder(literal, name)
    if os.path.isfile(literal):
        if not literal.endswith(".txt"):
            return [literal]
        if folder is not None:
            raise UserError(f"{name}: list file {literal!r} stands in a list file; name its lines")
        return _read_list(literal, name, allow_remote)
    found: list[str] = []
    missing: list[str] = []
    for part in _expand_braces(pattern, name):
        check_location(part, name)
        path = _local(part, folder)
        if is_remote(part):
            if not allow_remote:
                raise UserError(f"{name} ({redact(part)!r}) is not a path on this machine")
            if "*" in part:
                found.extend(_match_url(part, name))
            else:
                found.extend(_list_url(part, name) if part.endswith("/") else [part])
        elif os.path.isdir(path):
            found.extend(_list_folder(path, name))
        elif os.path.isfile(path):
            found.append(path)
        elif "*" in path and (matches := _match(path)):
            found.extend(matches)
        else:
            missing.append(path)
    if missing:
        files = "a missing file" if len(missing) == 1 else f"{len(missing)} missing files, first"
        raise UserError(
            f"{name} ({redact(pattern)!r}) names {files} {redact(missing[0])!r}; {_ALLOWED}"
        )
    return found


def _can_be_a_path(text: str) -> bool:
    """Tell whether this machine can write a text as the bytes of a path."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False
    return True


def _local(path: str, folder: str | None) -> str:
    """Return a path as this process opens it."""
    path = os.path.expanduser(path)
    return path if folder is None or is_remote(path) else os.path.join(folder, path)


def _read_list(path: str, name: str, allow_remote: bool) -> list[str]:
    """Expand the lines of a list file."""
    try:
        with open_text(path) as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise UserError(f"{name} ({path!r}) is not a text file in UTF-8") from error
    folder = os.path.dirname(path)
    wanted = [line for line in lines if line and not line.startswith("#")]
    return [shard for line in wanted for shard in _expand(line, name, allow_remote, folder)]


def _match(pattern: str) -> list[str]:
    """List the files that a pattern with stars names, sorted; hidden ones are none."""
    return sorted(path for path in glob(pattern, recursive=True) if os.path.isfile(path))


def _match_url(pattern: str, name: str) -> list[str]:
    """List the files of a store that a pattern with stars names."""
    if pattern.startswith("http"):
        raise UserError(
            f"{name} ({redact(pattern)!r}) holds a *, and a web server cannot be listed; write a "
            "brace pattern"
        )
    found = glob_remote(pattern)
    if not found:
        raise UserError(f"{name} ({redact(pattern)!r}) names no file; {_ALLOWED}")
    return found


def _list_url(url: str, name: str) -> list[str]:
    """List the shards directly inside a remote folder."""
    if url.startswith("http"):
        raise UserError(
            f"{name} ({redact(url)!r}) is a folder of a web server, which cannot be listed; "
            "write a brace pattern"
        )
    files = {file.rpartition("/")[2]: file for file in list_remote(url)}
    return [files[entry] for entry in _pick(files, url, name)]


def _expand_braces(pattern: str, name: str) -> list[str]:
    """Expand braces and ``::`` with webdataset's own rules."""
    shown = redact(pattern)
    if "${" in pattern:  # webdataset would read the environment
        raise UserError(f"{name} ({shown!r}) holds a variable ${{...}}; write the path out")
    if sum(_count(part) for part in pattern.split("::")) > _MOST:
        raise UserError(
            f"{name} ({shown[:200]!r}) names more than {_MOST} shards, or nests braces too deeply"
        )
    # Read once, at webdataset's first import: no pickles, no commands, whoever calls it later.
    os.environ["WDS_SECURE"] = "1"
    from webdataset.shardlists import expand_urls

    host, rest = "", pattern
    if address := _IPV6.fullmatch(pattern):  # its colons separate nothing
        host, rest = address[1], address[2]
    try:
        return [host + part for part in expand_urls(rest)]
    except ValueError as error:  # unbalanced braces
        raise UserError(
            f"{name} ({shown!r}) is not a brace pattern: {redact(str(error))!a}"
        ) from None


def _count(pattern: str) -> int:
    """Bound the number of texts a brace pattern expands to, without expanding it."""
    done, product = [0], [1]  # of each open brace: alternatives before, and the one it is in
    starts = [0]
    for token in _TOKEN.finditer(pattern):
        if token[0] == "{":
            done.append(0)
            product.append(1)
            starts.append(token.end())
        elif token[0] == "," and len(done) > 1:
            done[-1] += product[-1]
            product[-1] = 1
        elif token[0] == "}" and len(done) > 1:
            inside = pattern[starts.pop() : token.start()]
            alternatives = max(done.pop() + product.pop(), _range_length(inside))
            product[-1] *= alternatives
        if len(done) > _DEEPEST or product[-1] > _MOST:
            return _MOST + 1
    return product[-1]


def _range_length(text: str) -> int:
    """Bound the length of a range such as ``00..99`` or ``a..f``; 1 for other texts."""
    if ends := _NUMBERS.fullmatch(text):
        if max(len(ends[1]), len(ends[2])) > len(str(_MOST)) + 12:
            return _MOST + 1
        return abs(int(ends[1]) - int(ends[2])) + 1
    return 52 if _LETTERS.fullmatch(text) else 1


def _list_folder(folder: str, name: str) -> list[str]:
    """List the shards directly inside a folder, sorted by name; without any, its one table."""
    entries = os.listdir(folder)
    tables = sorted(each for each in entries if is_table(each) and each[0] != ".")
    if tables and not any(each.endswith(".tar") or is_parquet(each) for each in entries):
        if len(tables) > 1:
            raise UserError(
                f"{name} ({folder!r}) is a folder with {len(tables)} tables, "
                f"{', '.join(tables[:4])}; name the one that is meant, or list them"
            )
        return [os.path.join(folder, tables[0])]
    return [os.path.join(folder, entry) for entry in _pick(os.listdir(folder), folder, name)]


def _pick(entries: Iterable[str], folder: str, name: str) -> list[str]:
    """Pick the shards among the file names of a folder, sorted; hidden files are none."""
    visible = sorted(entry for entry in entries if not entry.startswith("."))
    # img2dataset leaves a table beside every tar.
    shards = [entry for entry in visible if entry.endswith(".tar")]
    shards = shards or [entry for entry in visible if is_parquet(entry)]
    packed = [entry for entry in visible if _COMPRESSED.search(entry)]
    but = f"{len(packed)} compressed ones, first {packed[0]!r}: unpack them" if packed else ""
    if not shards:
        hint = f", but with {but}" if but else ""
        raise UserError(
            f"{name} ({redact(folder)!r}) is a folder without .tar or .parquet files{hint}; "
            f"{_ALLOWED}"
        )
    if packed:
        _LOGGER.warning("%s (%r): not read beside the shards are %s", name, redact(folder), but)
    return shards
