"""Repositories of transformers on a hub, served on loopback to a process of its own."""

import json
import os
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
built = build_dual_encoder("hf-hub:me/tiny", with_weights=sys.argv[2] == "yes")
torch.save([built.weights_loaded, built.tokenizer(["one two"]),
            built.encoder.state_dict()], sys.argv[1])
"""


class _Handler(BaseHTTPRequestHandler):
    folder = None
    asked = None

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        place = self.path.partition("?")[0]
        files = {path.name: path for path in self.folder.iterdir()}
        name = place.rpartition("/")[2]
        self.asked.append(name)
        if place.startswith("/api/models/me/tiny"):
            siblings = [{"rfilename": found} for found in sorted(files)]
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40}
                for n, p in sorted(files.items())
            ]
            found = (
                tree if "/tree/" in place else {"id": "me/tiny", "sha": SHA, "siblings": siblings}
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


def fetched(folder, tmp_path, with_weights="yes"):
    out = tmp_path / "found.pt"
    with serve(folder) as (url, asked):
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
        for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(offline, None)
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(out), with_weights],
            env=environment,
            check=True,
            timeout=LIMIT_SECONDS,
        )
    return torch.load(out, weights_only=True), asked


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
def test_a_repository_of_transformers_is_fetched_and_read_like_a_folder(tmp_path, kind):
    folder = tmp_path / "repository"
    write_folder(folder, kind)
    (loaded, tokens, state), _ = fetched(folder, tmp_path)
    local = build_dual_encoder(f"local-dir:{folder}")
    assert loaded
    assert torch.equal(tokens, local.tokenizer(["one two"]))
    own = local.encoder.state_dict()
    assert list(own) == list(state)
    assert all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.e2e
def test_weights_that_are_not_needed_are_not_fetched(tmp_path):
    folder = tmp_path / "repository"
    write_folder(folder, "siglip")
    (loaded, _, _), asked = fetched(folder, tmp_path, "no")
    assert not loaded
    assert "model.safetensors" not in asked
