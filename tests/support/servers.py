"""Web servers on loopback: the run of one, and one that fails on request and counts requests."""

import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ShardServer:
    """Serves bytes by path.

    Attributes:
        files: bytes by path, without the leading slash.
        etags: tags by path; a path without one gets none.
        headers: more headers by path.
        faults: by path, what happens to the next GETs: "500", "cut" (half of the body, then the
            connection ends), "stall" (half of the body, then nothing until ``release``), "short"
            (a whole answer that is too short), "changed" (the next answers have another tag).
        answers: by path, what the next requests of any kind get instead: a status such as 503,
            "drop" (the connection ends), "silence" (nothing until ``release``).
        chunked: paths that are answered in chunks, without a length.
        before_get: called with the path of every GET before it is answered.
        counts: how many requests there were, by (method, path).
        release: set to let stalled transfers end.
    """

    def __init__(self):
        self.files, self.etags, self.headers, self.faults = {}, {}, {}, {}
        self.answers = {}
        self.chunked = set()
        self.before_get = lambda path: None
        self.counts = Counter()
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    def fault_of(self, path):
        return self.next_of(self.faults, path)

    def next_of(self, waiting, path):
        with self.lock:
            return waiting[path].pop(0) if waiting.get(path) else None

    def gets(self):
        """How often each file was fetched."""
        return {path: n for (method, path), n in self.counts.items() if method == "GET"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state = None

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        state, path = self.state, self.path.lstrip("/").split("?")[0]
        with state.lock:
            state.counts[self.command, path] += 1
        if with_body:
            state.before_get(path)
        instead = state.next_of(state.answers, path)
        if instead in ("drop", "silence"):
            if instead == "silence":
                state.release.wait(60)
            self.close_connection = True
            return
        if instead is not None:
            self.send_response(instead)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.startswith("moved/"):
            self.send_response(302)
            self.send_header("Location", "/" + path.removeprefix("moved/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = state.files.get(path)
        fault = state.fault_of(path) if with_body else None
        if body is None or fault == "500":
            self.send_response(404 if body is None else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "changed":
            state.etags[path] = state.etags.get(path, "") + "+"
            fault = None
        sent = body[: len(body) // 2] if fault else body
        self.send_response(200)
        if path in state.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(sent if fault == "short" else body)))
        if path in state.etags:
            self.send_header("ETag", state.etags[path])
        for name, value in state.headers.get(path, {}).items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        if path in state.chunked:
            end = b"" if fault == "cut" else b"0\r\n\r\n"
            sent = b"%x\r\n%b\r\n" % (len(sent), sent) + end
        self.wfile.write(sent)
        if fault in ("cut", "stall"):
            self.wfile.flush()
            if fault == "stall":
                state.release.wait(60)
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Leave out clients that went away: to print their traceback, Python parses source.

        Python 3.11.7 does not survive that in two threads at once (gh-106905).
        """
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def running(handler):
    """Answer with a handler class until the block ends; yield the URL, without a slash."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve():
    """Serve until the block ends; ``url`` of what is yielded ends with a slash."""
    state = ShardServer()
    with running(type("Handler", (_Handler,), {"state": state})) as url:
        state.url = url + "/"
        try:
            yield state
        finally:
            state.release.set()
