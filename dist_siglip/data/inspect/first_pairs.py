"""Can training read from these shards? One pair of each of the first ones tells.

Everything happens as in training: index, bytes, picture, caption; of one sample instead of all.
"""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from dist_siglip.data.index.pairs import build_pair_table
from dist_siglip.data.index.side_car import side_car_places
from dist_siglip.data.remote import RemoteError, ShardCache, is_remote
from dist_siglip.data.remote.locations import redact, shard_name
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.fetch import ShardReader
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.errors import UserError


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
    had_side_car = is_remote(shard) or any(map(os.path.exists, side_car_places(shard)))
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
