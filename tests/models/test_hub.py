"""Repositories of transformers on a hub, served on loopback to a process of its own."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest
import torch

from dist_siglip.models import build_dual_encoder
from tests.support.hugging_face import write_folder
from tests.support.processes import LIMIT_SECONDS
from tests.support.servers import running

SHA = "1" * 40
PROGRAM = """
import sys, torch
from dist_siglip.models import build_dual_encoder
found = {}
for name in sys.argv[2:]:
    built = build_dual_encoder("hf-hub:me/" + name, with_weights=name != "bare")
    found[name] = [built.weights_loaded, built.tokenizer(["one two"]), built.encoder.state_dict()]
torch.save(found, sys.argv[1])
"""
KINDS = ("siglip", "siglip2", "clip")


class _Handler(BaseHTTPRequestHandler):
    folder = None
    asked = None

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        place = self.path.partition("?")[0]
        name = place.rpartition("/")[2]
        repository = re.search(r"/me/(\w+)", place)[1]
        files = {path.name: path for path in (self.folder / repository).iterdir()}
        self.asked.append(f"{repository}/{name}")
        if place.startswith("/api/models/me/"):
            siblings = [{"rfilename": found} for found in sorted(files)]
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                for n, p in sorted(files.items())
            ]
            found = (
                tree
                if "/tree/" in place
                else {"id": f"me/{repository}", "sha": SHA, "siblings": siblings}
            )
            self.answer(200, json.dumps(found).encode())
        elif "/resolve/" in place and name in files:
            self.answer(200, files[name].read_bytes())
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815 - the server asks for this name

    def answer(self, status, body, headers=()):
        self.send_response(status)
        described = {"ETag": f'"{hash(body)}"', "X-Repo-Commit": SHA, **dict(headers)}
        for name, value in {**described, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve(folder):
    asked = []
    with running(type("Handler", (_Handler,), {"folder": folder, "asked": asked})) as url:
        yield url, asked


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """The repositories, what a process has made of them, and which files it has asked for."""
    folder, root = tmp_path_factory.mktemp("me"), tmp_path_factory.mktemp("fetched")
    for kind in KINDS:
        write_folder(folder / kind, kind)
    write_folder(folder / "bare", "siglip")
    out = root / "found.pt"
    with serve(folder) as (url, asked):
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(root / "hf")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
        for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(offline, None)
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(out), *KINDS, "bare"],
            env=environment,
            check=True,
            timeout=LIMIT_SECONDS,
        )
    return folder, torch.load(out, weights_only=True), asked


@pytest.mark.e2e
@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_of_transformers_is_fetched_and_read_like_a_folder(fetched, kind):
    folder, found, _ = fetched
    loaded, tokens, state = found[kind]
    local = build_dual_encoder(f"local-dir:{folder / kind}")
    assert loaded
    assert torch.equal(tokens, local.tokenizer(["one two"]))
    own = local.encoder.state_dict()
    assert list(own) == list(state)
    assert all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.e2e
def test_weights_that_are_not_needed_are_not_fetched(fetched):
    _, found, asked = fetched
    loaded, *_ = found["bare"]
    assert not loaded
    assert "bare/model.safetensors" not in asked
    assert "siglip/model.safetensors" in asked
