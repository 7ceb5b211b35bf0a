"""Locations of shards: paths of this machine and URLs of five schemes.

Everything else that looks like a URL (``pipe:``, ``file:``, a chain of openers) is refused, so
nothing behind this file ever starts a command. A URL may carry a password or a signature, so texts
show it through ``redact``.
"""

import re
from urllib.parse import urlsplit

from dist_siglip.errors import UserError
from dist_siglip.system.redaction import redact

__all__ = [
    "SCHEMES",
    "check_location",
    "is_parquet",
    "is_remote",
    "is_table",
    "redact",
    "shard_name",
]

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
SCHEMES = ("http", "https", "s3", "gs", "hf")
PARQUET_ENDS = (".parquet", ".pq")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]")


def is_remote(location: str) -> bool:
    """Say whether a location is a URL of http, https, s3, gs or hf.

    Example:
        >>> is_remote("s3://bucket/00000.tar"), is_remote("/data/00000.tar")
        (True, False)
    """
    return location.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def check_location(location: str, name: str) -> None:
    """Refuse what is neither a path nor a URL that is opened.

    Raises:
        UserError: if it holds a control character, has another scheme, names no host or file, or
            is a chain of openers.
    """
    shown = redact(location)
    if _CONTROL.search(location):
        raise UserError(f"{name} ({shown!r}) holds a control character; write the location out")
    scheme = _SCHEME.match(location)
    if scheme is None:
        return
    if not is_remote(location):
        known = ", ".join(f"{one}://" for one in SCHEMES)
        hint = "; write the scheme in lower case" if scheme[1].lower() in SCHEMES else ""
        raise UserError(
            f"{name} ({shown!r}) is not a path on this machine, nor a URL that is opened "
            f"({known}){hint}"
        )
    try:
        parts = urlsplit(location)
    except ValueError as error:  # a bracket that is not closed
        raise UserError(f"{name} ({shown!r}) is not a URL: {error}") from None
    host, place = parts.netloc, location[len(scheme[0]) + 2 :].partition("/")[2]
    if not host or not place:
        raise UserError(f"{name} ({shown!r}) names no file; allowed: {scheme[1]}://place/file.tar")
    if "::" in place or "::" in re.sub(r"\[[0-9A-Fa-f:.]*\]", "", host):
        raise UserError(f"{name} ({shown!r}) chains openers (::); name the shard itself")
    if "@" not in host and "@" in location and re.search(r":[^\d\]:]", host):
        raise UserError(
            f"{name} ({shown!r}) seems to hold a password with one of / ? # in it; write these as "
            "%2F %3F %23, or keep the password in ~/.netrc"
        )
    if "@" in host and scheme[1] not in ("http", "https"):
        raise UserError(f"{name} ({shown!r}) holds credentials; put them into the environment")


def shard_name(location: str) -> str:
    """Return the file name of a location, without the query of a URL.

    Example:
        >>> shard_name("https://host/set/00000.tar?sig=12ab"), shard_name("/data/00001.tar")
        ('00000.tar', '00001.tar')
    """
    path = re.split(r"[?#]", location)[0] if is_remote(location) else location
    return path.rstrip("/").rpartition("/")[2]


def is_parquet(location: str) -> bool:
    """Say whether a location is that of a Parquet file, by its name.

    Example:
        >>> is_parquet("hf://datasets/me/set/0.parquet"), is_parquet("/data/00001.tar")
        (True, False)
    """
    return shard_name(location).lower().endswith(PARQUET_ENDS)


def is_table(location: str) -> bool:
    """Say whether a location is that of a table on this machine, by its name.

    Example:
        >>> is_table("/data/captions.CSV"), is_table("/data/0.tar"), is_table("https://a/b.csv")
        (True, False, False)
    """
    return location.lower().endswith(_TABLES) and not is_remote(location)
