"""What a run does with broken and hostile input: a row for each kind, through the real path."""

import io
import json
import logging
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, features

from dist_siglip.data.inspect import Inspector
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.captions import MAX_CAPTION_BYTES, MAX_CAPTION_CHARACTERS, CaptionRule
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.transforms import evaluation_transform, training_transform
from dist_siglip.errors import UserError
from tests.support.hostile import (
    ALLOWED,
    EVERY_FORMAT,
    EXTENSIONS,
    GOOD,
    KEYS,
    POLICY,
    animated,
    chunk,
    gif,
    good_members,
    jpeg_of_claimed_size,
    link,
    listing,
    open_table,
    pickle_that_makes,
    png,
    put,
    replaced,
    saved,
    tar_of,
    tiff,
)
from tests.support.shards import caption, encode, jpeg, load_index, photo, picture, tiny_inputs

TEXT = CaptionRule()


def member_start(number):
    """Offset of the header of a member of the sound shard."""
    with tarfile.open(fileobj=io.BytesIO(GOOD)) as archive:
        return archive.getmembers()[number].offset


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    return saved(picture(9), "PNG", exif=exif)


def palette():
    return picture(9).convert("P")


def sixteen_bits():
    return Image.fromarray((np.asarray(picture(9).convert("L")).astype(np.uint16)) * 257)


class Damaged(NamedTuple):
    """A shard that is wrong: its bytes, what is said, samples that "skip" can still use."""

    data: bytes
    record: str
    usable: int


DAMAGED = {
    "tar cut inside a member": Damaged(GOOD[: member_start(4) + 600], "cut short", 2),
    "tar cut inside a header": Damaged(GOOD[: member_start(4) + 200], "cut short", 2),
    "tar cut exactly between members": Damaged(GOOD[: member_start(5)], "have no caption", 2),
    "bytes behind the end of a tar": Damaged(GOOD + b"#" * 5000, "5000 bytes behind its end", 4),
    "shard of zero bytes": Damaged(b"", "is empty", 0),
    "shard that is no tar": Damaged(b"<html>404 not found</html>" * 100, "damaged or cut short", 0),
    "compressed shard": Damaged(b"\x1f\x8b" + bytes(600), "is compressed", 0),
    "missing caption": Damaged(
        tar_of([m for m in good_members() if m[0] != "k1.txt"]), "have no caption .*'k1'", 3
    ),
    "missing picture": Damaged(
        tar_of([m for m in good_members() if m[0] != "k1.png"]), "have no picture .*'k1'", 3
    ),
    "picture under an extension that is not read": Damaged(
        tar_of([(name.replace("k1.png", "k1.gif"), data) for name, data in good_members()]),
        "have no picture .*'k1'; the shard holds .png, .txt, .gif",
        3,
    ),
    "member that occurs twice": Damaged(
        tar_of([*good_members(), ("k1.txt", b"another")]), "holds member 'k1.txt' twice", 4
    ),
}


class Bad(NamedTuple):
    """A sample that cannot be used: its members, and the reason that is written down."""

    parts: dict[str, bytes]
    reason: str


BAD = {
    "empty caption": Bad({"txt": b""}, "caption is empty"),
    "caption of white space": Bad({"txt": b" \n\t "}, "caption is empty"),
    "caption that is not UTF-8": Bad({"txt": b"caf\xe9"}, "caption is not UTF-8"),
    "caption above 1 MiB": Bad({"txt": b"x" * (MAX_CAPTION_BYTES + 1)}, "caption of 1048577 bytes"),
    "truncated JPEG": Bad({"png": jpeg(photo(64, 64))[:-300]}, "cannot be decoded"),
    "truncated PNG": Bad({"png": encode(picture(1))[:-100]}, "cannot be decoded"),
    "PNG bomb": Bad(
        {"png": png(40_000, 40_000, pixels=bytes(1 << 20))}, "40000 x 40000 pixels, at most 1000000"
    ),
    "JPEG that claims 65000 x 65000": Bad(
        {"png": jpeg_of_claimed_size(65_000, 65_000)}, "65000 x 65000 pixels, at most 1000000"
    ),
    "picture 300 times as wide as high": Bad({"png": png(3000, 10)}, "at most 200 : 1"),
    "GIF under the name of a PNG": Bad({"png": saved(picture(1), "GIF")}, "no JPEG, PNG or WebP"),
    "PostScript under the name of a PNG": Bad(
        {"png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n"},
        "no JPEG, PNG or WebP",
    ),
    "empty picture": Bad({"png": b""}, "no JPEG, PNG or WebP"),
}
ON_REQUEST = {
    "GIF of a huge screen": Bad({"png": gif((40_000, 40_000), (1, 1))}, "40000 x 40000 pixels"),
    "GIF of a huge frame": Bad({"png": gif((1, 1), (40_000, 40_000))}, "40000 x 40000 pixels"),
    "GIF cut short": Bad({"png": saved(photo(64, 64), "GIF")[:-900]}, "cannot be decoded"),
    "TIFF bomb": Bad({"png": tiff(40_000, 40_000)}, "40000 x 40000 pixels"),
    "TIFF of huge tiles": Bad({"png": tiff(16, 16, tile=(60_000, 60_000))}, "tiles of 60000"),
    "TIFF with the pixels of another size": Bad({"png": tiff(900, 900)}, "cannot be decoded"),
    "TIFF of fractions": Bad(
        {"png": saved(Image.new("F", (9, 9)), "TIFF")}, "fractions needs data.intensity_window"
    ),
    "BMP that claims 65000 x 65000": Bad(
        {"png": b"BM" + bytes(12) + struct.pack("<IiiHH", 40, 65_000, 65_000, 1, 24) + bytes(24)},
        "65000 x 65000 pixels",
    ),
    "AVIF cut to its first boxes": Bad(
        {"png": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(40)},
        "cannot be decoded" if features.check("avif") else "does not name",
    ),
}
BAD_JSON = {
    "JSON cut short": Bad({"json": b'{"caption": "a h'}, "JSON cannot be read"),
    "JSON nested 100000 deep": Bad({"json": b"[" * 100_000}, "nested too deeply"),
    "JSON with a number of 5000 digits": Bad(
        {"json": b'{"caption": ' + b"9" * 5000 + b"}"}, "JSON cannot be read"
    ),
    "JSON without the field, empty text": Bad(
        {"json": b'{"text": "a hen"}', "txt": b""}, "no field 'caption'"
    ),
    "JSON with half a character": Bad({"json": rb'{"caption": "\ud800"}'}, "not UTF-8"),
}


class Used(NamedTuple):
    """A sample that looks odd and is used: its picture, what it must show, its caption."""

    parts: dict[str, bytes]
    shows: Callable[[], Image.Image] = lambda: picture(1)
    says: str = caption(1)
    findings: tuple[str, ...] = ()


def with_text(text):
    """A PNG with a text before its pixels."""
    data = encode(picture(9))
    place = data.index(b"IDAT") - 4
    return data[:place] + chunk(b"zTXt", b"a\0\0" + zlib.compress(text)) + data[place:]


USED = {
    "caption of 1 MB": Used(
        {"txt": b"word " * 200_000}, says=("word " * 1000)[:MAX_CAPTION_CHARACTERS].rstrip()
    ),
    "CMYK": Used(
        {"png": saved(picture(9).convert("CMYK"), "JPEG")},
        lambda: Image.open(io.BytesIO(saved(picture(9).convert("CMYK"), "JPEG"))).convert("RGB"),
        findings=("extension of another format",),
    ),
    "16 bits": Used({"png": saved(sixteen_bits(), "PNG")}, lambda: picture(9).convert("L")),
    "palette": Used({"png": saved(palette(), "PNG")}, palette),
    "animated": Used(
        {"png": animated()}, lambda: picture(9), findings=("extension of another format",)
    ),
    "PNG with a bomb of text": Used({"png": with_text(bytes(1 << 24))}, lambda: picture(9)),
    "turned by EXIF": Used({"png": turned()}, lambda: picture(9)),
    "wrong extension": Used(
        {"png": saved(picture(9), "WEBP", lossless=True)},
        lambda: picture(9),
        findings=("extension of another format",),
    ),
}


def ignored(root):
    """Members that are ignored beside four sound samples, by what ``data check`` says of them."""
    payload = pickle_that_makes(root / "pwned")
    code = f"open({str(root / 'pwned')!r}, 'w')".encode()
    return {
        "member named ../../x": ("path outside", ("../../x.bin", b"x")),
        "absolute path": ("path outside", (str(root / "outside.bin"), b"x")),
        "symlink": ("link or device", link("k9.png", "/etc/passwd")),
        "symlink in place of a picture": ("link or device", link("k8.png", "../../secret")),
        "hard link": ("link or device", link("k7.txt", "/etc/passwd", tarfile.LNKTYPE)),
        "device": ("link or device", link("k6.txt", "", tarfile.CHRTYPE)),
        "fifo": ("link or device", link("k5.png", "", tarfile.FIFOTYPE)),
        ".pyd": ("code", ("k1.pyd", payload)),
        ".pkl": ("code", ("k1.pkl", payload)),
        ".pth": ("code", ("k1.pth", payload)),
        ".npy": ("code", ("k1.npy", b"\x93NUMPY\x01\x00" + payload)),
        ".py": ("code", ("sitecustomize.py", code)),
    }


IGNORED = tuple(ignored(Path("nowhere")))


def dataset(table, captions=TEXT, crop=None, pictures=POLICY):
    transform = training_transform(tiny_inputs(), crop)
    return PairDataset(
        table,
        transform,
        seed=0,
        pictures=pictures,
        captions=captions,
        bad_sample_log="bad.jsonl",
    )


def records():
    if not os.path.exists("bad.jsonl"):
        return []
    with open("bad.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def check(shards, captions=TEXT, pictures=POLICY):
    """Kinds of finding of ``data check``, with their keys."""
    inspect = Inspector(
        image_extensions=EXTENSIONS,
        captions=captions,
        pictures=pictures,
    )
    return [(finding.kind, finding.key) for finding in inspect(shards[0]).findings]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_shard_is_refused_or_skipped_and_named(root, caplog, name):
    case = DAMAGED[name]
    shards = put(root, case.data)
    with pytest.raises(UserError, match=case.record) as info:
        open_table(shards)
    assert shards[0] in str(info.value)
    assert "\n" not in str(info.value)
    with pytest.raises(UserError, match=r"max_bad_fraction \(0\.1\) allows|skipped"):
        open_table(shards, on_damage="skip", max_bad_fraction=0.1)
    with caplog.at_level(logging.WARNING):
        if case.usable:
            table = open_table(shards, on_damage="skip", max_bad_fraction=1)
            data = dataset(table)
            for i in range(case.usable):
                assert not data[StreamPosition(0, i, i)].is_substitute
            assert len(data) == case.usable
        else:
            with pytest.raises(UserError, match="holds no samples"):
                open_table(shards, on_damage="skip", max_bad_fraction=1)
    named = [r for r in caplog.records if r.getMessage().startswith("skipped: ")]
    assert len(named) == 1
    assert shards[0] in named[0].getMessage()
    assert len(check(shards)) >= 1
    assert listing(root) <= ALLOWED


@pytest.mark.parametrize("name", [*BAD, *BAD_JSON, *ON_REQUEST])
def test_bad_sample_is_replaced_with_one_record(root, name):
    in_json = name in BAD_JSON
    case = (BAD | BAD_JSON | ON_REQUEST)[name]
    pictures = EVERY_FORMAT if name in ON_REQUEST else POLICY
    captions = CaptionRule(members=("json", "txt")) if in_json else TEXT
    members = replaced(**case.parts)
    shards = put(root, tar_of(members))
    table = open_table(shards, caption_extensions=captions.members)
    data = dataset(table, captions, crop=(0.3, 1.0), pictures=pictures)
    place = load_index(shards[0]).keys().index("k1")
    sample = data[StreamPosition(2, 5, place)]
    assert sample.is_substitute
    assert sample.sample_id != place
    (record,) = {json.dumps(record, sort_keys=True) for record in records()}
    assert {k: v for k, v in json.loads(record).items() if k != "reason"} == {
        "shard": shards[0],
        "key": "k1",
        "sample_id": place,
        "epoch": 2,
        "position": 5,
        "source": 0,
    }
    assert case.reason in json.loads(record)["reason"]
    for other in {0, 1, 2, 3} - {place}:
        assert not data[StreamPosition(2, 9, other)].is_substitute
    found = check(shards, captions, pictures)
    assert [key for kind, key in found if kind.startswith("bad ")] == ["k1"]
    assert listing(root) <= ALLOWED


@pytest.mark.parametrize("name", USED)
def test_odd_sample_is_used(root, name):
    case = USED[name]
    shards = put(root, tar_of(replaced(**case.parts)))
    data = dataset(open_table(shards))
    place = load_index(shards[0]).keys().index("k1")
    sample = data[StreamPosition(0, 0, place)]
    assert not sample.is_substitute
    assert sample.caption == case.says
    wanted = evaluation_transform(tiny_inputs())(case.shows().convert("RGB"))
    assert torch.equal(sample.image, wanted)
    assert records() == []
    assert tuple(kind for kind, _ in check(shards)) == case.findings
    assert listing(root) <= ALLOWED


@pytest.mark.parametrize("name", IGNORED)
def test_member_that_no_sample_needs_is_never_opened(root, name):
    kind, member = ignored(root)[name]
    shards = put(root, tar_of([*good_members(), member]))
    data = dataset(open_table(shards, on_damage="skip", max_bad_fraction=1))
    for i, key in enumerate(KEYS):
        sample = data[StreamPosition(0, i, i)]
        assert (sample.caption, sample.is_substitute) == (caption(i), False), key
    assert len(data) == 4
    assert [found for found, _ in check(shards)].count(kind) == 1
    assert listing(root) <= ALLOWED


@pytest.mark.parametrize("key", ["../../x", "/outside/x", "a/../../../x"])
def test_sample_whose_name_leads_outside_is_read_and_never_written(root, key):
    members = [*good_members(), (f"{key}.png", encode(picture(7))), (f"{key}.txt", b"a hen")]
    shards = put(root, tar_of(members))
    data = dataset(open_table(shards))
    assert data[StreamPosition(0, 0, 4)].caption == "a hen"
    assert {kind for kind, _ in check(shards)} == {"path outside"}
    assert listing(root) <= ALLOWED


def test_link_in_place_of_a_picture_is_a_missing_picture(root):
    members = [m for m in good_members() if m[0] != "k1.png"]
    shards = put(root, tar_of([*members, link("k1.png", "/etc/passwd")]))
    with pytest.raises(UserError, match=r"have no picture .*first 'k1'"):
        open_table(shards)


def test_payload_works_where_it_is_unpickled(root):
    pickle.loads(pickle_that_makes(root / "pwned")).close()
    assert (root / "pwned").exists()


@pytest.mark.parametrize("extension", ["png", "txt", "json"])
def test_pickle_in_place_of_a_member_is_not_run(root, extension):
    payload = pickle_that_makes(root / "pwned")
    shards = put(root, tar_of(replaced(**{extension: payload})))
    captions = CaptionRule(members=("json", "txt"))
    data = dataset(open_table(shards, caption_extensions=captions.members), captions)
    for i in range(4):
        data[StreamPosition(0, i, i)]
    if extension == "png":
        assert {record["key"] for record in records()} == {"k1"}
    assert listing(root) <= ALLOWED
