import os
import shutil
import tarfile
from pathlib import Path

import pytest

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.errors import UserError
from tests.support.shards import UNEVEN, caption, encode, picture, write_shard, write_shards

EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def build(shards, extensions=EXTENSIONS, **options):
    return build_pair_table(
        [str(shard) for shard in shards],
        image_extensions=extensions,
        name="train_shards",
        **options,
    )


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
        assert stored(table.caption_spans(i)[0][1]) == caption(i).encode()


def test_shards_keep_the_order_given(tmp_path):
    shards = write_shards(tmp_path)
    table = build(shards[::-1])
    assert table.counts == UNEVEN[::-1]
    assert stored(table.caption_spans(0)[0][1]) == caption(sum(UNEVEN[:-1])).encode()


def test_empty_shards_among_others_are_fine(tmp_path):
    shards = write_shards(tmp_path, (0, 2, 0, 3, 0))
    table = build(shards)
    assert [stored(table.caption_spans(i)[0][1]).decode() for i in range(5)] == [
        *map(caption, range(5))
    ]


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


def test_a_sample_may_have_several_members_with_captions(tmp_path):
    parts = [
        {"jpg": b"a", "txt": b"first", "json": b"{}"},
        {"jpg": b"b", "json": b"{1}"},
        {"jpg": b"c", "txt": b"third"},
    ]
    shard = write_shard(tmp_path / "a.tar", [(str(i), p) for i, p in enumerate(parts)])
    table = build([shard], caption_extensions=("json", "TXT"))
    read = [
        [(kind, stored(span)) for kind, span in table.caption_spans(i)]
        for i in range(table.num_samples)
    ]
    assert read == [[("json", b"{}"), ("txt", b"first")], [("json", b"{1}")], [("txt", b"third")]]
    with pytest.raises(UserError, match=r"1 of 3 samples have no caption \(\.txt\), first '1'"):
        build([shard])


def damaged(folder):
    """A shard cut inside a member, one that is no tar, one with incomplete samples, a sound one."""
    shards = write_shards(folder, (9, 4, 4, 6))
    os.truncate(shards[0], os.path.getsize(shards[0]) // 2 + 100)
    with open(shards[1], "wb") as file:
        file.write(b"not a tar" * 500)
    parts = [("a", {"png": b"p"}), ("b", {"png": b"p", "txt": b"t"}), ("c", {"txt": b"t"})]
    write_shard(folder / "00002.tar", [*parts, ("d", {"png": b"q", "txt": b"u"})])
    return shards


def test_everything_that_is_damaged_is_counted(tmp_path):
    with pytest.raises(UserError) as info:
        build(damaged(tmp_path))
    text = str(info.value)
    assert "2 of 4 shards and 2 of 15 samples" in text  # 5 + 4 + 6: what can be read
    assert "00000.tar" in text
    assert "00001.tar" in text
    assert "dist-siglip data check" in text
    assert "\n" not in text


def test_damage_is_skipped_on_request_and_named_in_the_log(tmp_path, caplog):
    shards = damaged(tmp_path)
    table = build(shards, on_damage="skip", max_bad_fraction=0.5)
    whole = table.counts[0]
    assert 0 < whole < 9
    assert table.counts == (whole, 0, 2, 6)
    for i in range(whole):
        assert stored(table.image_span(i)) == encode(picture(i))
    assert stored(table.image_span(whole)) == b"p"
    assert stored(table.image_span(whole + 1)) == b"q"
    assert table.describe(whole) == f"'{shards[2]}/b'"
    assert table.describe(whole + 1) == f"'{shards[2]}/d'"
    assert table.describe(whole + 2).endswith("00003.tar/000017'")
    assert caplog.text.count("skipped: shard") == 4
    assert "train_shards: 2 of 4 shards" in caplog.text


def test_too_much_damage_is_refused_with_the_list(tmp_path):
    with pytest.raises(UserError, match=r"2 of 4 shards .*more than max_bad_fraction \(0.3\)"):
        build(damaged(tmp_path), on_damage="skip", max_bad_fraction=0.3)


def test_a_shard_cut_exactly_between_two_members_is_damaged(tmp_path):
    (shard,) = write_shards(tmp_path, (3,))
    table = build([shard])
    last = table.caption_spans(2)[0][1]
    os.truncate(shard, last.offset - 512 - 1024)  # its header and the PAX header before it
    with pytest.raises(UserError, match="cut short"):
        build([shard])
    kept = build([shard], on_damage="skip", max_bad_fraction=1.0)
    assert kept.num_samples == 2
    assert kept.dropped.tolist() == [[0, 2]]


def test_of_a_key_that_occurs_twice_the_first_member_counts(tmp_path):
    shard = write_shard(
        tmp_path / "a.tar",
        [
            ("k", {"png": b"1", "txt": b"t"}),
            ("l", {"png": b"2", "txt": b"t"}),
            ("k", {"png": b"3"}),
        ],
    )
    with pytest.raises(UserError, match=r"holds member 'k\.png' twice"):
        build([shard])
    table = build([shard], on_damage="skip", max_bad_fraction=1.0)
    assert [stored(table.image_span(i)) for i in range(2)] == [b"1", b"2"]


def test_archives_behind_one_another_are_used_and_told_by_every_start(tmp_path, caplog):
    shards = write_shards(tmp_path, (3, 4))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(Path(shard).read_bytes() for shard in shards))
    for _ in range(2):  # the second takes the table from its file
        caplog.clear()
        table = build([joined])
        assert [stored(table.image_span(i)) for i in range(7)] == [
            encode(picture(i)) for i in range(7)
        ]
        assert "train_shards: shard" in caplog.text
        assert "holds 2 archives, one behind the other" in caplog.text
    assert table.file is not None


def test_many_remarks_are_counted(tmp_path, caplog):
    build(write_shards(tmp_path, (0, 0, 0, 2, 0, 0, 0)))
    assert caplog.text.count("holds no samples") == 5
    assert "train_shards: 1 more of this kind" in caplog.text


def test_a_name_with_dots_is_refused_with_cause_example_and_remedy(tmp_path):
    parts = {f"{i}x_0.{kind}": b"x" for i in (2, 5) for kind in ("jpg", "txt")}
    shard = write_shard(tmp_path / "a.tar", [("img_1", parts)])
    with pytest.raises(UserError) as info:
        build([shard])
    text = str(info.value)
    assert "names are split at their first dot" in text
    assert "'img_1.2x_0.jpg' is member '2x_0.jpg' of sample 'img_1'" in text
    assert "put no dot before the extension; dist-siglip data pack" in text
    assert "\n" not in text


def test_pairs_that_another_sample_swallows_are_told(tmp_path, caplog):
    parts = {"jpg": b"a", "txt": b"b", "1.jpg": b"c", "1.txt": b"d", "seg.png": b"e"}
    build([write_shard(tmp_path / "a.tar", [("k", parts)])])
    assert "look like pairs of their own and are not read" in caplog.text
    assert "'k.1.jpg' is member '1.jpg' of sample 'k'" in caplog.text
    caplog.clear()
    del parts["1.jpg"]
    build([write_shard(tmp_path / "b.tar", [("k", parts)])])
    assert caplog.text == ""


def test_a_hard_link_in_place_of_a_picture_is_called_what_it_is(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, target in (
            ("a.jpg", tarfile.REGTYPE, ""),
            ("a.txt", tarfile.REGTYPE, ""),
            ("b.jpg", tarfile.LNKTYPE, "a.jpg"),
            ("b.txt", tarfile.REGTYPE, ""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
    with pytest.raises(UserError, match=r"no picture.*'b\.jpg' \(a hard link to 'a\.jpg'\)"):
        build([tmp_path / "a.tar"])


def test_another_policy_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"on_damage \(ignore\) must be refuse or skip"):
        build(write_shards(tmp_path), on_damage="ignore")
