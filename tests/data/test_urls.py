import os
import sys
import types

import pytest

from dist_siglip.data import urls
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.tar", "a.tar", "c.tar", "a.tar.idx.npz", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_folder_gives_its_tars_sorted(folder):
    assert expand_shards(str(folder)) == [str(folder / f"{name}.tar") for name in "abc"]


def test_braces_expand_in_the_order_given(folder):
    assert expand_shards(f"{folder}/{{c,a}}.tar") == [str(folder / "c.tar"), str(folder / "a.tar")]


def test_list_and_double_colon_keep_their_order(folder):
    expected = [str(folder / f"{name}.tar") for name in "cba"]
    assert expand_shards([f"{folder}/c.tar", f"{folder}/{{b,a}}.tar"]) == expected
    assert expand_shards("::".join(expected)) == expected


def test_existing_path_with_braces_is_taken_literally(tmp_path):
    path = tmp_path / "{a,b}.tar"
    path.write_bytes(b"x")
    assert expand_shards(str(path)) == [str(path)]


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert expand_shards("~/a.tar") == [str(folder / "a.tar")]


def test_missing_files_are_counted_and_named(folder):
    with pytest.raises(
        UserError, match=r"val_shards .* 2 missing files, first '.*/d\.tar'"
    ) as info:
        expand_shards(f"{folder}/{{a,d,e}}.tar", name="val_shards")
    assert "\n" not in str(info.value)
    assert "allowed: a local .tar or .parquet file" in str(info.value)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"without \.tar or \.parquet files"):
        expand_shards(str(tmp_path))


def test_hidden_files_of_a_folder_are_no_shards(folder):
    (folder / "._a.tar").write_bytes(b"\0\5\x16\7")  # what a Mac leaves beside a.tar
    (folder / ".a.tar").write_bytes(b"x")
    assert expand_shards(str(folder)) == [str(folder / f"{name}.tar") for name in "abc"]


def test_hidden_files_of_a_remote_folder_are_no_shards(monkeypatch):
    files = ["s3://bucket/x/._a.tar", "s3://bucket/x/a.tar", "s3://bucket/x/notes.md"]
    monkeypatch.setattr(urls, "list_remote", lambda url: files)
    assert expand_shards("s3://bucket/x/") == ["s3://bucket/x/a.tar"]


def test_compressed_shards_of_a_folder_are_told(folder, caplog):
    (folder / "d.tar.gz").write_bytes(b"x")
    (folder / "e.tgz").write_bytes(b"x")
    assert len(expand_shards(str(folder))) == 3
    assert "not read beside the shards are 2 compressed ones, first 'd.tar.gz'" in caplog.text
    for name in "abc":
        (folder / f"{name}.tar").unlink()
    with pytest.raises(
        UserError, match=r"without \.tar or \.parquet files, but with 2 compressed ones"
    ):
        expand_shards(str(folder))


@pytest.mark.parametrize("spec", [[], ""])
def test_naming_nothing_is_refused(spec):
    with pytest.raises(UserError, match="shards"):
        expand_shards(spec)


def test_naming_a_shard_twice_is_refused(folder):
    os.symlink(folder / "a.tar", folder / "z.tar")
    with pytest.raises(UserError, match="twice"):
        expand_shards(str(folder))


@pytest.mark.parametrize(
    "spec",
    [
        "pipe:cat {0}/a.tar",
        "{0}/a.tar::pipe:cat {0}/b.tar",
        "file:{0}/a.tar",
        "file://{0}/a.tar",
        "ftp://host/a.tar",
        "HTTPS://host/a.tar",
        "{{pipe:true,{0}/a.tar}}",
    ],
)
def test_what_is_not_a_local_path_is_refused(folder, spec):
    with pytest.raises(UserError, match="not a path on this machine"):
        expand_shards(spec.format(folder))


def test_environment_is_not_read(folder, monkeypatch):
    monkeypatch.setenv("WDS_PLACE", str(folder))
    with pytest.raises(UserError, match="variable"):
        expand_shards("${PLACE}/a.tar")


def test_unbalanced_brace_is_a_user_error(folder):
    with pytest.raises(UserError, match="not a brace pattern"):
        expand_shards(f"{folder}/{{a.tar")


def test_webdataset_is_locked_before_its_import(folder, monkeypatch):
    monkeypatch.delenv("WDS_SECURE", raising=False)
    seen = []

    class Recorder(types.ModuleType):
        def __getattr__(self, name):
            seen.append(os.environ.get("WDS_SECURE"))
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "webdataset.shardlists", Recorder("webdataset.shardlists"))
    with pytest.raises(ImportError):
        expand_shards(f"{folder}/{{a,b}}.tar")
    assert set(seen) == {"1"}


def test_urls_expand_without_being_asked_for():
    assert expand_shards("s3://bucket/{0..1}.tar") == ["s3://bucket/0.tar", "s3://bucket/1.tar"]
    assert expand_shards("http://[::1]:80/{a,b}.tar") == [
        "http://[::1]:80/a.tar",
        "http://[::1]:80/b.tar",
    ]


def test_urls_are_refused_where_only_paths_are_taken():
    with pytest.raises(UserError, match="not a path on this machine"):
        expand_shards("https://host/a.tar", allow_remote=False)


def test_lines_of_a_list_file_count_from_its_folder(folder):
    (folder / "list.txt").write_text("# two\n\n{b,a}.tar\nhttps://host/c.tar\n")
    expected = [str(folder / "b.tar"), str(folder / "a.tar"), "https://host/c.tar"]
    assert expand_shards(str(folder / "list.txt")) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "filecache::s3://bucket/a.tar",
        "https://host/a\n.tar",
        "https://host/a\0.tar",
        "s3://key:word@bucket/a.tar",
        "https://host",
        "https://host/{0..99999999}.tar",
        "https://host/",
    ],
)
def test_tricks_in_urls_are_refused_in_one_line(spec):
    with pytest.raises(UserError) as info:
        expand_shards(spec)
    assert "\n" not in str(info.value)


def test_a_missing_file_with_a_url_in_its_name_keeps_the_secrets(tmp_path):
    with pytest.raises(UserError, match="a missing file") as info:
        expand_shards(f"{tmp_path}/https://me:pass/word@host/a.tar?sig=secret")
    assert "pass" not in str(info.value)
    assert "secret" not in str(info.value)


@pytest.mark.parametrize("password", ["pass/word", "pass?word", "pa/s#word"])
@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_a_password_that_is_not_encoded_is_refused_with_the_remedy(password, scheme):
    with pytest.raises(UserError, match="write these as %2F %3F %23") as info:
        expand_shards(f"{scheme}://me:{password}@host/a.tar")
    assert "pa" not in str(info.value).replace("password", "")
    assert expand_shards("https://me:p%2Fw@host:80/a@2.tar") == ["https://me:p%2Fw@host:80/a@2.tar"]


def test_secrets_of_a_url_stay_out_of_the_error():
    url = "https://me:password@host/a.tar?sig=secret"
    with pytest.raises(UserError, match="twice") as info:
        expand_shards([url, url])
    assert "password" not in str(info.value)
    assert "secret" not in str(info.value)
