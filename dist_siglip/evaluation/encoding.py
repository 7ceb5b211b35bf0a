"""Features of texts, pictures and batches of shards.

Texts and pictures that every rank knows are shared out: rank r of R encodes the r-th contiguous
part, in equally many batches on every rank: where the rows do not suffice, the last one is encoded
again and dropped. So ranks whose towers are sharded never wait for each other, and the features do
not depend on the number of ranks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.cached_features import TOWERS, Tower
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.transforms import Preprocessing, evaluation_transform
from dist_siglip.distributed import gather_rows, resolve_group
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import EvaluatedModel
from dist_siglip.evaluation.samples import ShardBatch
from dist_siglip.metrics.prefixes import check_dim, cut_rows
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.image_tokens import require_image_tokens
from dist_siglip.models.naflex import NaFlexTower

Towers = Literal["both", "image", "text"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
RowType = Literal["float16", "float32", "int8", "binary"]

DEFAULT_BATCH_ROWS = 256
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Of what is on the device; codes are made of whole shards.
_ROW_TYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.float32,
    "binary": torch.float32,
}


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


def own_part(count: int, group: ProcessGroup | None) -> slice:
    """Return this rank's contiguous part of rows that every rank has.

    Example:
        >>> own_part(5, None)
        slice(0, 5, None)
    """
    rank, world_size = rank_and_size(group)
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


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


class EncodedBatches:
    """What has been encoded of batches of shards so far; rows stay on the device of the model.

    A copy to the host after every batch would make the device wait for it.

    Args:
        model: what encodes.
        dtype: of the rows.
        change: made of the rows of length 1 before they get their dtype; None for nothing.
        with_tokens: whether patch tokens are kept, too; on the host, as they are many.
    """

    def __init__(
        self,
        model: EvaluatedModel,
        dtype: torch.dtype = torch.float32,
        change: Callable[[Tensor], Tensor] | None = None,
        *,
        with_tokens: bool = False,
    ) -> None:
        self.sample_ids: list[int] = []
        self.texts: list[list[str]] = []
        self.problems: dict[int, str] = {}
        self.picture_ids: list[int] = []
        self.caption_ids: list[int] = []
        self.image_parts: list[Tensor] = []
        self.text_parts: list[Tensor] = []
        self.token_parts: list[Tensor] = []
        self._with_tokens = with_tokens
        self._model = model
        self._dtype = dtype
        self._change = change

    def add(self, batch: ShardBatch) -> None:
        """Encode a batch: one call of each encoder that it has tensors for."""
        self.sample_ids += batch.sample_ids
        self.texts += batch.texts
        self.problems |= batch.problems
        self.picture_ids += batch.picture_ids
        self.caption_ids += batch.caption_ids
        if batch.images is not None:
            self.image_parts.append(self._made_of(self._encode_image(batch)))
        if batch.tokens is not None:
            rows = self._model.encode_text(batch.tokens)[: sum(map(len, batch.texts))]
            self.text_parts.append(self._made_of(rows))

    def _encode_image(self, batch: ShardBatch) -> Tensor:
        images, count = batch.images, len(batch.sample_ids)
        assert images is not None
        if not self._with_tokens:
            return self._model.encode_image(images)[:count]
        assert self._model.encode_image_tokens is not None
        rows, tokens = self._model.encode_image_tokens(images)
        self.token_parts.append(tokens[:count].to(self._dtype).cpu())
        return rows[:count]

    def _made_of(self, rows: Tensor) -> Tensor:
        return (rows if self._change is None else self._change(rows)).to(self._dtype)


class EncodedRows(NamedTuple):
    """Embeddings of the usable samples of one shard, on the host.

    Attributes:
        sample_ids: of the R rows, ascending.
        image_features: (R, D), rows of length 1, or codes of them; None if that tower is not
            wanted.
        text_features: likewise.
        captions: of the R rows.
        problems: by sample id, why it has no row.
        ids: (R,) int64, of the pictures and of the captions, by tower; of wanted towers alone.
        image_tokens: (R, T, C) patch tokens; None if they are not wanted, or there is no row.
    """

    sample_ids: list[int]
    image_features: NDArray[Any] | None
    text_features: NDArray[Any] | None
    captions: list[str]
    problems: dict[int, str]
    ids: Mapping[Tower, NDArray[np.int64]] = MappingProxyType({})
    image_tokens: NDArray[np.floating] | None = None


class ShardEncoder:
    """The towers of a model on a device, in evaluation mode, for whole data sets.

    Args:
        built: the model; its towers are moved.
        towers: which features are wanted.
        dtype: of the rows.
        device: where the towers run.
        precision: "32-true", or autocast to bfloat16 or float16.
        dim: columns of the rows, at most those of the model; None for all.
        rotation: (D, D), of ``metrics.pca_rotation``, that rows are turned by first; None for none.
        codes: what makes codes of the finite float32 rows of a tower; needed for "int8" and
            "binary".
        tokens: whether patch tokens of the image tower are wanted, too; see
            ``require_equal_tokens``.

    Raises:
        UserError: if ``dim`` is larger than the width of the features.
    """

    def __init__(
        self,
        built: BuiltModel,
        *,
        towers: Towers,
        dtype: RowType,
        device: torch.device,
        precision: Precision,
        dim: int | None = None,
        rotation: Tensor | None = None,
        codes: Mapping[Tower, Callable[[Tensor], Tensor]] = MappingProxyType({}),
        tokens: bool = False,
    ) -> None:
        self._codes = codes
        self._tokens = tokens
        self._model = EvaluatedModel.of(
            built.encoder.to(device).eval(),
            Preprocessing.of(built),
            logit_scale=built.start_scale,
            logit_bias=built.start_bias,
            device=device,
            precision=self._autocast,
        )
        self._wanted: list[Tower] = [each for each in TOWERS if towers in ("both", each)]
        self._embed_dim = built.embed_dim if dim is None else dim
        self._change: Callable[[Tensor], Tensor] | None = None
        if dim is not None or rotation is not None:
            check_dim(self._embed_dim, built.embed_dim)
            self._change = partial(cut_rows, dim=self._embed_dim, rotation=rotation)
        self._row_type = _ROW_TYPES[dtype]
        self._precision = precision

    @torch.inference_mode()
    def encode(self, batches: Iterable[ShardBatch]) -> EncodedRows:
        """Encode the batches of one shard, each of whose samples has one text.

        Raises:
            UserError: if a row is not finite.
        """
        encoded = EncodedBatches(
            self._model, self._row_type, self._change, with_tokens=self._tokens
        )
        for batch in batches:
            encoded.add(batch)
        ids = {"image": encoded.picture_ids, "text": encoded.caption_ids}
        return EncodedRows(
            encoded.sample_ids,
            self._to_host("image", encoded.image_parts),
            self._to_host("text", encoded.text_parts),
            [caption for (caption,) in encoded.texts],
            encoded.problems,
            {tower: np.array(ids[tower], dtype=np.int64) for tower in self._wanted},
            self._tokens_of(encoded.token_parts),
        )

    def _autocast(self) -> AbstractContextManager[None]:
        if self._precision == "32-true":
            return nullcontext()
        return torch.autocast(self._model.device.type, dtype=_AUTOCAST[self._precision])

    def _to_host(self, tower: Tower, parts: list[Tensor]) -> NDArray[Any] | None:
        """Bring the rows of a tower to the host; None if it is not wanted."""
        if tower not in self._wanted:
            return None
        rows = torch.cat(parts) if parts else torch.empty(0, self._embed_dim, dtype=self._row_type)
        self._check_finite(tower, rows)
        return (self._codes[tower](rows) if tower in self._codes else rows).cpu().numpy()

    def _tokens_of(self, parts: list[Tensor]) -> NDArray[np.floating] | None:
        if not parts:
            return None
        tokens = torch.cat(parts)
        self._check_finite("image", tokens)
        return tokens.numpy()

    def _check_finite(self, tower: Tower, rows: Tensor) -> None:
        if not bool(rows.isfinite().all()):
            raise UserError(
                f"the {tower} tower gives numbers that are not finite at precision "
                f"({self._precision}); use 32-true, or look at the weights"
            )


def require_equal_tokens(built: BuiltModel) -> None:
    """Refuse an image tower that gives no patch tokens, or not equally many of each picture.

    Raises:
        UserError: if it is such a tower.
    """
    visual = built.encoder.clip.visual
    require_image_tokens(visual)
    if isinstance(visual, NaFlexTower):
        raise UserError(
            "tokens (true) must be false for a model of pictures of any shape (NaFlex): they have "
            "not equally many patches"
        )


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device of a rank.

    Args:
        name: "auto" takes this rank's GPU, or the CPU where there is none; else what
            ``torch.device`` takes, "cuda" meaning this rank's.
        local_rank: of this process on its node.

    Raises:
        UserError: if there is no such device.

    Example:
        >>> choose_device("cpu", 3)
        device(type='cpu')
    """
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if num_gpus else "cpu"
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and num_gpus:
            device = torch.device("cuda", local_rank % num_gpus)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(
            f"device ({name}) cannot be used; give auto, cpu, cuda or cuda:NUMBER, of "
            f"{num_gpus} GPUs here"
        ) from error
    return device
