"""Broken shards, members, side-cars, tables and locations through the real path.

Each must end as a sample, a ``BadSampleError`` or a ``UserError``. The cases of a seed are always
the same; they run in forked children, so that a crash, a hang or a lack of memory is an outcome
too, with the seed in the message. All 26,000 run with ``--full``, otherwise a tenth.
"""

import io
import mmap
import os
import random
import shutil
import signal
import struct
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dist_siglip.data import urls
from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.index.read import read_index
from dist_siglip.data.inspect import Inspector
from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.packing import SampleMaker
from dist_siglip.data.packing.table import Columns, read_rows
from dist_siglip.data.samples.augmentations import (
    Replay,
    UnknownOperationError,
    parse_augmentation,
)
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import MAX_CAPTION_CHARACTERS, CaptionRule
from dist_siglip.data.samples.datacompdr import read_teacher_rows, teacher_row
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.data.samples.picture import EncodedPicture, sniff_media_type
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import CropResize, training_transform
from dist_siglip.errors import UserError
from tests.support.broken_pictures import break_jpeg, break_png, break_webp
from tests.support.hostile import EVERY_FORMAT, EXTENSIONS, ChildError, in_child
from tests.support.mutations import (
    NUMBERS,
    break_blocks,
    break_bytes,
    break_header,
    break_side_car,
    make_json,
    make_location,
)
from tests.support.reinforced import DIMS, augmentation, members
from tests.support.shards import picture, tiny_inputs, write_shard
from tests.support.sound_files import sources

MAX_PIXELS = 4_000_000
POLICY = PicturePolicy(max_image_pixels=MAX_PIXELS)
SECONDS_A_CASE = 10
MORE_BYTES = 1 << 30  # address space of a child, besides what is mapped before
MORE_BYTES_OF_ARROW = 8 << 30  # which reserves it in large pieces
CAPTIONS = CaptionRule(members=("json", "txt"), pick="random")
BREAK = {"JPEG": break_jpeg, "PNG": break_png, "WEBP": break_webp}


# A function for each kind of case: breaks something, runs it, says what became of it.
def of_blocks(draw, folder):
    return through_dataset(draw, folder, break_blocks(draw, any_tar(draw, folder)))


def of_tar_bytes(draw, folder):
    return through_dataset(draw, folder, break_bytes(draw, any_tar(draw, folder)))


def of_headers(draw, folder):
    return through_dataset(draw, folder, break_header(draw, any_tar(draw, folder)))


def any_tar(draw, folder):
    kind = draw.choice(("webdataset", "plain", "gnu", "pax"))
    if kind == "webdataset":
        return write_shard(folder / "source.tar", sources()["members"]).read_bytes()
    return sources()[kind]


def of_members(draw, folder):
    """A sound tar whose members are broken."""
    broken = []
    for key, parts in sources()["members"]:
        changed = dict(parts)
        name = draw.choice((*changed, "none", "none"))
        if name == "txt":
            changed[name] = draw.choice((b"", b"\xff", b" ", b"x" * (1 << 20), draw.randbytes(50)))
        elif name == "json":
            changed[name] = make_json(draw)
        elif name in changed:
            changed[name] = any_picture(draw)
        broken.append((key, changed))
    return through_dataset(draw, folder, write_shard(folder / "source.tar", broken).read_bytes())


def of_pictures(draw, folder):
    data = any_picture(draw)
    transform = training_transform(tiny_inputs(), draw.choice(((0.3, 1.0), (0.9, 1.0), None)))
    try:
        image = transform(EncodedPicture(data, POLICY))
        sniff_media_type(data)
    except BadSampleError:
        return "bad sample"
    assert image.shape == (3, 16, 16)
    return "used"


def of_pictures_on_request(draw, folder):
    """A broken GIF, TIFF, BMP or AVIF, seen through a window or not."""
    kind = draw.choice([name for name in ("GIF", "TIFF", "BMP", "AVIF") if sources()[name]])
    data = break_bytes(draw, draw.choice(sources()[kind]))
    window = draw.choice((None, (0, 1), (100, 200)))
    try:
        picture = EncodedPicture(data, replace(EVERY_FORMAT, intensity_window=window))
        image = training_transform(tiny_inputs(), draw.choice(((0.3, 1.0), None)))(picture)
    except BadSampleError:
        return "bad sample"
    assert image.shape == (3, 16, 16)
    return "used"


def any_picture(draw):
    kind = draw.choice(tuple(BREAK))
    data = draw.choice(sources()[kind])
    return BREAK[kind](draw, data) if draw.random() < 0.7 else break_bytes(draw, data)


def of_captions(draw, folder):
    rule = CaptionRule(
        members=("json", "txt"),
        json_field=draw.choice(("caption", "a.caption", "caption.a")),
        pick=draw.choice(("first", "random")),
        split_lines=draw.random() < 0.5,
    )
    texts = [("json", make_json(draw)), ("txt", break_bytes(draw, "a hen\né\n".encode()))]
    try:
        check_caption(rule.choose(draw.sample(texts, draw.choice((1, 2))), (1, 2)))
    except BadSampleError:
        return "bad sample"
    return "used"


def of_teachers(draw, folder):
    """Broken rows of teachers, or a broken augmentation, of a reinforced sample."""
    parts = members(0)
    rows = parts["npz"] if draw.random() < 0.3 else break_bytes(draw, parts["npz"])
    stored = augmentation(0, draw.randrange(3))
    for _ in range(draw.choice((0, 1, 2))):
        numbers = draw.choice([stored[0], *stored[1]])
        numbers[draw.randrange(len(numbers))] = draw.choice(
            (*NUMBERS, -1, 0.5, -1e9, 1e400, float("nan"), "Solarize", "", None, True, [], 10**40)
        )
    try:
        for found in read_teacher_rows(rows, sum(DIMS)):
            teacher_row(found[-1], DIMS)
        replay = Replay(CropResize(tiny_inputs(), scaled_decode=False), 16)
        image = replay(picture(0), parse_augmentation(stored))
    except BadSampleError:
        return "bad sample"
    except UnknownOperationError:
        return "refused"
    assert image.shape == (3, 16, 16)
    return "used"


def check_caption(text):
    assert text.strip()
    assert len(text) <= MAX_CAPTION_CHARACTERS
    text.encode()  # what a tokenizer needs


def of_side_cars(draw, folder):
    shard = folder / "a.tar"
    shard.write_bytes(sources()["plain"])
    wanted = read_index(str(shard))
    side_car = folder / "a.tar.idx.npz"
    side_car.write_bytes(break_side_car(draw, side_car.read_bytes()))
    found = read_index(str(shard))
    assert len(found.keys()) == found.num_samples
    outcome = through_dataset(draw, folder, None)
    return "made again" if is_same(found, wanted) else f"believed, {outcome}"


def is_same(found, wanted):
    same = found.keys() == wanted.keys() and found.extensions == wanted.extensions
    names = ("samples", "kinds", "offsets", "sizes")
    return same and all(np.array_equal(getattr(found, n), getattr(wanted, n)) for n in names)


def of_locations(draw, folder):
    (folder / "a.tar").write_bytes(b"x")
    specs = [make_location(draw, str(folder / "a.tar")) for _ in range(3)]
    spec = draw.choice((specs[0], specs))
    if draw.random() < 0.4:
        lines = "\n".join(specs).encode("utf-8", "surrogatepass")
        (folder / "list.txt").write_bytes(lines)
        spec = str(folder / "list.txt")
    try:
        found = urls.expand_shards(spec, allow_remote=draw.random() < 0.8)
    except UserError as error:
        return in_one_line(error, "refused")
    assert all(urls.is_remote(shard) or os.path.isfile(shard) for shard in found)
    return "used"


def of_tables(draw, folder):
    """A broken CSV, JSONL or Parquet table, as ``data pack`` reads it."""
    suffix = draw.choice((".csv", ".tsv", ".jsonl", ".parquet"))
    rows = [{"image": f"{i}.png", "caption": "a hen", "site": "é"} for i in range(3)]
    if suffix == ".parquet":
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        data = buffer.getvalue()
    elif suffix == ".jsonl":
        data = b"\n".join(b'{"image": "%d.png", "caption": ["a hen", "b"]}' % i for i in range(3))
        data += b"\n" + make_json(draw)
    else:
        mark = "," if suffix == ".csv" else "\t"
        data = mark.join(rows[0]).encode() + b"\n"
        data += "\n".join(mark.join(row.values()) for row in rows).encode()
    (folder / f"table{suffix}").write_bytes(break_bytes(draw, data))
    (folder / "0.png").write_bytes(sources()["PNG"][0])
    maker = SampleMaker(images=str(folder), keep_others=True, pictures=POLICY)
    num_bad = 0
    try:
        for row in read_rows(folder / f"table{suffix}", Columns(keep_others=True)):
            num_bad += not is_made(maker, row)
    except UserError as error:
        return in_one_line(error, "refused")
    return "bad rows" if num_bad else "used"


def of_rows(draw, folder):
    """A broken table of paths and captions, as training reads it without packing."""
    suffix = draw.choice((".csv", ".jsonl"))
    if suffix == ".csv":
        data = b"image,caption,n\n" + b"".join(b"%d.png,a hen,%d\n" % (i, i) for i in range(4))
    else:
        data = b"".join(b'{"image": "%d.png", "caption": "a hen"}\n' % i for i in range(4))
        data += make_json(draw) + b"\n"
    for i in range(4):
        (folder / f"{i}.png").write_bytes(sources()["PNG"][0])
    table = folder / f"a{suffix}"
    table.write_bytes(break_bytes(draw, data))
    return through_dataset(draw, folder, None, table)


def of_parquet(draw, folder):
    """A broken Parquet file as a shard: anywhere, in its footer, or in the header of a page."""
    data = draw.choice(sources()["parquet"])
    footer = int.from_bytes(data[-8:-4], "little") + 8
    place = draw.random()
    if place < 0.3:
        data = break_bytes(draw, data)
    elif place < 0.7:
        broken = break_bytes(draw, data[-footer:-8])
        length = draw.choice((*NUMBERS, *[len(broken)] * 5)) % 2**32
        data = data[:-footer] + broken + length.to_bytes(4, "little") + b"PAR1"
    else:
        start = draw.choice((4, data.find(b"\x15"), draw.randrange(4, len(data) - footer)))
        broken = break_bytes(draw, data[start : start + 40])[:40]
        data = data[:start] + broken + data[start + len(broken) :]
    return through_dataset(draw, folder, data, folder / "a.parquet")


def in_one_line(error, outcome):
    assert "\n" not in str(error)
    return outcome


def is_made(maker, row):
    try:
        maker(row)
    except BadSampleError:
        return False
    return True


def through_dataset(draw, folder, data, shard=None):
    """Index, join, read, decode and transform a shard; look at it as ``data check`` does."""
    shard = shard or folder / "a.tar"
    if data is not None:
        shard.write_bytes(data)
    if draw.random() < 0.2:
        inspect = Inspector(
            image_extensions=EXTENSIONS,
            captions=CAPTIONS,
            pictures=POLICY,
        )
        inspect(str(shard))
    try:
        table = build_pair_table(
            [str(shard)],
            image_extensions=EXTENSIONS,
            caption_extensions=CAPTIONS.members,
            on_damage="skip",
            max_bad_fraction=1,
        )
    except UserError as error:
        return in_one_line(error, "refused")
    index = read_index(str(shard))  # by now from a side-car, if it is sound
    assert len(index.keys()) == index.num_samples
    samples = PairDataset(
        table,
        training_transform(tiny_inputs(), (0.3, 1.0)),
        seed=0,
        pictures=POLICY,
        captions=CAPTIONS,
        bad_sample_log=str(folder / "bad.jsonl"),
    )
    num_bad = 0
    try:
        for i in range(min(len(samples), 4)):
            sample = samples[StreamPosition(0, i, i)]
            num_bad += sample.is_substitute
            check_caption(sample.caption)
            assert sample.image.shape == (3, 16, 16)
    except UserError as error:
        return in_one_line(error, "all bad")
    if num_bad:
        return "substituted"
    return "used in part" if index.damage or len(table.dropped) else "used"


# Kind -> function, cases of the full run.
KINDS = {
    "blocks of a tar": (of_blocks, 1000),
    "bytes of a tar": (of_tar_bytes, 1300),
    "headers of a tar": (of_headers, 2500),
    "members": (of_members, 600),
    "pictures": (of_pictures, 8000),
    "pictures on request": (of_pictures_on_request, 2500),
    "rows and augmentations of teachers": (of_teachers, 1000),
    "captions and JSON": (of_captions, 2500),
    "side-cars": (of_side_cars, 2100),
    "locations": (of_locations, 2000),
    "tables to pack": (of_tables, 1000),
    "tables to train on": (of_rows, 500),
    "Parquet": (of_parquet, 1000),
}


def run_cases(function, seeds, folder, place):
    """Run the cases of some seeds; the seed at work stands in ``place``."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills the child
    warnings.simplefilter("ignore")  # of Pillow, about what it reads
    urls.list_remote = urls.glob_remote = lambda url: []  # no case leaves this machine
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    outcomes = Counter()
    for seed in seeds:
        place[:8] = struct.pack("<q", seed)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
        work = folder / "case"
        work.mkdir()
        os.chdir(work)
        outcomes[function(random.Random(seed), work)] += 1
        assert {path.name for path in folder.iterdir()} <= {"case", "cache"}
        shutil.rmtree(work)
        shutil.rmtree(folder / "cache", ignore_errors=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return outcomes


def fuzz(kind, seeds, folder, record):
    """Run cases in a child and record how many ended in which way."""
    place = mmap.mmap(-1, 8)  # shared with the child
    sources()
    where = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else folder
    where = where / f"fuzz-{os.getpid()}"
    where.mkdir()
    more = MORE_BYTES_OF_ARROW if kind in ("tables to pack", "Parquet") else MORE_BYTES
    try:
        outcomes = in_child(
            run_cases, KINDS[kind][0], seeds, where, place, seconds=280, more_bytes=more
        )
    except ChildError as error:
        (seed,) = struct.unpack("<q", place[:8])
        raise AssertionError(f"{kind}, seed {seed}: {error}") from None
    finally:
        shutil.rmtree(where)
        place.close()
    record("outcomes", dict(outcomes))
    assert sum(outcomes.values()) == len(seeds)
    return outcomes


def test_the_full_run_has_26000_cases():
    assert sum(count for _, count in KINDS.values()) == 26_000


@pytest.mark.parametrize("kind", KINDS)
def test_some_broken_input_ends_well(kind, tmp_path, record_property):
    fuzz(kind, range(1_000_000, 1_000_000 + KINDS[kind][1] // 50), tmp_path, record_property)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_much_broken_input_ends_well(kind, tmp_path, record_property, capsys, is_full):
    seeds = range(KINDS[kind][1] // (1 if is_full else 10))
    outcomes = fuzz(kind, seeds, tmp_path, record_property)
    with capsys.disabled():
        print(f"\n{kind}: {dict(sorted(outcomes.items()))}")
    assert len(outcomes) > 1
