"""Checks of shards before training, and statistics of their pictures and captions.

Samples are read, pictures decoded and captions parsed the way training does it; member names are
looked at besides. Nothing is extracted.
"""

import os
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.index.pairs import PairTable, Span, build_pair_table
from dist_siglip.data.index.read import read_index, side_car_places
from dist_siglip.data.index.shard_index import explain_dots, split_name
from dist_siglip.data.index.tar_scan import TarEntries, describe_entry
from dist_siglip.data.parquet.scan import Wanted
from dist_siglip.data.remote import RemoteError, ShardCache, is_remote
from dist_siglip.data.remote.locations import is_parquet, is_table, redact, shard_name
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import EMPTY_CAPTION, CaptionRule, EmptyCaptions, Tokenizer
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.identity import caption_id, caption_ids_of, picture_id
from dist_siglip.data.samples.picture import EncodedPicture, sniff_media_type
from dist_siglip.data.samples.picture_policy import EXTENSIONS_OF, PicturePolicy
from dist_siglip.errors import OutageError, UserError
from dist_siglip.system.regular_file import descriptor_of

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
UNREACHABLE = "unreachable shard"
# Kind of finding -> what training does about it.
KINDS = {
    "damaged shard": "refused, or skipped from the damage on",
    UNREACHABLE: "waited for; a run that gets no answer ends with code 75",
    "unusual shard": "used",
    "no picture": "refused, or the sample is skipped",
    "no caption": "refused, or the sample is skipped",
    "bad picture": "replaced by another sample",
    "bad caption": "replaced by another sample",
    "key in several shards": "used, each for itself",
    "truncated picture": "used as far as it goes, as you asked",
    "transparent picture": "laid on data.transparency, white unless you say another colour",
    "extension of another format": "used as what it is",
    "path outside": "never written anywhere",
    "link or device": "ignored",
    "code": "ignored, never loaded",
}
# What a data set can be trained on with.
HARMLESS = frozenset(
    {
        "unusual shard",
        "key in several shards",
        "truncated picture",
        "transparent picture",
        "extension of another format",
        "path outside",
        "link or device",
        "code",
    }
)
_SHOWN = 8  # members of a sample in a reason
_CODE = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "npy", "so", "py", "joblib"})
_MEDIA = {each: f"image/{name}" for name, found in EXTENSIONS_OF.items() for each in found}


class Measured(NamedTuple):
    """Samples that could be read, row by row.

    Attributes:
        numbers: (samples, 4) float64: width and height in pixels, bytes of the picture, characters
            of the caption.
        formats: media type of each picture.
        caption_ids: (samples,) int64, equal for equal captions: texts, or tokens.
        picture_ids: (samples,) int64, equal for equal bytes.
        num_bad: samples that could not be used.
        num_empty: those of them whose caption is empty.
        num_transparent: pictures that say that they have transparent pixels.
    """

    numbers: NDArray[np.float64]
    formats: list[str]
    caption_ids: NDArray[np.int64]
    picture_ids: NDArray[np.int64]
    num_bad: int
    num_empty: int = 0
    num_transparent: int = 0


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """Measures samples of a table; only headers of pictures are decoded.

    Args:
        table: where the members are.
        captions: which caption counts; of several, the first.
        pictures: what decides the size of an encoded picture, and how large one may be.
        tokenizer: captions of equal tokens are equal, and those without a token empty; None
            compares texts.
    """

    table: PairTable
    captions: CaptionRule
    pictures: PicturePolicy
    tokenizer: Tokenizer | None = None

    def __call__(self, sample_ids: Sequence[int]) -> Measured:
        """Measure samples, by id."""
        first = self.captions.always_first()
        reader = ShardReader(self.table.cache, fields=self.captions.json_fields)
        is_empty = EmptyCaptions(self.tokenizer)
        numbers, formats, pictures, num_bad = [], [], [], 0
        captions: list[str] = []
        num_empty = num_transparent = 0
        for sample_id in sample_ids:
            try:
                data = reader.read(self.table.image_span(sample_id))
                encoded = EncodedPicture(data, self.pictures)
                media = sniff_media_type(data)
                spans = self.table.caption_spans(sample_id)
                members = ((kind, reader.read(span)) for kind, span in spans)
                text = first.choose(members, (0,), is_empty=is_empty)
            except BadSampleError as error:
                num_bad += 1
                num_empty += str(error) == EMPTY_CAPTION
                continue
            numbers.append((*encoded.size, len(data), len(text)))
            num_transparent += encoded.has_transparency
            formats.append(media.removeprefix("image/"))
            captions.append(text)
            pictures.append(picture_id(data))
        reader.close()
        return Measured(
            np.array(numbers, dtype=np.float64).reshape(-1, 4),
            formats,
            np.array(self._identify(captions), dtype=np.int64),
            np.array(pictures, dtype=np.int64),
            num_bad,
            num_empty,
            num_transparent,
        )

    def _identify(self, captions: list[str]) -> list[int]:
        if self.tokenizer is None or not captions:
            return [caption_id(text) for text in captions]
        tokens = self.tokenizer(captions).long()
        return caption_ids_of(self.tokenizer, captions, tokens).tolist()


def choose_samples(num_samples: int, most: int | None, seed: int) -> NDArray[np.int64]:
    """Choose at most so many samples, evenly at random, in their order.

    Example:
        >>> choose_samples(5, None, 0).tolist(), len(choose_samples(1000, 10, 0))
        ([0, 1, 2, 3, 4], 10)
    """
    if most is None or most >= num_samples:
        return np.arange(num_samples)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    return np.sort(generator.choice(num_samples, most, replace=False))


def summarize(parts: Sequence[Measured]) -> dict[str, object]:
    """Join measurements into plain values for a table or JSON.

    Returns:
        samples, bad, and empty_captions among those; transparent; quantiles (see ``QUANTILES``) of
        width, height, short_side, aspect_ratio (width / height), picture_bytes,
        caption_characters; formats; and of captions and pictures how many are distinct, how many
        samples share theirs with another, and how many have the most common one.
    """
    numbers = np.concatenate([part.numbers for part in parts] or [np.zeros((0, 4))])
    width, height, size, characters = numbers.T
    columns = {
        "width": width,
        "height": height,
        "short_side": np.minimum(width, height),
        "aspect_ratio": width / height,
        "picture_bytes": size,
        "caption_characters": characters,
    }
    kinds, counts = np.unique([f for part in parts for f in part.formats], return_counts=True)
    return {
        "samples": len(numbers),
        "bad": sum(part.num_bad for part in parts),
        "empty_captions": sum(part.num_empty for part in parts),
        "transparent": sum(part.num_transparent for part in parts),
        "quantiles": {
            name: np.quantile(values, QUANTILES).tolist() if len(values) else []
            for name, values in columns.items()
        },
        "formats": dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
        "captions": _sharing(parts, "caption_ids"),
        "pictures": _sharing(parts, "picture_ids"),
    }


def _sharing(parts: Sequence[Measured], field: str) -> dict[str, int]:
    ids = np.concatenate([getattr(part, field) for part in parts] or [np.zeros(0, np.int64)])
    _, counts = np.unique(ids, return_counts=True)
    return {
        "distinct": len(counts),
        "shared": int(counts[counts > 1].sum()),
        "most": int(counts.max(initial=0)),
    }


class Finding(NamedTuple):
    """One thing that is wrong: kind (see ``KINDS``), shard, key or member, reason."""

    kind: str
    shard: str
    key: str
    reason: str


class ShardFindings(NamedTuple):
    """What was found in one shard.

    Attributes:
        findings: in the order of the shard.
        num_samples: samples it holds, incomplete ones included.
        key_hashes: (samples,) int64, for finding keys that occur in several shards.
        num_transparent: pictures that say that they have transparent pixels.
    """

    findings: list[Finding]
    num_samples: int
    key_hashes: NDArray[np.int64]
    num_transparent: int = 0


@dataclass(frozen=True, kw_only=True)
class Inspector:
    """How shards are looked at.

    Args:
        image_extensions: members that are the picture of a sample, in order of preference.
        captions: where captions are.
        pictures: what decides the pixels of an encoded picture.
        decode: decode pictures in full; otherwise only their headers are read.
        cache: copies of remote shards.
    """

    image_extensions: tuple[str, ...]
    captions: CaptionRule
    pictures: PicturePolicy
    decode: bool = True
    cache: ShardCache | None = None

    def __call__(self, shard: str) -> ShardFindings:
        """Look at one shard; one that cannot be read is damaged, or for the moment unreachable."""
        try:
            return self._look(shard)
        except OutageError as error:  # the others are looked at
            unreachable = Finding(UNREACHABLE, shard, "", str(error))
            return ShardFindings([unreachable], 0, np.zeros(0, int))

    def _look(self, shard: str) -> ShardFindings:
        try:
            wanted = Wanted(self.image_extensions, self.captions.members)
            index = read_index(shard, cache=self.cache, wanted=wanted)
        except (OSError, UserError) as error:  # of one shard; the others are looked at
            reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
            return ShardFindings([Finding("damaged shard", shard, "", reason)], 0, np.zeros(0, int))
        findings = [Finding("damaged shard", shard, "", index.damage)] if index.damage else []
        hidden = index.hidden_pairs(self.image_extensions, self.captions.members)
        findings += [Finding("unusual shard", shard, "", r) for r in (index.remark, hidden) if r]
        if not is_table(shard) and not is_parquet(shard):
            findings += self._names(shard)
        keys = index.keys()
        members: list[dict[str, Span]] = [{} for _ in keys]
        for sample, kind, offset, size in zip(
            index.samples.tolist(),
            index.kinds.tolist(),
            index.offsets.tolist(),
            index.sizes.tolist(),
            strict=True,
        ):
            members[sample][index.extensions[kind]] = Span(shard, offset, size)
        reader = ShardReader(self.cache, fields=self.captions.json_fields)
        transparent: list[str] = []
        for key, of_sample in zip(keys, members, strict=True):
            findings += self._sample(shard, key, of_sample, reader, transparent, index.pictures)
        reader.close()
        hashes = np.array([caption_id(key) for key in keys], dtype=np.int64)
        return ShardFindings(findings, len(keys), hashes, len(transparent))

    def _sample(
        self,
        shard: str,
        key: str,
        members: dict[str, Span],
        reader: ShardReader,
        transparent: list[str],
        columns: Sequence[str],
    ) -> Iterator[Finding]:
        """Look at one sample; its key joins those of transparent pictures if it has one."""
        wanted = (*self.image_extensions, *columns)
        picture = next((extension for extension in wanted if extension in members), None)
        if picture is None:
            yield Finding("no picture", shard, key, _only(key, members, self.image_extensions))
        else:
            try:
                data = reader.read(members[picture])
                encoded = EncodedPicture(data, self.pictures)
                if self.decode:
                    encoded.decode()
                if encoded.is_truncated:
                    yield Finding("truncated picture", shard, key, "its file ends too early")
                if encoded.has_transparency:
                    transparent.append(key)
                media = sniff_media_type(data)
                if _MEDIA.get(picture, media) != media:
                    reason = f".{picture} holds {media}"
                    yield Finding("extension of another format", shard, key, reason)
            except BadSampleError as error:
                yield Finding("bad picture", shard, key, str(error))
        texts = [extension for extension in self.captions.members if extension in members]
        if not texts:
            yield Finding("no caption", shard, key, _only(key, members, self.captions.members))
            return
        try:
            self.captions.choose([(e, reader.read(members[e])) for e in texts], (0,))
        except BadSampleError as error:
            yield Finding("bad caption", shard, key, str(error))

    def _names(self, shard: str) -> Iterator[Finding]:
        """Look at the names and types of all members, those that training never sees too."""
        path = self.cache.fetch(shard) if is_remote(shard) and self.cache else shard
        descriptor = descriptor_of(path)
        try:
            for entry in TarEntries(descriptor):
                name = entry.name
                if name.startswith("/") or ".." in name.split("/"):
                    yield Finding("path outside", shard, name, "leads out of the archive")
                if not (entry.isreg() or entry.isdir()) or entry.issparse():
                    reason = f"no plain file, but {describe_entry(entry)}"
                    yield Finding("link or device", shard, name, reason)
                parts = split_name(name)
                if parts and _CODE & set(parts[1].split(".")):
                    yield Finding("code", shard, name, "of a format that can hold code")
        except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError):
            return  # the index says what is damaged
        finally:
            os.close(descriptor)


def _only(key: str, members: Iterable[str], wanted: Sequence[str]) -> str:
    """Say what a sample has instead of what is wanted, and why that may be."""
    present = sorted(members)
    hint = explain_dots(key, present, wanted)
    shown = ", ".join(present[:_SHOWN]) + (", ..." if len(present) > _SHOWN else "")
    return f"only {shown}" + (f" ({hint})" if hint else "")


def keys_in_several_shards(found: dict[str, NDArray[np.int64]]) -> int:
    """Count keys that occur in more than one shard."""
    hashes = np.concatenate([np.unique(h) for h in found.values()] or [np.zeros(0, np.int64)])
    _, counts = np.unique(hashes, return_counts=True)
    return int((counts > 1).sum())


class FirstPair(NamedTuple):
    """The first pair of a shard.

    Attributes:
        shard: its name, without secrets.
        num_samples: samples of the shard; 0 if it cannot be read.
        fingerprint: of its samples; "" if it cannot be read.
        had_side_car: whether its index was there already; always for a remote shard.
        seconds: to index the shard and read and decode the pair.
        failure: what is wrong; "" if nothing is.
    """

    shard: str
    num_samples: int
    fingerprint: str
    had_side_car: bool
    seconds: float
    failure: str


def read_first_pair(
    shard: str,
    *,
    captions: CaptionRule,
    image_extensions: Sequence[str],
    pictures: PicturePolicy,
    cache: ShardCache | None = None,
) -> FirstPair:
    """Index one shard and decode its first pair.

    Args:
        shard: file or URL.
        captions: where captions are.
        image_extensions: members that are the picture of a sample, in order of preference.
        pictures: what decides the pixels of an encoded picture.
        cache: copies of remote shards.
    """
    had_side_car = (
        is_remote(shard)
        or is_table(shard)
        or is_parquet(shard)
        or any(map(os.path.exists, side_car_places(shard)))
    )
    started = time.perf_counter()
    name, num_samples, fingerprint, failure = redact(shard_name(shard)), 0, "", ""
    reader = ShardReader(cache)
    try:
        table = build_pair_table(
            [shard],
            image_extensions=image_extensions,
            caption_extensions=captions.members,
            cache=cache,
        )
        num_samples, fingerprint = table.num_samples, table.fingerprint
        data = reader.read(table.image_span(0))
        EncodedPicture(data, pictures).decode()
        captions.choose([(kind, reader.read(s)) for kind, s in table.caption_spans(0)], (0,))
    except BadSampleError as error:
        failure = f"its first sample: {error}"
    except (UserError, RemoteError, OSError) as error:
        failure = str(error)
    reader.close()
    seconds = time.perf_counter() - started
    return FirstPair(name, num_samples, fingerprint, had_side_car, seconds, failure)
