"""Side-cars, pictures and headers that claim what is not so: they are refused for little memory."""

import io
import json
import pickle
import resource
import tarfile
import zipfile

import numpy as np
import pytest

from dist_siglip.data.index.tar_scan import scan_tar
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.transforms import training_transform
from dist_siglip.errors import UserError
from tests.support.hostile import (
    ALLOWED,
    GOOD,
    KEYS,
    POLICY,
    animated,
    chunk,
    in_child,
    jpeg_of_claimed_size,
    listing,
    open_table,
    pickle_that_makes,
    png,
    put,
)
from tests.support.shards import load_index, tiny_inputs


def object_side_car(root, shard):
    """A side-car whose arrays are pickles."""
    load_index(shard)
    with np.load(f"{shard}.idx.npz") as arrays:
        header = arrays["header"]
    hostile = np.array([pickle.loads(pickle.dumps(None))], dtype=object)
    buffer = io.BytesIO()
    np.save(buffer, hostile, allow_pickle=True)
    start = buffer.getvalue()[: -len(pickle.dumps(hostile, protocol=4))]
    with zipfile.ZipFile(f"{shard}.idx.npz", "w") as archive:
        with archive.open("header.npy", "w") as file:
            np.lib.format.write_array(file, header)
        for name in ("members.npy", "keys.npy"):
            archive.writestr(name, start + pickle_that_makes(root / "pwned"))


def test_pickle_in_a_side_car_is_not_run(root, caplog):
    shards = put(root, GOOD)
    object_side_car(root, shards[0])
    assert open_table(shards).num_samples == 4
    assert "side-car of shard" in caplog.text
    assert "is damaged; it is made again" in caplog.text
    assert listing(root) <= ALLOWED


def rewrite_side_car(shard, change, compress=False):
    """Let ``change`` edit the arrays and the parsed header of a good side-car."""
    load_index(shard)
    with np.load(f"{shard}.idx.npz") as arrays:
        content = {name: arrays[name].copy() for name in arrays.files}
    header = json.loads(content["header"].tobytes())
    change(content, header)
    content["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    (np.savez_compressed if compress else np.savez)(f"{shard}.idx.npz", **content)


def set_member(row, value):
    def change(content, header):
        content["members"][row, 1] = value

    return change


SIDE_CARS = {
    "sample out of range": set_member(0, 99),
    "negative sample": set_member(0, -1),
    "extension out of range": set_member(1, 9),
    "negative offset": set_member(2, -512),
    "negative size": set_member(3, -1),
    "size above the shard": set_member(3, 1 << 40),
    "size that overflows": set_member(3, np.iinfo(np.int64).max),
    "offset above the shard": set_member(2, 1 << 60),
    "too few keys": lambda content, header: content.update(keys=content["keys"][:4]),
    "keys of another type": lambda content, header: content.update(keys=content["keys"] * 1.5),
    "members of another type": lambda content, header: content.update(
        members=content["members"] * 1.5
    ),
    "members of another shape": lambda content, header: content.update(
        members=content["members"].reshape(-1)
    ),
    "too few columns": lambda content, header: content.update(members=content["members"][:3]),
    "too many samples": lambda content, header: header.update(num_samples=1 << 50),
    "negative number of samples": lambda content, header: header.update(num_samples=-4),
    "extensions that are a number": lambda content, header: header.update(extensions=7),
    "digest that is a list": lambda content, header: header.update(digest=[[1]] * 9),
    "header without fields": lambda content, header: header.clear(),
}


@pytest.mark.parametrize("name", SIDE_CARS)
def test_side_car_that_does_not_fit_its_shard_is_made_again(root, caplog, name):
    shards = put(root, GOOD)
    wanted = load_index(shards[0])
    rewrite_side_car(shards[0], SIDE_CARS[name])
    found = load_index(shards[0])
    assert found.digest == wanted.digest
    assert found.keys() == wanted.keys()
    assert np.array_equal(found.sizes, wanted.sizes)
    assert "is damaged; it is made again" in caplog.text
    assert listing(root) <= ALLOWED


def test_side_car_that_is_a_bomb_is_made_again_and_not_unpacked(root):
    shards = put(root, GOOD)

    def grow(content, header):
        content["keys"] = np.zeros(1 << 29, dtype=np.uint8)

    rewrite_side_car(shards[0], grow, compress=True)
    keys = in_child(lambda: load_index(shards[0]).keys(), more_bytes=200 << 20)
    assert keys == list(KEYS)


def webp_bomb():
    """An animated WebP that says its canvas has 16384 x 16384 pixels."""
    data = animated()
    place = data.index(b"VP8X") + 12
    return data[:place] + b"\xff\x3f\0\xff\x3f\0" + data[place + 6 :]


def bombs():
    zeros = bytes(1 << 28)
    packed = png(1, 1, pixels=zeros)[41:-16]
    return {
        "PNG of many pixels": png(60_000, 60_000, pixels=bytes(1 << 20)),
        "PNG with too much data": png(20, 20, pixels=zeros),
        "PNG with a bomb of text": png(20, 20, chunk(b"zTXt", b"a\0\0" + packed)),
        "PNG with a bomb of a profile": png(20, 20, chunk(b"iCCP", b"a\0\0" + packed)),
        "PNG with ten thousand frames": png(
            20, 20, chunk(b"acTL", b"\0\0\x27\x10\0\0\0\0"), pixels=bytes(20 * 61)
        ),
        "JPEG of many pixels": jpeg_of_claimed_size(65_000, 65_000),
        "JPEG of as many as allowed": jpeg_of_claimed_size(1000, 1000),
    }


def try_pictures(datas):
    """Decode and transform; return what became of each."""
    return {name: try_picture(data) for name, data in datas.items()}


def try_picture(data):
    try:
        for crop in (None, (0.3, 1.0)):
            transform = training_transform(tiny_inputs(), crop)
            transform(EncodedPicture(data, POLICY))
    except BadSampleError:
        return "bad"
    return "used"


def test_bombs_of_pictures_take_no_memory():
    outcomes = in_child(try_pictures, bombs(), more_bytes=150 << 20)
    assert set(outcomes.values()) == {"used", "bad"}
    assert outcomes["PNG of many pixels"] == outcomes["JPEG of many pixels"] == "bad"


def test_webp_of_a_large_canvas_takes_no_memory():
    def peak(data):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return try_picture(data), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    outcome, grown = in_child(peak, webp_bomb())
    assert outcome == "bad"
    assert grown < 100_000  # kilobytes


def claims(size, kind):
    """A tar whose first header claims a member of so many bytes."""
    entry = tarfile.TarInfo("k0.png")
    entry.size, entry.type = size, kind
    return entry.tobuf(format=tarfile.GNU_FORMAT) + bytes(2048)


@pytest.mark.parametrize("size", [1 << 32, (1 << 33) - 1, 1 << 62])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"7"])
def test_header_that_claims_too_much_takes_no_memory(root, size, kind):
    shards = put(root, claims(size, kind))

    def scan():
        try:
            return len(scan_tar(shards[0]).members)
        except UserError as error:
            return str(error)

    outcome = in_child(scan, more_bytes=100 << 20)
    assert "damaged" in outcome or "cut short" in outcome
