import itertools
import os
import threading

from dist_siglip.data.index.pairs import Span
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.remote.cache import Prefetcher, describe_tight_cache
from dist_siglip.data.samples.fetch import ShardReader

BODY = os.urandom(100_000)


def make(folder, shards):
    """A cache with room for a number of shards."""
    return ShardCache(CacheSettings(folder=str(folder), max_gib=shards * len(BODY) / 2**30))


def test_shards_come_in_order_as_far_as_half_of_the_cache(server, tmp_path):
    server.files = {f"{i}.tar": BODY for i in range(10)}
    urls = [f"{server.url}{i}.tar" for i in range(10)]
    prefetcher = Prefetcher(make(tmp_path, 6), lambda: itertools.cycle(urls))
    assert prefetcher.fetch_ahead() == 3 * len(BODY)
    assert server.gets() == {"0.tar": 1, "1.tar": 1, "2.tar": 1}


def test_training_that_moves_on_pulls_the_window_along_and_nothing_is_fetched_twice(
    server, tmp_path
):
    server.files = {f"{i}.tar": BODY for i in range(12)}
    urls = [f"{server.url}{i}.tar" for i in range(12)]
    store, place = make(tmp_path, 6.5), [0]
    prefetcher = Prefetcher(store, lambda: iter(urls[place[0] :]))
    reader = ShardReader(store)
    for number, url in enumerate(urls):
        place[0] = number
        prefetcher.fetch_ahead()
        assert reader.read(Span(url, 0, 10)) == BODY[:10]
    assert set(server.gets().values()) == {1}
    assert sum(e.stat().st_size for e in os.scandir(tmp_path)) <= store.max_bytes + 10_000
    reader.close()


def test_a_data_set_smaller_than_the_cache_is_fetched_whole_and_local_shards_are_passed_over(
    server, tmp_path
):
    server.files = {f"{i}.tar": BODY for i in range(2)}
    urls = [f"{server.url}{i}.tar" for i in range(2)]
    prefetcher = Prefetcher(make(tmp_path, 50), lambda: itertools.cycle(["/a.tar", *urls]))
    assert prefetcher.fetch_ahead() == 2 * len(BODY)


def test_a_shard_that_cannot_be_had_is_passed_over_and_not_asked_for_at_once(
    server, tmp_path, caplog
):
    server.files = {f"{i}.tar": BODY for i in (0, 2)}
    urls = [f"{server.url}{i}.tar" for i in range(3)]
    prefetcher = Prefetcher(make(tmp_path, 10), lambda: urls)
    for _ in range(3):
        assert prefetcher.fetch_ahead() == 2 * len(BODY)
    assert caplog.text.count("it does not exist; again in 30 s") == 1


def test_it_stops_in_the_middle_of_a_transfer_and_leaves_nothing(server, tmp_path):
    server.files["a.tar"] = BODY
    server.faults["a.tar"] = ["stall"]
    arrived = threading.Event()
    server.before_get = lambda path: arrived.set()
    prefetcher = Prefetcher(make(tmp_path, 5), lambda: [server.url + "a.tar"])
    prefetcher.start()
    assert arrived.wait(30)
    prefetcher.stop(30.0)
    assert not any(thread.name == "shard prefetch" for thread in threading.enumerate())
    assert not any(name.endswith((".tar", ".part", ".want")) for name in os.listdir(tmp_path))


def test_whatever_goes_wrong_is_logged_and_tried_again(tmp_path, caplog):
    again = threading.Event()

    def upcoming():
        if "fetching ahead" in caplog.text:
            again.set()
        raise RuntimeError("the position has not begun")

    prefetcher = Prefetcher(make(tmp_path, 5), upcoming, retry_seconds=0.01)
    prefetcher.start()
    assert again.wait(30)
    prefetcher.stop()
    assert "RuntimeError: the position has not begun" in caplog.text


def test_failures_are_logged_and_the_thread_goes_on_and_stops(server, tmp_path, caplog):
    arrived = threading.Event()
    server.files["b.tar"] = BODY
    names = ["none.tar"]

    def upcoming():
        if server.gets().get("b.tar"):
            arrived.set()
        return iter([server.url + names[0]])

    prefetcher = Prefetcher(make(tmp_path, 5), upcoming, pause_seconds=0.01, retry_seconds=0.01)
    prefetcher.start()
    prefetcher.start()
    try:
        while "fetching ahead" not in caplog.text:
            assert not arrived.wait(0.01)
        names[0] = "b.tar"
        assert arrived.wait(30)
    finally:
        prefetcher.stop()
    assert not any(thread.name == "shard prefetch" for thread in threading.enumerate())


def test_a_cache_too_small_for_two_blocks_is_told(tmp_path):
    store = make(tmp_path, 10)
    assert describe_tight_cache(store, [len(BODY)] * 100, 5) == ""
    text = describe_tight_cache(store, [len(BODY)] * 100, 6)
    assert "less than two blocks of shards" in text
    assert "block_shards (6)" in text
