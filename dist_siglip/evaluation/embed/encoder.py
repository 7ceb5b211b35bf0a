"""How do the towers turn batches into rows, without waiting for the device in between?

Rows stay on the device until a shard is done: a copy after every batch would make the device wait
for the host.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_siglip.data.samples.batch import ImageNormalizer
from dist_siglip.data.samples.cached_features import TOWERS, Tower
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.samples import EmbeddingBatch
from dist_siglip.models.build import BuiltModel

Towers = Literal["both", "image", "text"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
RowType = Literal["float16", "float32"]

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_ROW_TYPES = {"float16": torch.float16, "float32": torch.float32}


class EncodedRows(NamedTuple):
    """Embeddings of the usable samples of one shard, on the host.

    Attributes:
        sample_ids: of the R rows, ascending.
        image_features: (R, D), rows of length 1; None if that tower is not wanted.
        text_features: likewise.
        captions: of the R rows.
        problems: by sample id, why it has no row.
        ids: (R,) int64, of the pictures and of the captions, by tower; of wanted towers alone.
    """

    sample_ids: list[int]
    image_features: NDArray[np.floating] | None
    text_features: NDArray[np.floating] | None
    captions: list[str]
    problems: dict[int, str]
    ids: Mapping[Tower, NDArray[np.int64]] = MappingProxyType({})


class Encoder:
    """The towers of a model on a device, in evaluation mode.

    Args:
        built: the model; its towers are moved.
        towers: which features are wanted.
        dtype: of the rows.
        device: where the towers run.
        precision: "32-true", or autocast to bfloat16 or float16.
    """

    def __init__(
        self,
        built: BuiltModel,
        *,
        towers: Towers,
        dtype: RowType,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.device = device
        self._towers = built.encoder.to(device).eval()
        self._normalizer = ImageNormalizer(built.mean, built.std)
        self._has_images = towers != "text"
        self._has_texts = towers != "image"
        self._wanted: list[Tower] = [each for each in TOWERS if towers in ("both", each)]
        self._embed_dim = built.embed_dim
        self._row_type = _ROW_TYPES[dtype]
        self._precision = precision

    @torch.inference_mode()
    def encode(self, batches: Iterable[EmbeddingBatch]) -> EncodedRows:
        """Encode the batches of one shard.

        Raises:
            UserError: if a row is not finite.
        """
        sample_ids: list[int] = []
        captions: list[str] = []
        problems: dict[int, str] = {}
        images: list[Tensor] = []
        texts: list[Tensor] = []
        ids: dict[Tower, list[int]] = {tower: [] for tower in self._wanted}
        for batch in batches:
            sample_ids += batch.sample_ids
            captions += batch.captions
            problems |= batch.problems
            if "image" in ids:
                ids["image"] += batch.picture_ids
            if "text" in ids and batch.caption_ids is not None:
                ids["text"] += batch.caption_ids.tolist()
            with self._autocast():
                if batch.images is not None:
                    pixels = batch.images.to(self.device, non_blocking=True)
                    features = self._towers.encode_image(self._normalizer.pixels(pixels))
                    images.append(features.to(self._row_type))
                if batch.texts is not None:
                    tokens = batch.texts.to(self.device, non_blocking=True)
                    texts.append(self._towers.encode_text(tokens).to(self._row_type))
        return EncodedRows(
            sample_ids,
            self._joined("image", images) if self._has_images else None,
            self._joined("text", texts) if self._has_texts else None,
            captions,
            problems,
            {tower: np.array(numbers, dtype=np.int64) for tower, numbers in ids.items()},
        )

    def _autocast(self) -> AbstractContextManager[None]:
        if self._precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self._precision])

    def _joined(self, tower: str, parts: list[Tensor]) -> NDArray[np.floating]:
        """Bring the rows of a tower to the host."""
        if not parts:
            return torch.empty(0, self._embed_dim, dtype=self._row_type).numpy()
        rows = torch.cat(parts)
        if not bool(rows.isfinite().all()):
            raise UserError(
                f"the {tower} tower gives numbers that are not finite at precision "
                f"({self._precision}); use 32-true, or look at the weights"
            )
        return rows.cpu().numpy()


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
