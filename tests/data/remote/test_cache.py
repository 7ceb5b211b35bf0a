import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from unittest import mock

import pytest

from dist_siglip.data.remote import CacheSettings, RemoteError, ShardCache, cache
from dist_siglip.errors import UserError
from tests.support.processes import LIMIT_SECONDS

BODY = os.urandom(200_000)


def make(folder, max_bytes=10**9, **options):
    return ShardCache(CacheSettings(folder=str(folder), max_gib=max_bytes / 2**30, **options))


def content(descriptor):
    try:
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def fetch_all(settings, urls, barrier):
    store = ShardCache(settings)
    barrier.wait(LIMIT_SECONDS)
    for url in urls:
        assert len(content(store.open(url))) == len(BODY)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.faults)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_node_fetches_a_shard_once(server, tmp_path, method):
    urls = [f"{server.url}{i}.tar" for i in range(3)]
    server.files = {f"{i}.tar": BODY for i in range(3)}
    store = make(tmp_path)
    os.close(store.open(urls[0]))  # a connection that a fork brings along
    context = multiprocessing.get_context(method)
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=fetch_all, args=(store.settings, urls, barrier)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_SECONDS)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.gets() == {"0.tar": 1, "1.tar": 1, "2.tar": 1}


def test_a_copy_is_named_by_a_hash_whatever_the_url_says(server, tmp_path):
    paths = ["../../evil.tar", "a%2F..%2Fb.tar", "x" * 200 + ".tar", "a.tar?x=/../../b"]
    folder = tmp_path / "cache"
    store = make(folder)
    for path in paths:
        server.files[path.split("?")[0]] = BODY
        server.files["evil.tar"] = BODY
        with contextlib.suppress(RemoteError):
            os.close(store.open(server.url + path))
    assert sorted(os.listdir(tmp_path)) == ["cache"]
    names = [name for name in os.listdir(folder) if name != "locks"]
    assert names
    assert all(len(name.split(".")[0]) == 32 for name in names)


def test_a_data_set_larger_than_the_cache_streams_through_it(server, tmp_path):
    server.files = {f"{i}.tar": BODY for i in range(10)}
    store = make(tmp_path, max_bytes=3.5 * len(BODY))
    held = []
    for i in range(10):
        assert content(store.open(f"{server.url}{i}.tar")) == BODY
        sizes = [
            entry.stat().st_size for entry in os.scandir(tmp_path) if entry.name.endswith("tar")
        ]
        held.append(sum(sizes))
    assert max(held) == 3 * len(BODY)
    assert set(server.gets().values()) == {1}
    assert store.describe().startswith("3 shards, ")


def test_what_was_used_longest_ago_goes_first(server, tmp_path):
    server.files = {f"{i}.tar": BODY for i in range(4)}
    store = make(tmp_path, max_bytes=3.5 * len(BODY))
    for i in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        os.close(store.open(f"{server.url}{i}.tar"))
    for i in (0, 2, 3):
        os.close(store.open(f"{server.url}{i}.tar"))
    assert server.gets() == {"0.tar": 1, "1.tar": 1, "2.tar": 1, "3.tar": 1}
    os.close(store.open(f"{server.url}1.tar"))
    assert server.gets()["1.tar"] == 2


def test_an_open_copy_outlives_its_eviction(server, tmp_path):
    server.files = {f"{i}.tar": bytes([i]) * 1000 for i in range(4)}
    store = make(tmp_path, max_bytes=1500)
    first = store.open(f"{server.url}0.tar")
    os.close(store.open(f"{server.url}1.tar"))
    assert os.fstat(first).st_nlink == 0
    assert content(first) == bytes(1000)


def test_a_file_that_changed_on_the_server_is_fetched_again(server, tmp_path):
    server.files["a.tar"] = BODY
    server.etags["a.tar"] = "1"
    store = make(tmp_path, recheck_hours=0.0)
    for _ in range(2):
        assert content(store.open(server.url + "a.tar")) == BODY
    assert server.gets()["a.tar"] == 1
    server.files["a.tar"], server.etags["a.tar"] = BODY[::-1], "2"
    assert content(store.open(server.url + "a.tar")) == BODY[::-1]


def test_a_copy_is_used_with_a_warning_while_the_server_does_not_answer(server, tmp_path, caplog):
    server.files["a.tar"] = BODY
    url = server.url + "a.tar"
    store = make(tmp_path, recheck_hours=0.0, attempts=1)
    os.close(store.open(url))
    with mock.patch.object(cache, "describe_remote", side_effect=RemoteError("no answer")):
        assert content(store.open(url)) == BODY
    assert "no answer; the copy of this node is used" in caplog.text
    del server.files["a.tar"]
    with pytest.raises(RemoteError, match="does not exist"):
        store.open(url)


def test_a_url_on_another_server_has_another_copy(tmp_path, monkeypatch):
    store, names = make(tmp_path), set()
    for server in ("http://one", "http://two", ""):
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        names.add(store._path("s3://bucket/a.tar"))
    assert len(names) == 3


def test_a_file_without_a_length_is_kept_within_the_bound(server, tmp_path):
    body = BODY + bytes(1024)
    server.files = {f"{i}.tar": body for i in range(4)}
    server.etags = {f"{i}.tar": "1" for i in range(4)}
    server.chunked = set(server.files)
    store = make(tmp_path, max_bytes=2.5 * len(body))
    for i in range(4):
        assert content(store.open(f"{server.url}{i}.tar")) == body
    assert store.describe().startswith("2 shards, ")
    assert set(server.gets()) == set(server.files)


def test_readers_that_wait_take_a_shard_before_a_small_cache_evicts_it(server, tmp_path):
    server.files = {f"{i}.tar": BODY for i in range(6)}
    server.before_get = lambda path: time.sleep(0.25)  # several times a waiter's pause
    store = make(tmp_path, max_bytes=2.1 * len(BODY))
    urls = [f"{server.url}{i}.tar" for i in range(6)]
    barrier = threading.Barrier(3)
    readers = [
        threading.Thread(target=fetch_all, args=(store.settings, urls, barrier)) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(LIMIT_SECONDS)
    assert set(server.gets().values()) == {1}


def test_a_process_that_holds_a_lock_for_too_long_ends_the_wait(server, tmp_path, monkeypatch):
    server.files["a.tar"] = BODY
    server.faults["a.tar"] = ["stall"]
    store = make(tmp_path)
    url = server.url + "a.tar"
    process = multiprocessing.get_context("fork").Process(
        target=open_one, args=(store.settings, url)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads
        process.start()
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while server.gets().get("a.tar", 0) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGSTOP)
        waiting = make(tmp_path)
        waiting._patience_seconds = 0.2
        with pytest.raises(RemoteError, match="another process held the lock for 0 s"):
            waiting.open(url)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(LIMIT_SECONDS)


def test_files_that_are_not_ours_are_left_alone(server, tmp_path):
    (tmp_path / "keep.tar").write_bytes(BODY * 5)
    (tmp_path / "notes.json").write_text("{}")
    server.files = {f"{i}.tar": BODY for i in range(3)}
    store = make(tmp_path, max_bytes=1.5 * len(BODY))
    for i in range(3):
        os.close(store.open(f"{server.url}{i}.tar"))
    assert (tmp_path / "keep.tar").exists()
    assert (tmp_path / "notes.json").exists()


def open_one(settings, url):
    ShardCache(settings).open(url)


@pytest.mark.faults
def test_a_process_killed_while_it_fetches_leaves_nothing_torn_and_blocks_nobody(server, tmp_path):
    server.files["a.tar"] = BODY
    server.faults["a.tar"] = ["stall"]
    store = make(tmp_path)
    url = server.url + "a.tar"
    process = multiprocessing.get_context("spawn").Process(
        target=open_one, args=(store.settings, url)
    )
    process.start()
    deadline = time.monotonic() + LIMIT_SECONDS
    while server.gets().get("a.tar", 0) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join(LIMIT_SECONDS)
    server.release.set()
    assert [n for n in os.listdir(tmp_path) if n.endswith(".tar")] == []
    assert content(store.open(url)) == BODY
    assert not any(name.endswith((".part", ".want")) for name in os.listdir(tmp_path))


def test_a_shard_larger_than_the_cache_is_refused_with_the_size_to_set(server, tmp_path):
    server.files["a.tar"] = BODY
    with pytest.raises(
        UserError, match=r"cache.max_gib \(.*\) is smaller than shard .*set it to 0"
    ):
        make(tmp_path, max_bytes=1000).open(server.url + "a.tar")
    assert server.gets() == {}


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    server.files["a.tar"] = BODY
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"cache.folder .* cannot be written"):
        make(blocked / "cache").open(server.url + "a.tar")


def test_a_full_disk_is_named(server, tmp_path, monkeypatch):
    server.files["a.tar"] = BODY

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "download", full)
    with pytest.raises(UserError, match=r"is on a full disk; lower cache.max_gib"):
        make(tmp_path).open(server.url + "a.tar")
    assert not any(name.endswith(".want") for name in os.listdir(tmp_path))


@pytest.mark.parametrize(
    ("setting", "value"), [("max_gib", 0.0), ("attempts", 0), ("recheck_hours", -1.0)]
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(UserError, match=rf"cache\.{setting} \({value}\)"):
        CacheSettings(**{setting: value}).check()
