"""Broken and malicious bytes, and a child process in which they cannot hurt the tests."""

import io
import multiprocessing
import pickle
import resource
import signal
import struct
import tarfile
import traceback
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import features

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.samples.picture_policy import EXTENSIONS_OF, PicturePolicy
from tests.support.shards import caption, encode, picture

KEYS = ("k0", "k1", "k2", "k3")
MAX_PIXELS = 1_000_000
POLICY = PicturePolicy(max_image_pixels=MAX_PIXELS)
_READABLE = [name for name in EXTENSIONS_OF if name != "heic"]
EVERY_FORMAT = PicturePolicy(
    max_image_pixels=MAX_PIXELS,
    formats=tuple(name for name in _READABLE if name != "avif" or features.check("avif")),
)
EXTENSIONS = ("jpg", "png", "webp")
# Below the folder of a test; besides, everything in the user's cache folder of this package.
ALLOWED = {"data/a.tar", "data/a.tar.idx.npz", "work/bad.jsonl"}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def pickle_that_makes(path) -> bytes:
    return pickle.dumps(Payload(path))


def good_members() -> list[tuple[str, bytes]]:
    """Members of four sound samples."""
    return [
        member
        for i, key in enumerate(KEYS)
        for member in (
            (f"{key}.png", encode(picture(i))),
            (f"{key}.txt", caption(i).encode()),
        )
    ]


def tar_of(members, kind=tarfile.USTAR_FORMAT) -> bytes:
    """A tar of (name, bytes), or (``TarInfo``, bytes) for members that are no files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in members:
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


GOOD = tar_of(good_members())


def listing(root):
    """Everything but folders, and but what lies in the cache folder of the user."""
    files = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    return {file for file in files if not file.startswith("home/.cache/dist_siglip/")}


def put(root, data):
    (root / "data" / "a.tar").write_bytes(data)
    return [str(root / "data" / "a.tar")]


def open_table(shards, **options):
    return build_pair_table(shards, image_extensions=EXTENSIONS, **options)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animated():
    return saved(picture(9), "WEBP", save_all=True, append_images=[picture(8)], lossless=True)


def replaced(**parts: bytes) -> list[tuple[str, bytes]]:
    """Four samples, members of the second one replaced: ``png=`` and ``txt=`` by extension."""
    members = [member for member in good_members() if member[0].rpartition(".")[2] not in parts]
    kept = [member for member in good_members() if member not in members and "k1." not in member[0]]
    return members + kept + [(f"k1.{kind}", data) for kind, data in parts.items()]


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    """A member that is a link."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry, b""


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG with the right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *between: bytes, pixels: bytes = b"") -> bytes:
    """A PNG of 8-bit RGB from its parts; ``pixels`` is what is compressed."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", pixels and zlib.compress(pixels, 9))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(between)
        + body
        + chunk(b"IEND", b"")
    )


def jpeg_of_claimed_size(width: int, height: int) -> bytes:
    """A JPEG of 20 x 20 pixels that says it is larger."""
    data = encode(picture(0), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """A GIF without pixels that claims the size of its screen and of its first frame."""
    # The frame says that it is to be cleared, for which a reader may want memory at once.
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0, 0, 0) + b"!\xf9\x04\x08\0\0\0\0"
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x08\0;"


def tiff(
    width: int,
    height: int,
    tile: tuple[int, int] | None = None,
    more: Sequence[tuple[int, int, int, int]] = (),
) -> bytes:
    """A TIFF of 8-bit grey whose pixels are a few deflated bytes; in tiles of some size.

    ``more`` tags are (tag, type, number of values, place or value).
    """
    data = zlib.compress(bytes(64))
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)]
    if tile is None:
        tags += [(273, 8), (278, height), (279, len(data))]
    else:
        tags += [(322, tile[0]), (323, tile[1]), (324, 8), (325, len(data))]
    entries = sorted([(tag, 4, 1, value) for tag, value in tags] + list(more))
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    start = 8 + len(data)
    return b"II*\0" + struct.pack("<I", start) + data + directory + bytes(4)


def run_length_bmp(width: int, height: int) -> bytes:
    """A BMP that is empty lines, each of two bytes."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    palette = bytes(each for i in range(256) for each in (i, 0, 0, 0))
    start = 14 + len(header) + len(palette)
    lines = b"\x01\x07\x00\x00" * height + b"\x00\x01"
    return struct.pack("<2sIHHI", b"BM", start + len(lines), 0, 0, start) + header + palette + lines


class ChildError(AssertionError):
    """A child ended otherwise than it should."""


def in_child(
    work: Callable[..., Any], *arguments: Any, seconds: float = 300, more_bytes: int | None = None
) -> Any:
    """Call a function in a forked child and return its result.

    Args:
        work: its result must be picklable.
        arguments: of the function.
        seconds: time limit; the child is killed then.
        more_bytes: address space it may take besides what is mapped already.

    Raises:
        ChildError: if it raises, is killed, crashes or hangs.
    """
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_enter, args=(theirs, work, arguments, more_bytes), daemon=True)
    child.start()
    theirs.close()
    try:
        if not mine.poll(seconds):
            raise ChildError(f"no result after {seconds} s")
        is_fine, result = mine.recv()
    except EOFError:
        child.join(60)
        code = child.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ChildError(f"the child ended with {name}") from None
    finally:
        child.kill()
        child.join()
        mine.close()
    if not is_fine:
        raise ChildError(result)
    return result


def _enter(pipe, work, arguments, more_bytes) -> None:
    try:
        if more_bytes is not None:
            with open("/proc/self/statm", encoding="ascii") as file:
                mapped = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + more_bytes,) * 2)
        pipe.send((True, work(*arguments)))
    except BaseException:  # noqa: BLE001 - everything goes home
        pipe.send((False, traceback.format_exc()))
