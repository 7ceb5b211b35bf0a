"""Small copies of the pictures of a folder, read from the shards it was made of and no other file.

A picture is named by the number of its row; where its bytes lie, the headers of the shards say. It
is decoded by the policy of the model and written anew, so that nothing but pixels gets out.
"""

import io
import threading
from collections import OrderedDict

from PIL import Image

from dist_siglip.data.index.pairs import PairTable, build_pair_table
from dist_siglip.data.remote import CacheSettings, ShardCache
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.picture import REDUCTIONS, EncodedPicture
from dist_siglip.data.samples.picture_policy import PICTURE_EXTENSIONS, PicturePolicy
from dist_siglip.data.urls import expand_shards
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.stored_rows import StoredRows, words_of

SIDE = 448  # longest of a copy, in pixels
_EXACT_BELOW = 128  # pictures of so few pixels a side are kept without loss
_KEPT = 512  # copies in memory
_DECODED_AT_ONCE = 2


class ShardPictures:
    """Copies of the pictures of rows; threads may share one.

    Args:
        rows: of the folder.
        policy: how they are decoded.
        shards: where the shards are now, as ``embed`` takes them; None where the folder says.
        cache: copies of remote shards.

    Raises:
        UserError: if shards are missing, or not those of the folder.
    """

    def __init__(
        self,
        rows: StoredRows,
        policy: PicturePolicy,
        *,
        shards: str | list[str] | None,
        cache: CacheSettings,
    ) -> None:
        self._rows, self._policy = rows, policy
        self._table = _table_of(rows, shards, cache)
        self._reader = ShardReader(self._table.cache)
        self._reading = threading.Lock()
        self._decoding = threading.Semaphore(_DECODED_AT_ONCE)
        self._kept: OrderedDict[int, tuple[str, bytes]] = OrderedDict()

    def copy(self, row: int) -> tuple[str, bytes]:
        """Return media type and bytes of a small copy.

        Raises:
            UserError: if there is no such row.
            BadSampleError: if the picture cannot be read or decoded any more.
        """
        if not 0 <= row < len(self._rows):
            raise UserError(f"row ({row}) must be 0 to {len(self._rows) - 1}")
        with self._reading:
            if row in self._kept:
                self._kept.move_to_end(row)
                return self._kept[row]
            place = self._rows.place(row)
            counts = self._table.counts
            if (
                place.shard_number >= len(counts)
                or not 0 <= place.place < counts[place.shard_number]
            ):
                raise BadSampleError("metadata name a sample that the shard does not hold")
            sample_id = int(self._table.starts[place.shard_number]) + place.place
            data = self._reader.read(self._table.image_span(sample_id))
        with self._decoding:
            made = small_copy(EncodedPicture(data, self._policy))
        with self._reading:
            self._kept[row] = made
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made


def small_copy(picture: EncodedPicture) -> tuple[str, bytes]:
    """Decode a picture and write it again, at most 448 pixels a side; small ones without loss."""
    longest = max(picture.size)
    reduction = next(each for each in REDUCTIONS if longest // each >= SIDE or each == 1)
    image = picture.decode(reduction)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    plain = Image.new("RGB", image.size)  # without metadata
    plain.paste(image)
    buffer = io.BytesIO()
    if longest <= _EXACT_BELOW:
        plain.save(buffer, "PNG")
        return "image/png", buffer.getvalue()
    plain.save(buffer, "JPEG", quality=88)
    return "image/jpeg", buffer.getvalue()


def _table_of(rows: StoredRows, shards: str | list[str] | None, cache: CacheSettings) -> PairTable:
    """Index the shards, and compare them with those of the folder."""
    try:
        table = build_pair_table(
            expand_shards(rows.shards if shards is None else shards),
            image_extensions=words_of(rows.source, "image_extensions", PICTURE_EXTENSIONS),
            caption_extensions=words_of(rows.manifest, "caption_members"),
            on_damage="skip",
            max_bad_fraction=1.0,
            cache=ShardCache(cache),
        )
    except UserError as error:
        raise UserError(f"{error}; say where the pictures are now with --shards") from error
    if table.fingerprint != rows.manifest.get("shards"):
        raise UserError(
            f"shards are not those that index ({rows.folder}) was made of: name these with "
            "--shards, or embed anew"
        )
    return table


__all__ = ["ShardPictures", "small_copy"]
