"""The search page: a local web server of the standard library, for one person or a few.

    GET  /                     the page; /page.css, /page.js
    GET  /about                what is searched, as JSON
    GET  /search?text=T&k=K    the pictures nearest to a text
    GET  /search?row=R&k=K     the pictures nearest to one of them
    POST /search?k=K           the pictures nearest to the JPEG, PNG or WebP in the body
    GET  /picture/ID/R         a small copy of a picture; ID is that of the folder

No path of a request is ever one of a file. Answers come to this page alone: the Host must be an
address of this machine, so that no other site can borrow the address by its own name, and a browser
that says that another site asks is refused. Requests, bodies, their number at a time and the wait
for their bytes are bounded; errors are one line of JSON.
"""

import hashlib
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.errors import OutageError, UserError
from dist_siglip.evaluation.search import Hit, PictureSearch
from dist_siglip.evaluation.search.pictures import ShardPictures
from dist_siglip.system.redaction import redact

_LOGGER = logging.getLogger(__name__)

MOST_BODY_BYTES = 32 * 2**20
MOST_TEXT = 1000  # characters of a query
MOST_PICTURES = 200  # of an answer
_PICTURES = 24
_EXAMPLES = 6
_AT_ONCE = 16  # requests; more wait, and are then asked to come again
_WAIT_SECONDS = 10.0
_CONNECTIONS = 64
_PATIENCE_SECONDS = 15.0  # for the next bytes of a client
_MOST_SECONDS = 60.0  # for all bytes of a picture
_UNREAD_BYTES = 2**20  # of a refused body that are read, so that the client hears why
_NAMES = ("localhost", "127.0.0.1", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_ICON = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16" fill="none" stroke="#4d8fcc"
 stroke-width="2" stroke-linecap="round"><circle cx="7" cy="7" r="4.5"/>
<path d="m10.5 10.5 4 4"/></svg>"""
_FILES = {"/icon.svg": ("image/svg+xml", _ICON)} | {
    path: (media_type, Path(__file__).with_name(name).read_bytes())
    for path, name, media_type in (
        ("/", "page.html", "text/html; charset=utf-8"),
        ("/page.css", "page.css", "text/css; charset=utf-8"),
        ("/page.js", "page.js", "text/javascript; charset=utf-8"),
    )
}


class _RefusedError(Exception):
    """A request that gets no answer but a status and a line."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status = status


class Answer(NamedTuple):
    """What a request gets.

    Attributes:
        content: the body.
        media_type: of it.
        lasting: whether a browser may keep it: it never changes under this address.
    """

    content: bytes
    media_type: str = "application/json"
    lasting: bool = False


class SearchServer(ThreadingHTTPServer):
    """Serves the page of one folder.

    Args:
        search: what is asked.
        pictures: what is shown.
        host: address to listen at; other than a loopback one, everybody who can reach it may search
            and see the pictures.
        port: to listen at; 0 takes a free one.

    Raises:
        UserError: if the address cannot be used.
    """

    daemon_threads = True

    def __init__(
        self, search: PictureSearch, pictures: ShardPictures, *, host: str, port: int
    ) -> None:
        self.search, self.pictures = search, pictures
        self.slots = threading.BoundedSemaphore(_AT_ONCE)
        self._connections = threading.BoundedSemaphore(_CONNECTIONS)
        self._host = host
        rows = search.rows
        content = json.dumps([rows.manifest, str(rows.folder.resolve()), len(rows)]).encode()
        self.folder_id = hashlib.blake2b(content, digest_size=8).hexdigest()
        self._about = json.dumps(self._describe()).encode()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, TypeError) as error:  # TypeError: no name of a machine
            raise UserError(
                f"host ({host}), port ({port}) cannot be listened at "
                f"({getattr(error, 'strerror', None) or error}); give another port, or 0 for a "
                "free one"
            ) from error
        self.is_local = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = self._host if self.is_local else "localhost"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind, without looking up the name of the machine, which may wait for a server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self._host, int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, unless there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the requests of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet of connections that end in the middle of a request."""
        _LOGGER.debug("a connection failed", exc_info=True)

    def allows(self, host: str) -> bool:
        """Whether a Host header names this machine; addresses are no names that others give."""
        name = urlsplit(f"//{host}").hostname or ""
        if name in (*_NAMES, self._host.lower()):
            return True
        if self.is_local:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name == socket.gethostname().lower()
        return True

    def answer_get(self, path: str, options: dict[str, str]) -> Answer:
        """Answer a GET request."""
        if path in _FILES:
            media_type, content = _FILES[path]
            return Answer(content, media_type)
        if path == "/about":
            return Answer(self._about)
        if path == "/search":
            k = _number(options, "k", _PICTURES, 1, MOST_PICTURES)
            if "row" in options:
                row = _number(options, "row", 0, 0, len(self.search.rows) - 1)
                return self._found(lambda: self.search.by_row(row, k))
            text = options.get("text", "")
            if not text.strip() or len(text) > MOST_TEXT:
                raise _RefusedError(
                    HTTPStatus.BAD_REQUEST, f"text must have 1 to {MOST_TEXT} characters"
                )
            return self._found(lambda: self.search.by_text(text, k))
        match path.split("/"):
            case ["", "picture", self.folder_id, number]:
                row = _number({"row": number}, "row", 0, 0, len(self.search.rows) - 1)
                media_type, content = self.pictures.copy(row)
                return Answer(content, media_type, lasting=True)
        raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such page")

    def answer_post(self, path: str, options: dict[str, str], body: bytes) -> Answer:
        """Answer a POST request."""
        k = _number(options, "k", _PICTURES, 1, MOST_PICTURES)
        return self._found(lambda: self.search.by_picture(body, k))

    def _found(self, find: Callable[[], Sequence[Hit]]) -> Answer:
        started = time.monotonic()
        hits = find()
        content = {
            "milliseconds": round(1000 * (time.monotonic() - started), 1),
            "pictures": [
                {
                    "row": hit.row,
                    "score": round(hit.score, 4),
                    "key": hit.place.key,
                    "shard": hit.place.shard,
                    "caption": hit.place.caption,
                    "picture": f"/picture/{self.folder_id}/{hit.row}",
                }
                for hit in hits
            ],
        }
        return Answer(json.dumps(content).encode())

    def _describe(self) -> dict[str, Any]:
        rows = self.search.rows
        step = max(1, len(rows) // _EXAMPLES)
        captions = [rows.place(row).caption for row in range(0, len(rows), step)]
        return {
            "name": rows.folder.resolve().name,
            "pictures": len(rows),
            "dim": rows.dim,
            "dtype": rows.dtype,
            "method": self.search.method,
            "examples": [each for each in dict.fromkeys(captions) if 0 < len(each) <= 80][
                :_EXAMPLES
            ],
            "picture": f"/picture/{self.folder_id}/",
            "most_bytes": MOST_BODY_BYTES,
            "most_pictures": MOST_PICTURES,
        }


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: SearchServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dist-siglip", ""
    timeout = _PATIENCE_SECONDS

    def do_GET(self) -> None:
        """Answer a GET request; one with a body is the last of its connection."""
        if {"content-length", "transfer-encoding"} & {name.lower() for name in self.headers}:
            self.close_connection = True
        self._respond(lambda path, options: self.server.answer_get(path, options))

    def do_HEAD(self) -> None:
        """Answer a GET request without its body."""
        self.do_GET()

    def do_POST(self) -> None:
        """Answer a POST request."""

        def answer(path: str, options: dict[str, str]) -> Answer:
            if path != "/search":
                raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "POST goes to /search alone")
            return self.server.answer_post(path, options, self._body())

        self._respond(answer)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - of the base class
        """Keep quiet: what is searched for is nobody's business."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Tell what is wrong with a request that the base class refuses."""
        self.close_connection = True
        status = HTTPStatus(code)
        line = "the method must be GET or POST" if code == HTTPStatus.NOT_IMPLEMENTED else ""
        self._send(status, Answer(_line(line or message or status.phrase)))

    def _respond(self, answer: Callable[[str, dict[str, str]], Answer]) -> None:
        """Answer within the bounds, with a line for whatever goes wrong."""
        self._is_body_read = False
        if not self.server.slots.acquire(timeout=_WAIT_SECONDS):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once; try again")
            return
        try:
            self._send(HTTPStatus.OK, answer(*self._read_address()))
        except _RefusedError as error:
            self._refuse(error.status, str(error))
        except BadSampleError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except OutageError as error:
            self._refuse(HTTPStatus.BAD_GATEWAY, str(error))
        except (TimeoutError, ConnectionError):
            self.close_connection = True
        except Exception:
            _LOGGER.exception("a request failed")
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "the search failed; see its log")
        finally:
            self.server.slots.release()

    def _read_address(self) -> tuple[str, dict[str, str]]:
        """Return path and options of a request that may be answered."""
        try:
            self._check_origin()
            split = urlsplit(self.path)
            fields = parse_qs(split.query, max_num_fields=8, errors="strict")
        except ValueError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the address cannot be read") from error
        return split.path, {name: values[-1] for name, values in fields.items()}

    def _check_origin(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.allows(hosts[0]):
            more = "" if self.server.is_local else ", by an address, or by the name that --host is"
            raise _RefusedError(
                HTTPStatus.MISDIRECTED_REQUEST, f"open the page as {self.server.url}{more}"
            )
        if urlsplit(self.path).path in _FILES:  # a link may lead here
            return
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "other sites may not ask")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != hosts[0]:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "other sites may not ask")

    def _body(self) -> bytes:
        """Read the picture of a request, if it is not too large."""
        lengths = self.headers.get_all("Content-Length") or []
        if self.headers.get("Transfer-Encoding") is not None or len(lengths) != 1:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "say the length of the picture, once")
        if not (lengths[0].isascii() and lengths[0].isdigit() and len(lengths[0]) < 16):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the length of the picture is no number")
        length = int(lengths[0])
        if length > MOST_BODY_BYTES:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a picture may have {MOST_BODY_BYTES // 2**20} MiB; this one has "
                f"{length / 2**20:,.0f}",
            )
        parts, left = [], length
        until = time.monotonic() + _MOST_SECONDS
        while left > 0:
            part = self.rfile.read1(min(left, 2**16))
            if not part or time.monotonic() > until:
                raise TimeoutError
            parts.append(part)
            left -= len(part)
        self._is_body_read = True
        return b"".join(parts)

    def _refuse(self, status: HTTPStatus, line: str) -> None:
        """Send a line and drop the connection; of a body that comes, read enough to be heard."""
        self.close_connection = True
        self._send(status, Answer(_line(line)))
        if self.command != "POST" or self._is_body_read:
            return
        with suppress(OSError):
            self.connection.settimeout(1.0)
            for _ in range(_UNREAD_BYTES // 2**16):
                if not self.rfile.read1(2**16):
                    return

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        try:
            self.send_response(status)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            lasting = "private, max-age=86400, immutable"
            self.send_header("Cache-Control", lasting if answer.lasting else "no-store")
            self.send_header("Content-Type", answer.media_type)
            self.send_header("Content-Length", str(len(answer.content)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.content)
        except OSError:  # whoever asked is gone
            self.close_connection = True


def _line(text: str) -> bytes:
    return json.dumps({"error": " ".join(redact(text).split())[:500]}).encode()


def _number(options: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    """Read a whole number of a request, within bounds."""
    text = options.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"{name} must be {least} to {most}")
    return int(text)


__all__ = ["SearchServer"]
