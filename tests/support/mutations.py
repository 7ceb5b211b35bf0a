"""Ways to break bytes, all decided by a ``random.Random``."""

import io
import json
import struct
import tarfile
import zipfile

import numpy as np

BLOCK = 512
NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
)
# Fields of a tar header: first byte, length.
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}
SIZES = (
    b"00000000000\0",
    b"77777777777\0",
    b"00000001000\0",
    b"99999999999\0",
    b"-0000000001\0",
    b"\x80" + b"\xff" * 11,  # base 256, huge
    b"\xff" * 12,  # base 256, minus one
    b"\xff" * 10 + b"\xfe\x00",  # minus 512
    b"\x80" + bytes(10) + b"\x01",
    b"            ",
    bytes(12),
)
NAMES = (b"../../x.png", b"/etc/x.png", b"k1.png", b".png", b"k9", b"\xff\xfe.png", b"a/" * 40, b"")


def break_bytes(draw, data):
    """Flip, cut, splice, repeat or overwrite."""
    data = bytearray(data)
    if not data:
        return draw.randbytes(draw.randrange(40))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        place = draw.randrange(len(data) + 1) if data else 0
        length = min(draw.choice((1, 2, 4, 16, 512, 1024)), max(1, len(data)))
        start = draw.randrange(max(1, len(data)))
        kind = draw.randrange(8)
        if kind == 0 and data:
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[start : start + length]
        elif kind == 4:
            data[place : place + length] = draw.randbytes(length)
        elif kind == 5:
            data[place : place + length] = bytes(length)
        elif kind == 6:
            number = draw.choice(NUMBERS) & 0xFFFFFFFF
            data[place : place + 4] = struct.pack(draw.choice("<>") + "I", number)
        else:
            data[place : place + length] = data[start : start + length]
    return bytes(data)


def break_blocks(draw, data):
    """Repeat, drop, swap or blank whole blocks of a tar."""
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    for _ in range(draw.choice((1, 1, 2, 4))):
        here, there = (draw.randrange(len(blocks)) for _ in range(2))
        kind = draw.randrange(5)
        if kind == 0:
            blocks[here:here] = blocks[there : there + draw.randrange(1, 6)]
        elif kind == 1 and len(blocks) > 1:
            del blocks[here]
        elif kind == 2:
            blocks[here], blocks[there] = blocks[there], blocks[here]
        elif kind == 3:
            blocks[here] = bytes(BLOCK)
        else:
            del blocks[max(1, here) :]
    return b"".join(blocks)


def break_header(draw, data):
    """Change fields of one or two headers; most get the checksum that then is right."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        headers = [entry.offset for entry in archive]
    data = bytearray(data)
    for start in draw.sample(headers, draw.choice((1, 1, 2))):
        field = draw.choice((*FIELDS, "size", "type", "name"))
        first, length = FIELDS[field]
        if field == "size":
            value = draw.choice(SIZES)
        elif field == "type":
            value = draw.choice((b"0", b"\0", *(bytes([c]) for c in b"1234567xgLKSDX\xff"), b"Z"))
        elif field in ("name", "prefix", "link"):
            value = draw.choice((*NAMES, draw.randbytes(length)))
        else:
            value = draw.randbytes(length)
        data[start + first : start + first + length] = value.ljust(length, b"\0")[:length]
        if draw.random() < 0.85:
            data[start + 148 : start + 156] = b" " * 8
            total = sum(data[start : start + BLOCK])
            data[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(data)


def make_json(draw):
    """A JSON text near what captions look like."""

    def value(depth):
        kind = draw.randrange(9 if depth < 4 else 6)
        if kind < 2:
            return draw.choice(
                ("a hen", "", " ", "\ud800", "x" * 5000, "\0", "\u2028", "é\U0001f414")
            )
        if kind == 2:
            return draw.choice((None, True, 1, -1.5, 1e400, float("nan"), 10**40))
        if kind < 6:
            return "a bird"
        if kind == 6:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        names = ("caption", "a", "caption.a", "", "\ud800")
        return {draw.choice(names): value(depth + 1) for _ in range(draw.randrange(4))}

    record = {"caption": value(0), "a": {"caption": value(1)}}
    text = json.dumps(record if draw.random() < 0.9 else value(0)).encode()
    if draw.random() < 0.05:
        text = draw.choice((b"[", b'{"caption":')) * draw.choice((10, 2000, 100_000))
    return break_bytes(draw, text) if draw.random() < 0.5 else text


def break_side_car(draw, data):
    """Break the bytes of a side-car, or write a whole one of broken arrays."""
    if draw.random() < 0.3:
        return break_bytes(draw, data)
    with np.load(io.BytesIO(data)) as arrays:
        content = {name: arrays[name].copy() for name in arrays.files}
    header = content["header"]
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(tuple(content))
        array = content[name]
        kind = draw.randrange(8)
        if name == "header" and kind < 5:
            content[name] = np.frombuffer(_break_header_of(draw, header), dtype=np.uint8)
        elif kind < 3 and array.size and array.dtype in (np.uint8, np.int64):
            values = (
                (0, 1, 7, 255) if array.dtype == np.uint8 else (-1, 0, 1, 99, 1 << 40, -(1 << 62))
            )
            array.reshape(-1)[draw.randrange(array.size)] = draw.choice(values)
        elif kind == 3:
            content[name] = array[..., : draw.randrange(array.shape[-1] + 1)]
        elif kind == 4:
            content[name] = array[:-1]
        elif kind == 5:
            types = (np.int32, np.float64, np.uint8, np.int64, np.complex128, "S4", "M8[s]")
            content[name] = np.zeros(array.shape, draw.choice(types))
        elif kind == 6:
            content[name] = draw.choice((array.reshape(-1), array[None], np.array([7]), array[:0]))
        else:
            del content[name]
        if not content:
            break
    buffer = io.BytesIO()
    (np.savez_compressed if draw.random() < 0.1 else np.savez)(buffer, **content)
    written = buffer.getvalue()
    return _claim(draw, written) if draw.random() < 0.1 else written


def _break_header_of(draw, array):
    """Change the JSON header of a side-car."""
    header = json.loads(array.tobytes())
    name = draw.choice(tuple(header))
    if draw.random() < 0.3:
        del header[name]
    else:
        header[name] = draw.choice((None, -1, 0, 3, 5, 1 << 60, "x", [], ["png"], {}, 1.5, [[1]]))
    text = json.dumps(header).encode()
    return break_bytes(draw, text) if draw.random() < 0.2 else text


def _claim(draw, data):
    """Let an array say that it has another shape or type than it has."""
    shapes = ("(99999999999,)", "(4, -1)", "(1" + ", 1" * 40 + ")", "(2, 2)")
    types = ("|O", "<i8", "<U9999999", "V99999999", [["a", "<i8"]])
    text = repr({"descr": draw.choice(types), "fortran_order": False}).encode()[:-1]
    text += b", 'shape': " + draw.choice(shapes).encode() + b"}"
    header = text.ljust(118)[:-1] + b"\n" if len(text) < 118 else text + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + draw.randbytes(64)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as archive:
        for entry in source.infolist():
            is_chosen = draw.random() < 0.5
            archive.writestr(entry.filename, array if is_chosen else source.read(entry.filename))
    return out.getvalue()


def make_location(draw, shard):
    """A text near a path, a pattern or a URL."""
    folder = shard.rpartition("/")[0]
    parts = (
        *("{", "}", ",", "..", "::", "0", "9", "00", "a", "z", "\\", "/", ".", "-", ":", "|"),
        *("{0..9}", "{a..z}", "{00..99..3}", "{a,b}", "{0..99999999}", "{,,,,{a}}", "9" * 30),
        *("pipe:", "file:", "http://", "https://", "s3://", "gs://", "hf://", "zip://", "host"),
        *("~", "${HOME}", "$HOME", "\0", "\n", "\r", "[", "]", "[::1]", "@", "?", "#", "%2e", "%"),
        *("é", "\ud800", "\u2028", " ", "a.tar", "../", "x" * 300, folder, f"{folder}/", shard),
    )
    if draw.random() < 0.5:
        return "".join(draw.choice(parts) for _ in range(draw.randrange(1, 9)))
    text = draw.choice(
        (
            shard,
            f"{folder}/{{a,b}}.tar",
            "s3://b/{0..3}.tar",
            "http://h/{a..c}.tar?x=1",
            "hf://a/b/c.tar",
        )
    )
    for _ in range(draw.randrange(3)):
        place = draw.randrange(len(text) + 1)
        text = text[:place] + draw.choice(parts) + text[place + draw.randrange(2) :]
    return text
