"""Sound files of many kinds, to be broken."""

import io
import tarfile
from functools import cache

from tests.support.hostile import EXTENSIONS, good_members, tar_of
from tests.support.shards import encode, photo, picture


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
        "WEBP": [encode(photo(40, 32), "WEBP"), encode(picture(2), "WEBP"), frames.getvalue()],
    }
