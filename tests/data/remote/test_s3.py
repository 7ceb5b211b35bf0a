"""Against moto's S3 server, by the variables a user of S3 would set."""

import os

import pytest

from dist_siglip.data.index.read import read_index
from dist_siglip.data.remote import CacheSettings, RemoteError, ShardCache, connections
from dist_siglip.data.remote.transfer import describe_remote
from dist_siglip.data.urls import expand_shards
from tests.support.shards import write_shards

pytestmark = pytest.mark.e2e

boto3 = pytest.importorskip("boto3", reason="needs moto[server]")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")
pytest.importorskip("s3fs", reason="needs s3fs")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A bucket with three shards under train/."""
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    connections._begin_anew()  # the connection of an earlier test has another endpoint
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    for path in write_shards(tmp_path / "local", (3, 2, 4)):
        client.upload_file(path, "shards", f"train/{os.path.basename(path)}")
    client.put_object(Bucket="shards", Key="train/notes.md", Body=b"no shard")
    yield client
    running.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_folder_of_s3_is_listed_described_and_indexed(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    urls = expand_shards("s3://shards/train/")
    assert urls == [f"s3://shards/train/0000{i}.tar" for i in range(3)]
    assert expand_shards("s3://shards/train/{00000..00002}.tar") == urls
    said = describe_remote(urls[0])
    local = tmp_path / "local" / "00000.tar"
    assert said.size == local.stat().st_size
    assert said.md5 == said.etag
    store = ShardCache(CacheSettings(folder=str(tmp_path / "cache")))
    index = read_index(urls[0], cache=store)
    assert (index.num_samples, index.path) == (3, urls[0])
    assert index.digest == read_index(str(local)).digest
    with pytest.raises(RemoteError, match="it does not exist"):
        store.open("s3://shards/train/none.tar")
