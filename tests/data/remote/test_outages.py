"""Servers that do not answer for a while, refuse, or stay silent."""

import os
import pickle
import socket

import pytest

from dist_siglip.cli import _words_of, main
from dist_siglip.data.index import read as index
from dist_siglip.data.remote import (
    CacheSettings,
    RemoteOutageError,
    ShardCache,
    connections,
    transfer,
)
from dist_siglip.data.remote.connections import RemoteRefusalError, attempt
from dist_siglip.errors import OutageError, UserError
from tests.support.shards import load_index, write_shard

pytestmark = pytest.mark.faults

BODY = os.urandom(5000)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(index, "_FAILED_PROBES", type(index._FAILED_PROBES)())


def make(tmp_path, **options):
    return ShardCache(CacheSettings(folder=str(tmp_path / "copies"), **options))


def test_a_cache_without_a_folder_is_empty_and_its_folder_is_made(server, tmp_path):
    server.files["a.tar"] = BODY
    store = make(tmp_path)
    assert store.describe().startswith("0 shards, ")
    os.close(store.open(server.url + "a.tar"))
    assert store.describe().startswith("1 shards, ")


@pytest.mark.parametrize("answer", [503, 429, 500, "drop"])
def test_an_outage_is_waited_for_however_many_attempts_that_takes(server, tmp_path, answer):
    server.files["a.tar"] = BODY
    server.answers["a.tar"] = [answer] * 8
    store = make(tmp_path, attempts=1, patience_seconds=200.0)
    os.close(store.open(server.url + "a.tar"))
    assert sum(server.counts.values()) > 9


@pytest.mark.parametrize("answer", [503, 429, "drop"])
def test_an_outage_that_lasts_is_no_mistake_of_the_user(server, tmp_path, answer, capsys):
    server.files["a.tar"] = BODY
    server.answers["a.tar"] = [answer] * 1000
    with pytest.raises(RemoteOutageError, match=r"a\.tar cannot be fetched \(2 attempts\)") as info:
        make(tmp_path, attempts=2, patience_seconds=0.0).open(server.url + "a.tar")
    assert isinstance(info.value, OutageError)
    assert not isinstance(info.value, UserError)
    copy = pickle.loads(pickle.dumps(info.value))
    assert (type(copy), str(copy)) == (RemoteOutageError, str(info.value))
    settings = [f"--cache.folder={tmp_path}", "--cache.attempts=1", "--cache.patience_seconds=0"]
    for command in ("index", "check"):  # these look at the other shards, too
        assert main(["data", command, server.url + "a.tar", "--json=true", *settings]) == 75
        assert "unreachable" in capsys.readouterr().out
    assert main(["data", "stats", server.url + "a.tar", *settings]) == 75
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("dist-siglip: out of reach: ")
    assert said.endswith("start again to go on")


def test_one_answer_that_the_server_is_busy_costs_one_attempt(server, tmp_path):
    server.files["a.tar"] = BODY
    server.answers["a.tar"] = [429, 429]  # HEAD, then GET
    store = make(tmp_path, attempts=2, patience_seconds=0.0)
    os.close(store.open(server.url + "a.tar"))
    assert server.gets() == {"a.tar": 2}


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_not_waited_for(server, tmp_path, status):
    server.answers["a.tar"] = [status] * 2
    server.files["a.tar"] = BODY
    with pytest.raises(RemoteRefusalError, match="1 attempt"):
        make(tmp_path, patience_seconds=1000.0).open(server.url + "a.tar")


def test_other_bytes_than_were_promised_are_not_waited_for(server, tmp_path):
    server.files["a.tar"] = BODY
    server.headers["a.tar"] = {"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}
    with pytest.raises(RemoteRefusalError, match=r"2 attempts\): the md5 of what came"):
        make(tmp_path, attempts=2, patience_seconds=1000.0).open(server.url + "a.tar")
    assert server.gets()["a.tar"] == 2


def test_a_host_that_does_not_exist_is_not_waited_for():
    def call():
        error = OSError("Cannot connect to host")
        error.os_error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        raise FileNotFoundError("https://nohost/a.tar") from error

    with pytest.raises(RemoteRefusalError, match="there is no such host"):
        attempt("https://nohost/a.tar", 5, call, patience_seconds=1000.0)


class Clock:
    """Time that passes only in pauses."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(connections.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(connections, "pause", self.pass_by)

    def pass_by(self, seconds):
        assert 0 < seconds <= 45
        self.now += seconds


def test_an_outage_of_25_seconds_is_waited_for_and_one_without_end_until_patience_is_lost(
    monkeypatch, caplog
):
    clock, tries = Clock(monkeypatch), []

    def call(back_at):
        tries.append(clock.now)
        if clock.now < back_at:
            raise TimeoutError("no answer")
        return "here"

    settings = CacheSettings()  # as a user gets them
    options = {"patience_seconds": settings.patience_seconds}
    assert attempt("https://h/a", settings.attempts, lambda: call(25.0), **options) == "here"
    assert clock.now < 2 * 25
    assert "waiting for it, 2" in caplog.text
    clock.now, tries[:] = 0.0, []
    with pytest.raises(RemoteOutageError, match="TimeoutError: no answer"):
        attempt("https://h/a", settings.attempts, lambda: call(1e9), **options)
    assert tries[-1] == pytest.approx(settings.patience_seconds)
    assert len(tries) < 30


def sample():
    return [("k", {"jpg": b"j", "txt": b"t"})]


@pytest.mark.parametrize("answer", [403, 401, 405, 500, 503, "drop", "silence"])
def test_a_side_car_beside_a_shard_that_cannot_be_had_is_absent(
    server, tmp_path, monkeypatch, answer
):
    monkeypatch.setattr(transfer, "_ANSWER_SECONDS", 20.0 if answer != "silence" else 0.3)
    server.files["a.tar"] = write_shard(tmp_path / "a.tar", sample()).read_bytes()
    server.answers["a.tar.idx.npz"] = [answer] * 100
    store = make(tmp_path, attempts=2)
    assert load_index(server.url + "a.tar", store).keys() == ["k"]
    assert len(server.answers["a.tar.idx.npz"]) < 100


def test_a_side_car_is_asked_for_again_when_the_server_was_busy(server, tmp_path):
    path = write_shard(tmp_path / "a.tar", sample())
    load_index(str(path))
    server.files["a.tar"] = path.read_bytes()
    server.files["a.tar.idx.npz"] = (tmp_path / "a.tar.idx.npz").read_bytes()
    server.answers["a.tar.idx.npz"] = [429, 429]
    assert load_index(server.url + "a.tar", make(tmp_path)).keys() == ["k"]
    assert "a.tar" not in server.gets()


def test_side_cars_of_a_folder_that_never_answers_are_asked_for_three_times(server, tmp_path):
    body = write_shard(tmp_path / "a.tar", sample()).read_bytes()
    for i in range(6):
        server.files[f"{i}.tar"] = body
        server.answers[f"{i}.tar.idx.npz"] = ["drop"] * 100
    for i in range(6):
        load_index(f"{server.url}{i}.tar", make(tmp_path, attempts=1))
    asked = {path for _, path in server.counts if path.endswith(".npz")}
    assert asked == {f"{i}.tar.idx.npz" for i in range(3)}


def test_what_a_loader_process_raises_is_told_without_its_traceback():
    text = (
        "Caught RemoteOutageError in DataLoader worker process 0.\nOriginal Traceback (most recent "
        'call last):\n  File "x.py", line 1\n'
        "dist_siglip.data.remote.connections.RemoteOutageError: "
        "https://h/a.tar cannot be fetched (5 attempts): the server answered 503\n"
    )
    wanted = "https://h/a.tar cannot be fetched (5 attempts): the server answered 503"
    assert _words_of(OutageError(text)) == wanted
    assert _words_of(OutageError("one line: of ours")) == "one line: of ours"
