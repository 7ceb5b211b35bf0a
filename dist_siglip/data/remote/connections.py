"""Connections of this process to remote stores: time limits, retries, and the errors that end them.

fsspec's asynchronous file systems run on an event loop in a thread, which a forked process does not
have: its first call would wait for ever. So loop and file systems are made new in every process.
What a fork brings along is kept, untouched: to close it would close the sockets of the parent.

Endpoints and credentials come from where each package looks for them, never from a setting:
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_PROFILE``, ``AWS_ENDPOINT_URL`` for s3 (any
compatible server), ``GOOGLE_APPLICATION_CREDENTIALS``, ``STORAGE_EMULATOR_HOST`` for gs,
``HF_TOKEN``, ``HF_ENDPOINT`` for hf, ``HTTPS_PROXY`` and ``~/.netrc`` for http, and fsspec's own
configuration (``FSSPEC_S3_ENDPOINT_URL`` and the files in ``~/.config/fsspec``).

The pause between tries doubles, and is drawn around that so that a thousand nodes do not come back
together. A missing file or a denied access is not tried again. A server that does not answer, or is
overloaded, is waited for; a file that comes and is not the right one is tried only a few times.

A thread that works ahead of training gives an event to its waits (``stoppable``): each of them
ends soon after the event is set, also in the middle of a transfer.
"""

import asyncio
import atexit
import concurrent.futures
import errno
import logging
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

from dist_siglip.data.remote.locations import redact
from dist_siglip.errors import OutageError, UserError

_LOGGER = logging.getLogger(__name__)

_STEP_SECONDS = 0.1
_THREAD = threading.local()
ATTEMPTS = 5  # by default
PATIENCE_SECONDS = 300.0
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_DEEPEST_CAUSE = 5
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_MISSING = "it does not exist"
_DENIED = "access is denied; credentials come from the environment"
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # of botocore
_REFUSALS = {
    400: "the server refuses the request",
    401: _DENIED,
    403: _DENIED,
    404: _MISSING,
    405: "the server refuses the request",
    410: _MISSING,
}
_CONNECT_SECONDS = 15.0
_STALL_SECONDS = 60.0  # without a byte
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST", "FSSPEC_GS_ENDPOINT_URL"),
    "hf": ("HF_ENDPOINT",),
}


class StoppedError(BaseException):
    """This thread was told to stop; no failure, so nothing that catches failures may catch it."""


@contextmanager
def stoppable(stopped: threading.Event) -> Iterator[None]:
    """Let the waits of this thread end once an event is set, while the block runs."""
    _THREAD.stopped = stopped
    try:
        yield
    finally:
        _THREAD.stopped = None


def longest_wait(seconds: float) -> float:
    """Return how long this thread may wait in one go.

    Raises:
        StoppedError: if it was told to stop.
    """
    stopped: threading.Event | None = getattr(_THREAD, "stopped", None)
    if stopped is None:
        return seconds
    if stopped.is_set():
        raise StoppedError
    return min(seconds, _STEP_SECONDS)


def pause(seconds: float) -> None:
    """Sleep.

    Raises:
        StoppedError: soon after this thread is told to stop.
    """
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(longest_wait(left))


_Result = TypeVar("_Result")


class RemoteError(Exception):
    """Remote file unavailable; one line with the URL, the attempts and the last reason.

    Attributes:
        is_missing: whether the server says that there is no such file.
    """

    def __init__(self, text: str, *, is_missing: bool = False) -> None:
        super().__init__(text)
        self.is_missing = is_missing

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), str(self), self.is_missing)


class RemoteRefusalError(RemoteError, UserError):
    """The server has no such file, denies it, or has one that is not the right one."""


class RemoteOutageError(RemoteError, OutageError):
    """The server, or the way to it, does not work for the moment."""


class WrongContentError(OSError):
    """What came is not what the server said that it would be."""


def attempt(
    url: str,
    attempts: int,
    call: Callable[[], _Result],
    patience_seconds: float = 0.0,
) -> _Result:
    """Call until it works, or trying again cannot help.

    Args:
        url: what is asked for, for the error text.
        attempts: calls, at least 1.
        call: raises anything if it fails.
        patience_seconds: how long an outage is waited for, however many calls that takes.

    Raises:
        RemoteRefusalError: if trying again cannot help, or what comes is wrong every time.
        RemoteOutageError: if there is no answer in the end.
        UserError: as ``call`` raises it.
        OSError: if this machine does not take the bytes (disk full, file too large).
    """
    since = time.monotonic()
    for number in count(1):
        try:
            return call()
        except (UserError, RemoteError):
            raise
        except Exception as error:  # each package raises classes of its own
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                raise
            refusal = _refusal(error)
            reason = refusal or _reason(error)
            is_outage = refusal is None and not isinstance(error, WrongContentError)
        seconds = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(number - 1, 30))
        seconds *= random.uniform(0.5, 1.5)
        if number >= attempts:
            left = since + patience_seconds - time.monotonic() if is_outage else 0.0
            seconds = min(seconds, left)
        if refusal or seconds <= 0:
            tries = "1 attempt" if number == 1 else f"{number} attempts"
            text = f"{redact(url)} cannot be fetched ({tries}): {reason}"
            if is_outage:
                raise RemoteOutageError(text)
            raise RemoteRefusalError(text, is_missing=refusal == _MISSING)
        _LOGGER.info("%s: %s; attempt %d follows", redact(url), reason, number + 1)
        if number == attempts:
            _LOGGER.warning(
                "%s: %s; waiting for it, %.0f s at most (cache.patience_seconds)",
                redact(url),
                reason,
                left,
            )
        pause(seconds)
    raise AssertionError("count has no end")


def _restore(cls: type[RemoteError], text: str, is_missing: bool) -> RemoteError:
    return cls(text, is_missing=is_missing)


def _refusal(error: BaseException) -> str | None:
    """Return why trying again cannot help; None if it may."""
    status = _status(error) or _status(error.__cause__)
    if status is not None:
        return _REFUSALS.get(status)
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return _MISSING
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return "there is no such host"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "its certificate cannot be verified"
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        return _DENIED
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """List an error and what is behind it, also where aiohttp keeps that."""
    seen: BaseException | None = error
    for _ in range(_DEEPEST_CAUSE):
        if seen is None:
            return
        yield seen
        seen = getattr(seen, "os_error", None) or seen.__cause__


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an exception, if it tells one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # aiohttp's own "code" is 400 for a connection that was cut; gcsfs means the server's.
    own = error if type(error).__name__ == "HttpError" else None
    for holder, field in ((error, "status"), (response, "status_code"), (own, "code")):
        value = getattr(holder, field, None)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _reason(error: BaseException) -> str:
    """Describe a failure in one line, without what a URL hides."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = _status(cause)
    if status is not None:
        return f"the server answered {status}"
    text = " ".join(redact(str(cause)).split())[:200]
    if isinstance(cause, WrongContentError):
        return text
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


class _Connections:
    """The event loop of one process and its file systems by scheme."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.file_systems: dict[str, Any] = {}
        self.loop: asyncio.AbstractEventLoop | None = None


_CONNECTIONS = [_Connections()]  # the last one is of this process


def _begin_anew() -> None:
    """Leave the connections of the parent alone; runs in a forked process."""
    _CONNECTIONS.append(_Connections())


os.register_at_fork(after_in_child=_begin_anew)


def file_system(url: str) -> Any:
    """Return the fsspec file system for a URL; one for each scheme and process.

    Its coroutines (``_info``, ``_get_file``, ...) go through ``wait_for``; the one of hf has none.

    Raises:
        UserError: if the package of the protocol is not installed.
    """
    scheme = url.partition(":")[0]
    connections = _CONNECTIONS[-1]
    with connections.lock:
        if scheme not in connections.file_systems:
            connections.file_systems[scheme] = _connect(scheme)
        return connections.file_systems[scheme]


def endpoint(url: str) -> str:
    """Name the server that the environment puts behind a URL; empty for the usual one.

    The same ``s3://`` URL means another file on another server.
    """
    names = _ENDPOINTS.get(url.partition(":")[0], ())
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def wait_for(call: Coroutine[Any, Any, _Result], limit_seconds: float) -> _Result:
    """Run a coroutine of a file system on the loop of this process, and wait for its result.

    Raises:
        TimeoutError: if it takes longer; it is cancelled.
        StoppedError: if this thread is told to stop; it is cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(call, _running_loop())
    until = time.monotonic() + limit_seconds
    try:
        while (left := until - time.monotonic()) > 0:
            concurrent.futures.wait([future], longest_wait(left))
            if future.done():
                return future.result()
    except BaseException:
        future.cancel()
        raise
    future.cancel()
    raise TimeoutError(f"no answer within {limit_seconds:.0f} s")


def _connect(scheme: str) -> Any:
    """Make the file system of a scheme, with time limits in its own words."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        cls = fsspec.get_filesystem_class(scheme)
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            limits = ClientTimeout(
                total=None, sock_connect=_CONNECT_SECONDS, sock_read=_STALL_SECONDS
            )
            options["client_kwargs"] = {"timeout": limits, "trust_env": True}
            options["headers"] = {"Accept-Encoding": "identity"}  # the size is that of the file
        elif scheme == "s3":
            options["config_kwargs"] = {
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": _STALL_SECONDS,
                "retries": {"max_attempts": 1},
            }
        elif scheme == "hf" and (server := endpoint("hf://")):
            options["endpoint"] = server
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs a package that is not installed ({error.name or error}); "
            'pip install "dist-siglip[remote]"'
        ) from error
    if getattr(cls, "async_impl", False):
        options["asynchronous"] = True
    return cls(**options, use_listings_cache=False)


def _running_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process, started on a daemon thread by the first call."""
    connections = _CONNECTIONS[-1]
    with connections.lock:
        if connections.loop is None:
            connections.loop = asyncio.new_event_loop()
            threading.Thread(
                target=connections.loop.run_forever, name="shard transfers", daemon=True
            ).start()
            atexit.register(_close, connections, os.getpid())
        return connections.loop


def _close(connections: _Connections, pid: int) -> None:
    """Close the sessions of the process that opened them, before Python takes its modules down."""
    if connections.loop is None or pid != os.getpid():
        return
    for system in connections.file_systems.values():
        session, client = getattr(system, "_session", None), getattr(system, "_s3", None)
        try:
            if session is not None:
                wait_for(session.close(), 1.0)
            if client is not None:
                wait_for(client.close(), 1.0)
        except (TimeoutError, RuntimeError, OSError):  # it ends with the process anyway
            pass
    connections.loop.call_soon_threadsafe(connections.loop.stop)
