import os
import shutil

import pytest

from dist_siglip.data.pairs import build_pair_table
from dist_siglip.errors import UserError
from tests.support.shards import UNEVEN, caption, encode, picture, write_shard, write_shards

EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def build(shards, extensions=EXTENSIONS):
    return build_pair_table([str(shard) for shard in shards], image_extensions=extensions)


def stored(span):
    with open(span.shard, "rb") as file:
        file.seek(span.offset)
        return file.read(span.size)


def test_spans_hold_the_members_of_every_sample(tmp_path):
    table = build(write_shards(tmp_path))
    assert table.counts == UNEVEN
    assert table.num_samples == sum(UNEVEN)
    for i in range(table.num_samples):
        assert stored(table.image_span(i)) == encode(picture(i))
        assert stored(table.caption_span(i)) == caption(i).encode()


def test_shards_keep_the_order_given(tmp_path):
    shards = write_shards(tmp_path)
    table = build(shards[::-1])
    assert table.counts == UNEVEN[::-1]
    assert stored(table.caption_span(0)) == caption(sum(UNEVEN[:-1])).encode()


def test_empty_shards_among_others_are_fine(tmp_path):
    shards = write_shards(tmp_path, (0, 2, 0, 3, 0))
    table = build(shards)
    assert [stored(table.caption_span(i)).decode() for i in range(5)] == [*map(caption, range(5))]


def test_first_extension_is_preferred_and_others_ignored(tmp_path):
    parts = {"png": b"png", "jpg": b"jpg", "json": b"{}", "txt": b"t", "pkl": b"p"}
    shard = write_shard(tmp_path / "a.tar", [("k", parts), ("l", {"PNG": b"only", "txt": b"t"})])
    assert stored(build([shard], ("png", "jpg")).image_span(0)) == b"png"
    assert stored(build([shard], (".JPG", "png")).image_span(0)) == b"jpg"
    assert stored(build([shard], ("jpg", "png")).image_span(1)) == b"only"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"txt": b"t"}, r"1 of 2 samples have no picture \(\.jpg, .*\), first 'bad'"),
        ({"jpg": b"j"}, r"1 of 2 samples have no caption \(\.txt\), first 'bad'"),
        ({"json": b"{}"}, "have no picture"),
        ({"gif": b"g", "txt": b"t"}, r"the shard holds \.jpg, \.txt, \.gif"),
    ],
)
def test_missing_members_are_found(tmp_path, parts, message):
    members = [("good", {"jpg": b"j", "txt": b"t"}), ("bad", parts)]
    shard = write_shard(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message) as info:
        build([shard])
    assert "\n" not in str(info.value)


def test_no_samples_at_all_is_refused(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="no samples in 1 shards"):
        build([shard])


def test_truncated_shard_among_good_ones_is_named(tmp_path):
    shards = write_shards(tmp_path)
    os.truncate(shards[2], 5000)
    with pytest.raises(UserError, match=r"00002\.tar' is cut short"):
        build(shards)


def test_fingerprint_follows_content_and_not_place(tmp_path):
    original = build(write_shards(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copied = build(sorted((tmp_path / "b").glob("*.tar")))
    assert copied.fingerprint == original.fingerprint
    assert build(copied.shards[:-1]).fingerprint != original.fingerprint
    write_shard(
        tmp_path / "b" / "00001.tar", [("new", {"png": encode(picture(7)), "txt": b"pair"})]
    )
    assert build(copied.shards).fingerprint != original.fingerprint


def test_samples_are_named_by_shard_and_key(tmp_path):
    shards = write_shards(tmp_path)
    table = build(shards)
    assert table.describe(9) == f"'{shards[2]}/000009'"
    for shard in shards:
        os.unlink(shard)
    assert table.describe(9) == f"'{shards[2]}', sample 1"
