"""PNGs of every kind that a file can have, written by hand: Pillow writes only some of them."""

import zlib

import numpy as np

from tests.support.hostile import chunk

# Colour type of PNG -> its channels.
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
SIDE = 8


def png_of(kind, bits, values, *chunks):
    """A PNG of (rows, columns, channels) values, written by hand."""
    rows, columns, channels = values.shape
    assert channels == CHANNELS[kind]
    lines = []
    for row in values.reshape(rows, -1):
        if bits == 16:
            packed = row.astype(">u2").tobytes()
        elif bits == 8:
            packed = row.astype(np.uint8).tobytes()
        else:
            digits = "".join(f"{value:0{bits}b}" for value in row)
            digits += "0" * (-len(digits) % 8)
            packed = int(digits, 2).to_bytes(len(digits) // 8, "big")
        lines.append(b"\0" + packed)
    header = columns.to_bytes(4, "big") + rows.to_bytes(4, "big") + bytes([bits, kind, 0, 0, 0])
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(b"".join(lines)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def halves(left, right):
    """Values whose columns are one thing on the left and another on the right."""
    left, right = np.atleast_1d(left), np.atleast_1d(right)
    values = np.empty((SIDE, SIDE, len(left)), dtype=np.int64)
    values[:, : SIDE // 2], values[:, SIDE // 2 :] = left, right
    return values


def numbers(*values):
    return b"".join(value.to_bytes(2, "big") for value in values)
