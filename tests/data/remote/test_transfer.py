import base64
import errno
import hashlib
import os
import sys
from pathlib import Path

import pytest
from fsspec.registry import _registry

from dist_siglip.data.remote import connections, transfer
from dist_siglip.data.remote.connections import RemoteError
from dist_siglip.data.remote.transfer import describe_remote, download, read_small
from dist_siglip.errors import UserError
from tests.support.small_disk import on_small_disk

BODY = os.urandom(300_000)


def test_a_file_comes_whole_with_what_the_server_says(server, tmp_path):
    server.files["a.tar"] = BODY
    server.etags["a.tar"] = '"v1"'
    path = str(tmp_path / "a")
    said = download(server.url + "a.tar", path)
    assert (said.size, said.etag) == (len(BODY), '"v1"')
    assert Path(path).read_bytes() == BODY
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("fault", ["500", "cut", "short"])
def test_what_fails_at_first_is_tried_again(server, tmp_path, fault):
    server.files["a.tar"] = BODY
    server.faults["a.tar"] = [fault, fault]
    path = str(tmp_path / "a")
    download(server.url + "a.tar", path)
    assert Path(path).read_bytes() == BODY
    assert server.gets()["a.tar"] == 3


def test_after_the_last_attempt_the_reason_is_told_and_nothing_is_left(server, tmp_path):
    server.files["a.tar"] = BODY
    server.faults["a.tar"] = ["500"] * 9
    with pytest.raises(RemoteError, match=r"a\.tar cannot be fetched \(3 attempts\): .*500"):
        download(server.url + "a.tar", str(tmp_path / "a"), attempts=3)
    assert os.listdir(tmp_path) == []


def test_a_transfer_that_stalls_is_given_up(server, tmp_path, monkeypatch):
    server.files["a.tar"] = BODY
    server.faults["a.tar"] = ["stall"]
    monkeypatch.setattr(transfer, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(transfer, "_SLOWEST_BYTES_PER_SECOND", 1 << 30)
    path = str(tmp_path / "a")
    download(server.url + "a.tar", path)
    assert Path(path).read_bytes() == BODY
    assert server.gets()["a.tar"] == 2


def test_a_missing_file_is_told_at_once(server, tmp_path):
    with pytest.raises(
        RemoteError, match=r"none\.tar cannot be fetched \(1 attempt\): it does not"
    ):
        download(server.url + "none.tar", str(tmp_path / "a"))
    assert read_small(server.url + "none.tar", 100) is None
    with pytest.raises(RemoteError) as info:
        describe_remote(server.url + "none.tar")
    assert info.value.is_missing


def test_a_wrong_checksum_is_tried_again_and_then_told(server, tmp_path):
    server.files["a.tar"] = BODY
    wrong = base64.b64encode(hashlib.md5(b"other").digest()).decode()
    server.headers["a.tar"] = {"Content-MD5": wrong}
    with pytest.raises(RemoteError, match=r"2 attempts.*md5 of what came"):
        download(server.url + "a.tar", str(tmp_path / "a"), attempts=2)
    right = base64.b64encode(hashlib.md5(BODY).digest()).decode()
    server.headers["a.tar"] = {"Content-MD5": right}
    assert download(server.url + "a.tar", str(tmp_path / "a")).md5 == hashlib.md5(BODY).hexdigest()


TAR = os.urandom(1024) + bytes(1024)


def test_a_file_without_a_length_is_taken_if_it_ends_as_a_tar_does(server, tmp_path):
    server.files = {"a.tar": TAR, "b.tar": TAR[:-512]}
    server.chunked = {"a.tar", "b.tar"}
    path = str(tmp_path / "a")
    assert download(server.url + "a.tar", path).size == -1
    assert Path(path).read_bytes() == TAR
    with pytest.raises(RemoteError, match="do not end as a tar does"):
        download(server.url + "b.tar", str(tmp_path / "b"), attempts=2)
    assert os.listdir(tmp_path) == ["a"]


def test_a_chunked_answer_that_is_cut_is_tried_again(server, tmp_path):
    server.files["a.tar"] = TAR
    server.chunked = {"a.tar"}
    path = str(tmp_path / "a")
    describe_remote(server.url + "a.tar")
    asked = server.gets()["a.tar"]  # no length: fsspec asks by GET too, without reading
    server.faults["a.tar"] = ["cut", "cut", "cut"]
    download(server.url + "a.tar", path)
    assert Path(path).read_bytes() == TAR
    assert server.gets()["a.tar"] > asked + 2


def test_a_file_without_a_length_is_bounded(server, tmp_path):
    server.files["a.tar"] = bytes(5000)
    server.chunked = {"a.tar"}
    with pytest.raises(RemoteError, match="more than 4999 bytes came"):
        download(server.url + "a.tar", str(tmp_path / "a"), attempts=1, max_bytes=4999)
    with pytest.raises(RemoteError, match="more than 100 bytes came"):
        read_small(server.url + "a.tar", 100, attempts=1)
    assert os.listdir(tmp_path) == []


def test_a_file_that_changes_while_it_is_fetched_is_fetched_again(server, tmp_path):
    server.files["a.tar"] = BODY
    server.etags["a.tar"] = "v"
    server.faults["a.tar"] = ["changed"]
    assert download(server.url + "a.tar", str(tmp_path / "a")).etag == "v+"
    assert server.gets()["a.tar"] == 2


def test_a_link_where_the_file_is_written_is_not_followed(server, tmp_path):
    server.files["a.tar"] = BODY
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.part").symlink_to(victim)
    download(server.url + "a.tar", str(tmp_path / "a"))
    assert victim.read_text() == "precious"
    assert (tmp_path / "a").read_bytes() == BODY


def test_a_disk_that_takes_no_more_bytes_is_not_tried_again(server, tmp_path):
    server.files["a.tar"] = BODY

    def fetch():
        with pytest.raises(OSError, match="File too large"):
            download(server.url + "a.tar", str(tmp_path / "a"))

    on_small_disk(len(BODY) // 2, fetch)
    assert server.gets()["a.tar"] == 1
    assert os.listdir(tmp_path) == []


def test_retries_are_logged_without_the_signature(server, tmp_path, caplog):
    caplog.set_level("INFO", logger="dist_siglip")
    server.files["a.tar"] = BODY
    server.faults["a.tar"] = ["500", "cut"]
    url = server.url.replace("//", "//me:PASSWORD@") + "a.tar?sig=SECRET"
    download(url, str(tmp_path / "a"))
    assert server.gets() == {"a.tar": 3}
    assert "a.tar?...: the server answered 500; attempt 2 follows" in caplog.text
    assert "SECRET" not in caplog.text
    assert "PASSWORD" not in caplog.text


def test_redirections_are_followed(server, tmp_path):
    server.files["a.tar"] = BODY
    path = str(tmp_path / "a")
    download(server.url + "moved/a.tar", path)
    assert Path(path).read_bytes() == BODY


def test_a_signature_in_a_url_is_not_shown(server, tmp_path):
    with pytest.raises(RemoteError) as info:
        download(server.url + "none.tar?sig=SECRET", str(tmp_path / "a"))
    assert "SECRET" not in str(info.value)
    assert "none.tar" in str(info.value)


def test_a_small_file_must_be_small(server):
    server.files["a"] = b"12345"
    assert read_small(server.url + "a", 5) == b"12345"
    with pytest.raises(RemoteError, match="has 5 bytes, at most 4 are read"):
        read_small(server.url + "a", 4)


def test_a_full_disk_is_not_tried_again(server, tmp_path, monkeypatch):
    server.files["a.tar"] = BODY

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer, "_transfer", full)
    with pytest.raises(OSError, match="No space left"):
        download(server.url + "a.tar", str(tmp_path / "a"))
    assert os.listdir(tmp_path) == []


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    connections._begin_anew()
    with pytest.raises(
        UserError, match=r's3:// needs a package .*pip install "dist-siglip\[remote\]"'
    ):
        describe_remote("s3://bucket/a.tar")


def test_only_urls_are_fetched(tmp_path):
    for url in ("pipe:cat /etc/passwd", "file:///etc/passwd", "/etc/passwd", "s3::http://a/b"):
        with pytest.raises(UserError):
            download(url, str(tmp_path / "a"))
    assert os.listdir(tmp_path) == []
