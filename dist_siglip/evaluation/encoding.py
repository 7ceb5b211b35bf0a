"""How do texts and pictures become features on all ranks, each encoding its share?

Rank r of R encodes the r-th contiguous part, in equally many batches on every rank: where the rows
do not suffice, the last one is encoded again and dropped. So ranks whose towers are sharded never
wait for each other, and the features do not depend on the number of ranks.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.distributed import gather_rows, resolve_group
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import EvaluatedModel

DEFAULT_BATCH_ROWS = 256


def encode_texts(
    model: EvaluatedModel,
    texts: Sequence[str],
    *,
    batch_rows: int = DEFAULT_BATCH_ROWS,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Encode texts that every rank knows.

    Distributed contract: every rank passes the same texts and gets the features of all; each
    encodes a part of them, then two all-gathers.

    Args:
        model: what encodes.
        texts: N of them, at least one.
        batch_rows: texts that are encoded together.
        group: process group.

    Returns:
        (N, D) float32 rows of length 1, on the device of the model.

    Raises:
        UserError: if there is no text.
    """

    def batch(rows: Sequence[int]) -> Tensor:
        return model.encode_text(model.tokenizer([texts[row] for row in rows]).long())

    return _encode(batch, len(texts), "text", batch_rows, group)


def encode_pictures(
    model: EvaluatedModel,
    pictures: Sequence[Image.Image | EncodedPicture],
    *,
    batch_rows: int = DEFAULT_BATCH_ROWS,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Encode pictures that every rank knows, preprocessed as in an evaluation.

    Distributed contract: as ``encode_texts``.

    Args:
        model: what encodes.
        pictures: N of them, at least one.
        batch_rows: pictures that are encoded together.
        group: process group.

    Returns:
        (N, D) float32 rows of length 1, on the device of the model.

    Raises:
        UserError: if there is no picture.
        BadSampleError: if one cannot be decoded, on the rank that has to.
    """
    transform = evaluation_transform(model.inputs)

    def batch(rows: Sequence[int]) -> Tensor:
        return model.encode_image(torch.stack([transform(pictures[row]) for row in rows]))

    return _encode(batch, len(pictures), "picture", batch_rows, group)


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return rank and number of ranks of a group; (0, 1) without any.

    Example:
        >>> rank_and_size(None)
        (0, 1)
    """
    group = resolve_group(group)
    return (0, 1) if group is None else (group.rank(), group.size())


def _encode(
    encode_batch: Callable[[Sequence[int]], Tensor],
    count: int,
    what: str,
    batch_rows: int,
    group: ProcessGroup | None,
) -> Tensor:
    """Encode this rank's part of rows 0 to ``count`` and bring all parts together."""
    if count < 1:
        raise UserError(f"there is no {what} to encode; give at least one")
    rank, world_size = rank_and_size(group)
    share = -(-count // world_size)
    first = rank * share
    parts = []
    for start in range(first, first + share, batch_rows):
        rows = [min(row, count - 1) for row in range(start, min(start + batch_rows, first + share))]
        parts.append(encode_batch(rows))
    mine = torch.cat(parts)[: max(0, min(share, count - first))]
    return gather_rows(mine, group)
