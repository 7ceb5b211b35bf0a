"""Verified transfer of a whole remote file to this machine.

What the server says about a file (size, tag, checksum) is asked for first; the file is then
fetched beside its final name, compared, and renamed. ``retries`` says when that is tried again.

A web server that answers in chunks tells no size. Its files are taken if they end as a tar does
(two blocks of zeros), or as a Parquet file; a tag, if there is one, must not change meanwhile.
"""

import base64
import binascii
import hashlib
import io
import os
import re
from typing import Any, BinaryIO, NamedTuple

from dist_siglip.data.remote.connections import (
    ATTEMPTS,
    PATIENCE_SECONDS,
    RemoteError,
    WrongContentError,
    attempt,
    file_system,
    wait_for,
)
from dist_siglip.data.remote.locations import check_location, is_parquet, is_remote, redact
from dist_siglip.errors import UserError

__all__ = [
    "RemoteError",
    "RemoteFile",
    "describe_remote",
    "download",
    "glob_remote",
    "list_remote",
    "read_small",
    "read_tail",
]

_ANSWER_SECONDS = 30.0  # for what is no transfer
_LISTING_SECONDS = 300.0  # of a tree of folders
_SLOWEST_BYTES_PER_SECOND = 1 << 16  # a transfer slower than this has failed
_LONGEST_UNSIZED_SECONDS = 3600.0
_TAR_END = bytes(1024)


class RemoteFile(NamedTuple):
    """What a server says about a file.

    Attributes:
        url: its address.
        size: in bytes; -1 if the server does not tell.
        etag: changes when the content does; None if the server has none.
        md5: checksum, 32 hexadecimal digits; None if the server offers none.
        sha256: checksum, 64 hexadecimal digits; None if the server offers none.
    """

    url: str
    size: int
    etag: str | None = None
    md5: str | None = None
    sha256: str | None = None


def describe_remote(
    url: str,
    *,
    attempts: int = ATTEMPTS,
    patience_seconds: float = 0.0,
    refresh: bool = False,
) -> RemoteFile:
    """Ask the server for size, tag and checksum of a file.

    Args:
        url: http, https, s3, gs or hf.
        attempts: tries, with a growing pause between them.
        patience_seconds: how long an outage is waited for, however many tries that takes.
        refresh: ask, even if this process listed the folder before (hf keeps its listings).

    Raises:
        RemoteError: if there is no such file, or no answer after all attempts.
        UserError: if it is not a URL of these schemes, or a package is missing.
    """
    _check(url)
    return attempt(url, attempts, lambda: _describe(url, refresh), patience_seconds)


def download(
    url: str,
    path: str,
    *,
    attempts: int = ATTEMPTS,
    patience_seconds: float = 0.0,
    remote: RemoteFile | None = None,
    max_bytes: int = 1 << 40,
) -> RemoteFile:
    """Fetch a whole file, verified, so that ``path`` is either complete or not there.

    It is written to ``path + ".part"``; one process at a time may do this for one path. The size is
    compared, and the checksum if the server offers one; else its tag must not change meanwhile.

    Args:
        url: http, https, s3, gs or hf.
        path: local file name; replaced if it exists.
        attempts: tries, with a growing pause between them.
        patience_seconds: how long an outage is waited for, however many tries that takes.
        remote: what ``describe_remote`` answered, if it was asked just now.
        max_bytes: longest file that is taken if the server does not tell its size.

    Returns:
        What was fetched.

    Raises:
        RemoteError: if there is no such file, or no whole one after all attempts.
        UserError: if it is not a URL of these schemes, or a package is missing.
        OSError: if it cannot be written here (disk full, no permission).
    """
    _check(url)
    part = f"{path}.part"
    known = [remote]

    def fetch() -> RemoteFile:
        # Described again after a failure: the file may have changed meanwhile.
        described, known[0] = known[0] or _describe(url, refresh=True), None
        _open_new(part).close()  # what an earlier try still writes goes elsewhere
        _transfer(described, part, max_bytes)
        _verify(described, part)
        has_checksum = described.md5 is not None or described.sha256 is not None
        if not has_checksum and _describe(url, refresh=True) != described:
            raise WrongContentError("it changed while it was fetched")
        return described

    try:
        _open_new(part).close()  # what is wrong on this side shows before any transfer
        result = attempt(url, attempts, fetch, patience_seconds)
        os.replace(part, path)
    except BaseException:
        if os.path.lexists(part):
            os.unlink(part)
        raise
    return result


def read_small(url: str, max_bytes: int, *, attempts: int = ATTEMPTS) -> bytes | None:
    """Read a small file into memory.

    Args:
        url: http, https, s3, gs or hf.
        max_bytes: most it may hold.
        attempts: tries, with a growing pause between them.

    Returns:
        Its bytes, or None if there is no such file.

    Raises:
        RemoteError: if it is longer than ``max_bytes``, or no answer after all attempts.
        UserError: if it is not a URL of these schemes, or a package is missing.
    """
    _check(url)

    def read() -> bytes:
        size = _describe(url).size
        if size > max_bytes:
            raise RemoteError(f"{redact(url)} has {size} bytes, at most {max_bytes} are read")
        data = io.BytesIO()
        if url.startswith(("http", "hf")):
            _get(url, data, max_bytes, _ANSWER_SECONDS)
        else:
            data.write(wait_for(file_system(url)._cat_file(_place(url)), _ANSWER_SECONDS))
        came = len(data.getvalue())
        if size not in (-1, came):
            raise WrongContentError(f"{came} of {size} bytes came")
        return data.getvalue()

    try:
        return attempt(url, attempts, read)
    except RemoteError as error:
        if error.is_missing:
            return None
        raise


def list_remote(
    url: str, *, attempts: int = ATTEMPTS, patience_seconds: float = PATIENCE_SECONDS
) -> list[str]:
    """List the files directly inside a folder of s3, gs or hf, sorted by name.

    Raises:
        RemoteError: if there is no such folder, or no answer after all attempts.
        UserError: if it is not a URL of these schemes, or a package is missing.
    """
    _check(url)
    scheme = url.partition(":")[0]

    def listing() -> list[str]:
        system, place = file_system(url), _place(url).rstrip("/")
        entries: list[dict[str, Any]] = (
            wait_for(system._ls(place, detail=True), _ANSWER_SECONDS)
            if system.async_impl
            else system.ls(place, detail=True)
        )
        return sorted(entry["name"] for entry in entries if entry["type"] == "file")

    names = attempt(url, attempts, listing, patience_seconds=patience_seconds)
    return [f"{scheme}://{name}" for name in names]


def glob_remote(
    pattern: str, *, attempts: int = ATTEMPTS, patience_seconds: float = PATIENCE_SECONDS
) -> list[str]:
    """List the files of s3, gs or hf that a pattern with * or ** names, sorted by name.

    Raises:
        RemoteError: if there is no answer, or no such folder.
        UserError: if it is not a URL of these schemes, or a package is missing.
    """
    _check(pattern)
    scheme = pattern.partition(":")[0]

    def listing() -> list[str]:
        system, place = file_system(pattern), _place(pattern)
        found: dict[str, dict[str, Any]] = (
            wait_for(system._glob(place, detail=True), _LISTING_SECONDS)
            if system.async_impl
            else system.glob(place, detail=True)
        )
        return sorted(name for name, entry in found.items() if entry["type"] == "file")

    names = attempt(pattern, attempts, listing, patience_seconds=patience_seconds)
    return [f"{scheme}://{name}" for name in names]


def read_tail(url: str, file_size: int, size: int) -> bytes:
    """Read the last bytes of a file, asking once.

    Args:
        url: http, https, s3, gs or hf.
        file_size: of the file, as ``describe_remote`` says.
        size: how many bytes.

    Raises:
        RemoteError: if the server does not answer, or gives more or less than that.
        UserError: if it is not a URL of these schemes, or a package is missing.
    """
    _check(url)
    first = file_size - size

    def read() -> bytes:
        data = io.BytesIO()
        if url.startswith(("http", "hf")):
            _get(url, data, size, _ANSWER_SECONDS, f"bytes={first}-{file_size - 1}")
        else:
            call = file_system(url)._cat_file(_place(url), start=first, end=file_size)
            data.write(wait_for(call, _ANSWER_SECONDS))
        came = len(data.getvalue())
        if came != size:
            raise WrongContentError(f"{came} of {size} bytes came")
        return data.getvalue()

    return attempt(url, 1, read)


def _check(url: str) -> None:
    check_location(url, "URL")
    if not is_remote(url):
        raise UserError(f"URL ({url!r}) is a path of this machine; allowed: http, s3, gs, hf")


def _place(url: str) -> str:
    """Return the URL as the file system of its scheme wants it."""
    return url if url.startswith("http") else url.partition("://")[2]


def _describe(url: str, refresh: bool = False) -> RemoteFile:
    """Ask once."""
    system, place = file_system(url), _place(url)
    scheme = url.partition(":")[0]
    if scheme == "s3":
        bucket, key, version = system.split_path(place)
        call = system._call_s3(
            "head_object", Bucket=bucket, Key=key, **({"VersionId": version} if version else {})
        )
        return _of_s3(url, wait_for(call, _ANSWER_SECONDS))
    info: dict[str, Any] = (
        wait_for(system._info(place), _ANSWER_SECONDS)
        if system.async_impl
        else system.info(place, refresh=refresh, expand_info=refresh)
    )
    if info.get("type") != "file":
        raise UserError(f"{redact(url)} is no file")
    if scheme == "gs":
        return RemoteFile(url, int(info["size"]), info.get("etag"), _hex(info.get("md5Hash")))
    if scheme == "hf":
        stored = info.get("lfs") or {}
        sha256 = stored.get("sha256")
        return RemoteFile(url, int(info["size"]), sha256 or info.get("blob_id"), None, sha256)
    size = -1 if info.get("size") is None else int(info["size"])
    return RemoteFile(url, size, info.get("ETag") or info.get("Last-Modified"), _http_md5(info))


def _of_s3(url: str, head: dict[str, Any]) -> RemoteFile:
    """Read the answer of S3. The tag of an object in one part is its MD5, unless a key hides it."""
    etag = str(head.get("ETag", "")).strip('"') or None
    is_plain = head.get("ServerSideEncryption") in (None, "AES256")
    is_plain = is_plain and not head.get("SSECustomerAlgorithm")
    is_md5 = is_plain and etag is not None and re.fullmatch(r"[0-9a-f]{32}", etag)
    return RemoteFile(url, int(head["ContentLength"]), etag, etag if is_md5 else None)


def _http_md5(info: dict[str, Any]) -> str | None:
    """Find an MD5 in the headers of an answer."""
    digests = dict(part.strip().partition("=")[::2] for part in info.get("Digest", "").split(","))
    return _hex(info.get("Content-MD5") or digests.get("md5") or digests.get("MD5"))


def _hex(encoded: str | None) -> str | None:
    """Turn a base64 checksum into hexadecimal digits; None for what is none."""
    try:
        digest = base64.b64decode(encoded or "", validate=True)
    except (binascii.Error, ValueError):
        return None
    return digest.hex() if len(digest) == 16 else None


class _Limited:
    """A file that takes no more than a number of bytes, whatever a server sends."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = limit
        self.read, self.close, self.tell = file.read, file.close, file.tell  # fsspec looks for them

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._limit:
            raise WrongContentError(f"more than {self._limit} bytes came")
        return self._file.write(data)


def _open_new(path: str) -> BinaryIO:
    """Open a new file; what lies there, be it a link to elsewhere, is not written to."""
    if os.path.lexists(path):
        os.unlink(path)
    return open(path, "xb")


def _transfer(remote: RemoteFile, part: str, max_bytes: int) -> None:
    """Fetch once, into a new file that exists."""
    seconds = _ANSWER_SECONDS + remote.size / _SLOWEST_BYTES_PER_SECOND
    if remote.url.startswith(("http", "hf")):
        limit, seconds = (
            (max_bytes, _LONGEST_UNSIZED_SECONDS) if remote.size < 0 else (remote.size, seconds)
        )
        with open(part, "wb") as file:
            _get(remote.url, file, limit, seconds)
    else:
        wait_for(file_system(remote.url)._get_file(_place(remote.url), part), seconds)


def _get(
    url: str, file: BinaryIO, limit: int, seconds: float, bytes_range: str | None = None
) -> None:
    """Write the file behind a URL of http, https or hf, or a range of it, into an open one."""
    address = url
    headers: dict[str, str] = {}
    if url.startswith("hf"):  # its own package has no time limit for a whole transfer
        from huggingface_hub.utils._headers import build_hf_headers

        hub = file_system(url)
        address, headers = hub.url(_place(url)), build_hf_headers(token=hub.token)
    if bytes_range is not None:
        headers = {**headers, "Range": bytes_range}
    options = {"headers": headers} if headers else {}
    call = file_system(address)._get_file(address, _Limited(file, limit), **options)
    wait_for(call, seconds)


def _verify(remote: RemoteFile, part: str) -> None:
    """Compare what came with what the server said."""
    size = os.path.getsize(part)
    if remote.size < 0:
        with open(part, "rb") as file:
            end, kind = (b"PAR1", "Parquet file") if is_parquet(remote.url) else (_TAR_END, "tar")
            file.seek(max(0, size - len(end)))
            if file.read() != end:
                raise WrongContentError(
                    f"{size} bytes of unknown length came, which do not end as a {kind} does"
                )
    elif size != remote.size:
        raise WrongContentError(f"{size} of {remote.size} bytes came")
    for name, expected in (("md5", remote.md5), ("sha256", remote.sha256)):
        if expected is None:
            continue
        digest = hashlib.new(name, usedforsecurity=False)
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            raise WrongContentError(f"the {name} of what came is not the one the server says")
