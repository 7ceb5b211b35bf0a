"""Connections of this process to remote stores, with a time limit for every call.

fsspec's asynchronous file systems run on an event loop in a thread, which a forked process does not
have: its first call would wait for ever. So loop and file systems are made new in every process.
What a fork brings along is kept, untouched: to close it would close the sockets of the parent.

Endpoints and credentials come from where each package looks for them, never from a setting:
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_PROFILE``, ``AWS_ENDPOINT_URL`` for s3 (any
compatible server), ``GOOGLE_APPLICATION_CREDENTIALS``, ``STORAGE_EMULATOR_HOST`` for gs,
``HF_TOKEN``, ``HF_ENDPOINT`` for hf, ``HTTPS_PROXY`` and ``~/.netrc`` for http, and fsspec's own
configuration (``FSSPEC_S3_ENDPOINT_URL`` and the files in ``~/.config/fsspec``).
"""

import asyncio
import atexit
import concurrent.futures
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from dist_siglip.data.remote.retries import longest_wait
from dist_siglip.errors import UserError

_Result = TypeVar("_Result")
_CONNECT_SECONDS = 15.0
_STALL_SECONDS = 60.0  # without a byte
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST", "FSSPEC_GS_ENDPOINT_URL"),
    "hf": ("HF_ENDPOINT",),
}


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
