"""Ways to break a picture inside its container, so that the decoders see more than a bad header."""

import struct
import zlib

from tests.support.mutations import NUMBERS, break_bytes


def _chunks_of_png(data):
    place, chunks = 8, []
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append([data[place + 4 : place + 8], data[place + 8 : place + 8 + length]])
        place += length + 12
    return chunks


def break_png(draw, data):
    """Change chunks; most get the checksum that then is right."""
    chunks = _chunks_of_png(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        place = draw.randrange(len(chunks))
        kind = draw.randrange(7)
        if kind == 0:
            chunks[place][1] = break_bytes(draw, chunks[place][1])
        elif kind == 1:
            chunks.insert(place, list(draw.choice(chunks)))
        elif kind == 2 and len(chunks) > 1:
            del chunks[place]
        elif kind == 3:
            name = draw.choice((b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE"))
            body = draw.choice((draw.randbytes(30), b"a\0\0" + zlib.compress(bytes(9000))))
            chunks.insert(1, [name, body])
        elif kind == 4:
            name = draw.choice((b"acTL", b"fcTL", b"fdAT", b"pHYs", b"gAMA", b"sBIT", b"tIME"))
            chunks.insert(1, [name, draw.randbytes(draw.choice((0, 4, 8, 26, 30)))])
        elif kind == 5:
            numbers = [draw.choice((0, 1, 20, 300, 2000, 60_000, 1 << 31)) for _ in range(2)]
            depths = draw.choice((1, 2, 4, 8, 16, 3)), draw.choice((0, 2, 3, 4, 6, 7))
            flags = draw.choice((0, 1)), draw.choice((0, 1)), draw.choice((0, 1, 9))
            chunks[0] = [b"IHDR", struct.pack(">IIBBBBB", *numbers, *depths, *flags)]
        else:
            draw.shuffle(chunks)
    out = data[:8]
    for name, body in chunks:
        checksum = zlib.crc32(name + body) if draw.random() < 0.9 else draw.getrandbits(32)
        length = len(body) if draw.random() < 0.95 else draw.choice(NUMBERS) & 0xFFFFFFFF
        out += struct.pack(">I", length) + name + body + struct.pack(">I", checksum)
    return out


def break_jpeg(draw, data):
    """Change, drop, repeat or add segments before the scan, or the scan itself."""
    place, segments = 2, []
    while data[place + 1] != 0xDA:
        (length,) = struct.unpack(">H", data[place + 2 : place + 4])
        segments.append([data[place + 1], data[place + 4 : place + 2 + length]])
        place += 2 + length
    scan = data[place:]
    for _ in range(draw.choice((1, 1, 2, 3))):
        chosen = draw.randrange(len(segments))
        kind = draw.randrange(7)
        if kind == 0:
            segments[chosen][1] = break_bytes(draw, segments[chosen][1])
        elif kind == 1:
            segments.insert(chosen, list(draw.choice(segments)))
        elif kind == 2 and len(segments) > 1:
            del segments[chosen]
        elif kind == 3:
            marker = draw.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDD, 0xC4, 0xDB, 0xC2, 0xC9))
            head = draw.choice(
                (b"", b"Exif\0\0MM\0*\0\0\0\x08", b"ICC_PROFILE\0\x01\x02", b"MPF\0")
            )
            segments.insert(chosen, [marker, head + draw.randbytes(draw.randrange(60))])
        elif kind == 4:
            for segment in segments:
                if 0xC0 <= segment[0] <= 0xC2:
                    sides = [draw.choice((0, 1, 8, 20, 300, 2000, 65_535)) for _ in range(2)]
                    segment[1] = segment[1][:1] + struct.pack(">HH", *sides) + segment[1][5:]
        elif kind == 5:
            segments[chosen][0] = draw.randrange(0xC0, 0xFF)
        else:
            scan = break_bytes(draw, scan)
    out = data[:2]
    for marker, body in segments:
        length = len(body) + 2 if draw.random() < 0.95 else draw.choice(NUMBERS)
        out += bytes([0xFF, marker]) + struct.pack(">H", length & 0xFFFF) + body
    return out + scan


def break_webp(draw, data):
    """Change the chunks of a RIFF file."""
    place, chunks = 12, []
    while place + 8 <= len(data):
        (length,) = struct.unpack("<I", data[place + 4 : place + 8])
        chunks.append([data[place : place + 4], data[place + 8 : place + 8 + length]])
        place += 8 + length + length % 2
    for _ in range(draw.choice((1, 1, 2))):
        chosen = draw.randrange(len(chunks))
        kind = draw.randrange(5)
        if kind == 0:
            chunks[chosen][1] = break_bytes(draw, chunks[chosen][1])
        elif kind == 1:
            chunks.insert(chosen, list(draw.choice(chunks)))
        elif kind == 2:
            sides = [struct.pack("<I", draw.choice((0, 19, 1999, (1 << 24) - 1)))[:3] for _ in "wh"]
            chunks.insert(0, [b"VP8X", bytes([draw.randrange(256), 0, 0, 0]) + b"".join(sides)])
        elif kind == 3:
            name = draw.choice(
                (b"ANIM", b"ANMF", b"ALPH", b"EXIF", b"ICCP", b"XMP ", b"VP8 ", b"VP8L")
            )
            chunks.insert(chosen, [name, draw.randbytes(draw.randrange(40))])
        else:
            draw.shuffle(chunks)
    out = b""
    for name, body in chunks:
        length = len(body) if draw.random() < 0.9 else draw.choice(NUMBERS) & 0xFFFFFFFF
        out += name + struct.pack("<I", length) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(out) + 4) + b"WEBP" + out
