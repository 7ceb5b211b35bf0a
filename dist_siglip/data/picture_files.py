"""Parts of picture files that are read without a decoder: sizes, chunks and segments."""

from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DESCRIPTIONS = frozenset({b"iCCP", b"tEXt", b"zTXt", b"iTXt"})  # chunks that no pixel depends on
_SEGMENTS_OF_JPEG = (b"\xff\xc4", b"\xff\xda", b"\xff\xdb", b"\xff\xdd")  # before and between scans


def webp_size(data: bytes) -> tuple[int, int]:
    """Read width and height of a WebP; (1, 1) if its first chunk is none that has them."""
    kind = data[12:16]
    if len(data) < 30:
        return 1, 1
    if kind == b"VP8X":
        return _number(data[24:27]) + 1, _number(data[27:30]) + 1
    if kind == b"VP8L":
        bits = _number(data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return max(1, _number(data[26:28]) & 0x3FFF), max(1, _number(data[28:30]) & 0x3FFF)
    return 1, 1


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def end_of_segments(data: bytes) -> int:
    """Find where a JPEG that ends too early has whole segments: tables, and scans so far."""
    start = max(data.rfind(marker) for marker in _SEGMENTS_OF_JPEG)
    is_whole = start + 4 <= len(data) and start + 2 + _length(data, start) <= len(data)
    return len(data) if is_whole else start


def _length(data: bytes, start: int) -> int:
    return int.from_bytes(data[start + 2 : start + 4], "big")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Go through the chunks of a PNG: type, first byte, byte after the last."""
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8], start, end
        start = end


def has_end(data: bytes) -> bool:
    """Whether a PNG has the chunk that ends it."""
    return any(kind == b"IEND" for kind, _, _ in _chunks(data))


def without_descriptions(data: bytes) -> bytes:
    """Leave profiles and texts out of a PNG: Pillow refuses those that inflate to a MiB."""
    kept = [data[start:end] for kind, start, end in _chunks(data) if kind not in _DESCRIPTIONS]
    return data[: len(PNG_SIGNATURE)] + b"".join(kept)
