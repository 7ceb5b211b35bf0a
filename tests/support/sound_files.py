"""Sound files of many kinds, to be broken."""

import io
import tarfile
from functools import cache

import pyarrow
from PIL import features
from pyarrow import parquet

from tests.support.hostile import EXTENSIONS, good_members, run_length_bmp, saved, tar_of
from tests.support.shards import encode, photo, picture

PARQUET = (
    {},
    {"compression": "none", "use_dictionary": False},
    {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 2},
    {"compression": "gzip", "use_dictionary": False, "data_page_size": 500},
    {"use_dictionary": False, "column_encoding": {"json": "DELTA_LENGTH_BYTE_ARRAY"}},
)


def _parquet(options, draw=picture):
    """Write pictures, texts and records, some of them missing."""
    rows = [
        {"image": {"bytes": encode(draw(i), "JPEG"), "path": f"{i}.jpg"}, "txt": "a hen"}
        | {"caption": ["a hen", None, "a bird"], "json": None, "n": i}
        for i in range(4)
    ]
    rows[1]["json"] = '{"caption": ["a hen", "a bird"]}'
    rows[2]["image"] = rows[3]["caption"] = None
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


@cache
def sources():
    """Sound files to break, made once."""
    members = [
        (f"k{i}", {EXTENSIONS[i % 3]: encode(picture(i), kind), "txt": b"a hen"})
        for i, kind in enumerate(("JPEG", "PNG", "WEBP", "PNG"))
    ]
    members[1][1]["json"] = b'{"caption": ["a hen", "a bird"]}'
    long = [("a/" * 90 + name, data) for name, data in good_members()]
    palette = picture(3, side=40).convert("P")
    frames = io.BytesIO()
    picture(1).save(frames, "WEBP", save_all=True, append_images=[picture(2)])
    progressive = io.BytesIO()
    photo(48, 40).save(progressive, "JPEG", progressive=True, subsampling=2)
    return {
        "members": members,
        "plain": tar_of(good_members()),
        "gnu": tar_of(long, tarfile.GNU_FORMAT),
        "pax": tar_of(long, tarfile.PAX_FORMAT),
        "parquet": [
            *(_parquet(options) for options in PARQUET),
            _parquet({}, lambda i: photo(480, 360, i)),  # two fragments of snappy
        ],
        "JPEG": [
            encode(photo(64, 48), "JPEG"),
            encode(picture(2).convert("CMYK"), "JPEG"),
            encode(picture(2).convert("L"), "JPEG"),
            progressive.getvalue(),
        ],
        "PNG": [
            encode(photo(40, 32)),
            encode(palette),
            encode(palette.convert("RGBA")),
            encode(picture(5).convert("I;16")),
            encode(picture(5).convert("1")),
        ],
        "GIF": [
            saved(photo(40, 32), "GIF"),
            saved(picture(1), "GIF", save_all=True, append_images=[picture(2)], disposal=2),
        ],
        "TIFF": [
            saved(photo(40, 32), "TIFF"),
            saved(photo(40, 32), "TIFF", compression="tiff_lzw"),
            saved(photo(40, 32), "TIFF", compression="jpeg"),
            saved(picture(5).convert("I;16"), "TIFF", compression="tiff_adobe_deflate"),
            saved(picture(5).convert("F"), "TIFF"),
            saved(picture(5).convert("1"), "TIFF", compression="group4"),
            saved(palette, "TIFF"),
        ],
        "BMP": [saved(photo(40, 32), "BMP"), saved(palette, "BMP"), run_length_bmp(40, 32)],
        "AVIF": [saved(photo(40, 32), "AVIF")] if features.check("avif") else [],
        "WEBP": [encode(photo(40, 32), "WEBP"), encode(picture(2), "WEBP"), frames.getvalue()],
    }
