"""gs and hf against a stand-in on loopback, by the variables a user of them would set."""

import os

import pytest

from dist_siglip.data.remote import CacheSettings, RemoteError, ShardCache, connections
from dist_siglip.data.remote.transfer import describe_remote, read_small
from dist_siglip.data.urls import expand_shards
from tests.support.hubs import serve_hub

pytest.importorskip("gcsfs", reason="needs gcsfs")
pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
BODY = os.urandom(50_000)
PLACES = ["gs://shards/train/", "hf://datasets/me/shards/train/"]


@pytest.fixture
def hub(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with serve_hub() as running:
        running.files = {f"train/{i}.tar": BODY for i in range(2)}
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        connections._begin_anew()
        yield running


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_is_listed_and_a_shard_comes_verified(hub, tmp_path, place):
    assert expand_shards(place) == [f"{place}0.tar", f"{place}1.tar"]
    said = describe_remote(f"{place}0.tar", refresh=True)
    assert said.size == len(BODY)
    assert said.md5 or said.sha256
    store = ShardCache(CacheSettings(folder=str(tmp_path)))
    descriptor = store.open(f"{place}0.tar")
    assert os.pread(descriptor, len(BODY), 0) == BODY
    os.close(descriptor)
    assert read_small(f"{place}1.tar", len(BODY)) == BODY
    assert read_small(f"{place}none.tar", 10) is None


@pytest.mark.parametrize("place", PLACES)
def test_other_bytes_than_the_checksum_says_are_refused(hub, tmp_path, place, monkeypatch):
    url = f"{place}0.tar"
    said = describe_remote(url)
    hub.files["train/0.tar"] = BODY[::-1]
    from dist_siglip.data.remote import cache, transfer

    monkeypatch.setattr(cache, "describe_remote", lambda *arguments, **options: said)
    monkeypatch.setattr(transfer, "_describe", lambda *arguments, **options: said)
    with pytest.raises(RemoteError, match=r"2 attempts.*of what came is not the one"):
        ShardCache(CacheSettings(folder=str(tmp_path), attempts=2)).open(url)
    assert not any(name.endswith((".tar", ".part")) for name in os.listdir(tmp_path))


def test_a_file_replaced_on_the_hub_is_fetched_again_though_its_folder_was_listed(hub, tmp_path):
    url = PLACES[1] + "0.tar"
    store = ShardCache(CacheSettings(folder=str(tmp_path), recheck_hours=0.0))
    os.close(store.open(url))
    hub.files["train/0.tar"] = BODY[::-1]
    descriptor = store.open(url)
    assert os.pread(descriptor, len(BODY), 0) == BODY[::-1]
    os.close(descriptor)


def test_a_token_does_not_follow_to_another_server(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    with serve_hub() as other:
        other.files = hub.files
        hub.elsewhere = other.url
        assert read_small(PLACES[1] + "0.tar", len(BODY)) == BODY
        assert "Bearer hf_SECRET" in hub.tokens
        assert other.tokens == [None]
