"""A web server on loopback that speaks what we use of Google's storage and the Hugging Face hub.

One bucket ``shards`` and one data set ``me/shards`` hold the same files.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.support.servers import running

LICENCES = ("apache-2.0", "mit", "other")


class Hub:
    """What is served.

    Attributes:
        files: bytes by path.
        asked: method and path of each request.
        ranges: first and last byte of each part of a file that was asked for.
        tokens: what each of them sent as authorization.
        elsewhere: URL of the server that files of the hub are fetched from, as from its CDN.
        url: its own, without a slash at the end.
    """

    def __init__(self):
        self.files, self.asked, self.url = {}, [], ""
        self.tokens, self.elsewhere, self.ranges = [], "", []


def in_bucket(name, body):
    return {
        "name": name,
        "bucket": "shards",
        "size": str(len(body)),
        "etag": "e" + hashlib.md5(body).hexdigest()[:4],
        "md5Hash": base64.b64encode(hashlib.md5(body).digest()).decode(),
        "generation": "1",
    }


def in_repository(name, body):
    sha256 = hashlib.sha256(body).hexdigest()
    lfs = {"oid": sha256, "size": len(body), "pointerSize": 100}
    return {"type": "file", "path": name, "size": len(body), "oid": "0" * 40, "lfs": lfs}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state = None

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        asked = urlsplit(self.path)
        place, query = unquote(asked.path), parse_qs(asked.query)
        files = self.state.files
        self.state.asked.append((self.command, place))
        self.state.tokens.append(self.headers.get("Authorization"))
        if place.startswith("/storage/v1/b/shards/o/"):
            name = place.removeprefix("/storage/v1/b/shards/o/")
            self.answer(in_bucket(name, files[name]) if name in files else None)
        elif place == "/storage/v1/b/shards/o":
            prefix = query.get("prefix", [""])[0]
            found = [
                in_bucket(name, body) for name, body in files.items() if name.startswith(prefix)
            ]
            self.answer({"items": found})
        elif place.startswith("/download/storage/v1/b/shards/o/"):
            self.answer(files.get(place.removeprefix("/download/storage/v1/b/shards/o/")))
        elif "/paths-info/" in place or "/tree/" in place:
            self.answer([in_repository(name, body) for name, body in files.items()])
        elif "/resolve/main/" in place and self.state.elsewhere:
            self.answer(b"", 302, {"Location": self.state.elsewhere + place})
        elif "/resolve/main/" in place:
            self.answer(files.get(place.partition("/resolve/main/")[2]))
        elif place == "/api/datasets/me/shards":
            self.answer({"id": "me/shards", "sha": "1" * 40, "siblings": []})
        else:
            self.answer(None)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def answer(self, content, status=200, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked and isinstance(content, bytes) and status == 200:
            first, last = int(asked[1]), int(asked[2])
            headers = {**dict(headers), "Content-Range": f"bytes {first}-{last}/{len(body)}"}
            body, status = body[first : last + 1], 206
            self.state.ranges.append((first, last))
        self.send_response(404 if content is None else status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        try:
            if self.command != "HEAD":
                self.wfile.write(body)
        except ConnectionError:  # gcsfs drops questions it no longer needs an answer to
            self.close_connection = True


@contextmanager
def serve_hub():
    """Serve until the block ends."""
    state = Hub()
    with running(type("Handler", (_Handler,), {"state": state})) as url:
        state.url = url
        yield state


class Repositories:
    """Model repositories that take pushes and give back what was pushed last, as the hub does.

    Attributes:
        commits: (repository, branch, bytes by path) of each commit, in order.
        private: by repository; those that are there.
        asked: method and path of each request.
        tokens: what each of them sent as authorization.
        refused: by a part of a path, the status that requests to it get, and the words; None hangs
            up when the request was done.
        url: without a slash at the end.
    """

    def __init__(self):
        self.commits, self.private, self.asked, self.tokens = [], {}, [], []
        self.refused, self.stored, self.url = {}, {}, ""


class _PushHandler(_Handler):
    def do_GET(self):
        self.respond(b"")

    def do_HEAD(self):
        self.respond(b"")

    def do_POST(self):
        self.respond(self.body())

    def do_PUT(self):
        self.respond(self.body())

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def respond(self, body):
        state, place = self.state, unquote(urlsplit(self.path).path)
        state.asked.append((self.command, place))
        state.tokens.append(self.headers.get("Authorization"))
        found = next((said for part, said in state.refused.items() if part in place), ())
        if found:
            self.answer({"error": found[1]}, found[0], {"X-Error-Message": found[1]})
        elif place == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            is_private = said.get("private") is True or said.get("visibility") == "private"
            is_new = name not in state.private
            state.private.setdefault(name, is_private)
            self.answer({"url": f"{state.url}/{name}"}, 200 if is_new else 409)
        elif place == "/api/validate-yaml":
            said = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [] if said["license"] in LICENCES else [{"message": '"license" must be one of'}]
            self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        elif "/preupload/" in place:
            self.answer({"files": [self.mode_of(each) for each in json.loads(body)["files"]]})
        elif place.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{state.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"objects": objects, "transfer": "basic"})
        elif place.startswith("/lfs/"):
            state.stored[place.removeprefix("/lfs/")] = body
            self.answer({})
        elif "/commit/" in place:
            name, _, branch = place.removeprefix("/api/models/").partition("/commit/")
            state.commits.append((name, branch, dict(self.files_of(body))))
            address = f"{state.url}/{name}/commit/{'1' * 40}"
            if found is None:
                self.close_connection = True
                return
            self.answer({"commitUrl": address, "commitOid": "1" * 40})
        elif "/branch/" in place:
            self.answer({})
        elif "/tree/" in place:
            name, _, rest = place.removeprefix("/api/models/").partition("/tree/")
            pushed, inside = self.pushed(name), rest.partition("/")[2]
            files = [in_repository(*each) for each in pushed.items() if each[0].startswith(inside)]
            self.answer([{**each, "lfs": None} for each in files])
        elif "/resolve/" in place:
            name, _, rest = place.removeprefix("/").partition("/resolve/")
            content = self.pushed(name).get(rest.partition("/")[2])
            tag = {"X-Error-Code": "EntryNotFound"}
            if content is not None:
                tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "1" * 40}
            self.answer(content, headers=tag)
        else:
            name = place.removeprefix("/api/models/").partition("/revision/")[0]
            known = name in state.private
            said = {"id": name, "sha": "1" * 40, "private": state.private.get(name)}
            said["siblings"] = [{"rfilename": path} for path in self.pushed(name)]
            self.answer(said) if known else self.answer({"error": "none"}, 404)

    def pushed(self, name):
        """Files of the last commit of a repository."""
        return next((files for each, _, files in self.state.commits[::-1] if each == name), {})

    @staticmethod
    def mode_of(file):
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def files_of(self, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                yield value["path"], base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                yield value["path"], self.state.stored[value["oid"]]


@contextmanager
def serve_repositories():
    """Serve until the block ends."""
    state = Repositories()
    with running(type("Handler", (_PushHandler,), {"state": state})) as url:
        state.url = url
        yield state
