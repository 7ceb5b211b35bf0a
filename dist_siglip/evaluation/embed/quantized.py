"""Rows of one byte or one bit a column, calibrated on the first rows of the data set.

A column x of a tower is kept as

    int8:    x ~ offset + scale * c,          c = round((x - offset) / scale) in [-127, 127]
    binary:  x ~ offset + scale * (2 b - 1),  b = [x > offset]

int8 spreads its 254 steps from the smallest to the largest calibrated value. binary has the mean as
its offset and the mean distance from it as its scale: the best two values for that threshold.
Towers have numbers of their own, for the modality gap shifts whole columns of one against the
other. A query stays in floats: scores are its products with what the codes stand for.

``quantization.safetensors`` in the folder of the embeddings holds the numbers, (D,) each.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.rotation import write_first
from dist_siglip.system.regular_file import check_regular

_LOGGER = logging.getLogger(__name__)

QuantizedType = Literal["int8", "binary"]
QUANTIZED: tuple[QuantizedType, ...] = ("int8", "binary")
QUANTIZATION_FILE = "quantization.safetensors"
CALIBRATION_ROWS = 16_384
RECALL_AT = (1, 10, 100)
_QUERIES = 1024
_LARGEST_CODE = 127
_BITS = (128, 64, 32, 16, 8, 4, 2, 1)  # of a byte, as np.packbits packs them


class RowCodec(NamedTuple):
    """What turns rows of floats into codes, and back.

    Attributes:
        dtype: of the codes.
        offset: (D,) float32.
        scale: (D,) float32, above 0.
    """

    dtype: QuantizedType
    offset: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, dtype: QuantizedType, rows: Tensor) -> "RowCodec":
        """Calibrate on (R, D) rows, at least one.

        Example:
            >>> codec = RowCodec.fit("int8", torch.tensor([[-1.0], [3.0]]))
            >>> codec.encode(torch.tensor([[-1.0], [1.0], [9.0]])).flatten().tolist()
            [-127, 0, 127]
        """
        rows = rows.double()
        if dtype == "int8":
            low, high = rows.amin(0), rows.amax(0)
            offset, scale = (low + high) / 2, (high - low) / (2 * _LARGEST_CODE)
        else:
            offset = rows.mean(0)
            scale = (rows - offset).abs().mean(0)
        # A column that never changes is its offset.
        return cls(dtype, offset.float(), scale.float().clamp_min(1e-12))

    @property
    def dim(self) -> int:
        """Columns of a row of floats."""
        return len(self.offset)

    def encode(self, rows: Tensor) -> Tensor:
        """Turn (R, D) finite floats into codes: (R, D) int8, or (R, D/8 rounded up) uint8."""
        offset, scale = self.offset.to(rows.device), self.scale.to(rows.device)
        if self.dtype == "int8":
            codes = ((rows.float() - offset) / scale).round()
            return codes.clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
        bits = torch.nn.functional.pad(rows.float() > offset, (0, -self.dim % 8))
        weights = torch.tensor(_BITS, device=rows.device)
        return (bits.unflatten(1, (-1, 8)) * weights).sum(-1).to(torch.uint8)

    def decode(self, codes: NDArray[Any]) -> Tensor:
        """Return the (R, D) float32 that codes stand for.

        Example:
            >>> codec = RowCodec("binary", torch.tensor([0.5, 0.0]), torch.tensor([1.0, 2.0]))
            >>> codec.decode(codec.encode(torch.tensor([[3.0, -3.0]])).numpy()).tolist()
            [[1.5, -2.0]]
        """
        if self.dtype == "int8":
            return torch.from_numpy(codes.astype(np.float32)) * self.scale + self.offset
        bits = np.unpackbits(codes, axis=1, count=self.dim).astype(np.float32)
        return (torch.from_numpy(bits) * 2 - 1) * self.scale + self.offset


def find_codecs(
    folder: Path,
    dtype: QuantizedType,
    towers: Sequence[Tower],
    width: int,
    first_rows: Callable[[], Mapping[Tower, Tensor]],
    note: Callable[[dict[str, Any]], object],
) -> dict[Tower, RowCodec]:
    """Read the codecs of a folder; calibrate those of a new one.

    Args:
        folder: of the embeddings.
        dtype: of the codes.
        towers: those wanted.
        width: columns of a row.
        first_rows: gives the rows to calibrate on, (R, D) float32 for each tower.
        note: takes what the codes keep of the neighbours, before they are written.

    Raises:
        UserError: if there is no row to calibrate on, or a file is damaged.
    """
    path = folder / QUANTIZATION_FILE
    if not path.exists():
        rows = first_rows()
        if not all(len(each) for each in rows.values()):
            raise UserError(
                f"dtype ({dtype}) is calibrated on the first {CALIBRATION_ROWS:,} samples, "
                "of which none can be used; repair the shards, or take float16"
            )
        if not all(bool(each.isfinite().all()) for each in rows.values()):
            raise UserError(
                f"dtype ({dtype}) cannot be calibrated: a tower gives numbers that are not finite; "
                "use precision 32-true, or look at the weights"
            )
        codecs = {tower: RowCodec.fit(dtype, rows[tower]) for tower in towers}
        _LOGGER.info("calibrated %s rows on %d samples", dtype, len(next(iter(rows.values()))))
        note(quantized_recall(rows, codecs))
        tensors = {}
        for tower, codec in codecs.items():
            tensors[f"{tower}_offset"] = codec.offset.contiguous()
            tensors[f"{tower}_scale"] = codec.scale.contiguous()
        write_first(path, save(tensors, metadata={"dtype": dtype}))
    return read_codecs(folder, dtype, towers, width)


def read_codecs(
    folder: Path, dtype: QuantizedType, towers: Sequence[Tower], width: int | None = None
) -> dict[Tower, RowCodec]:
    """Read the codecs of a folder.

    Raises:
        UserError: if they are missing, damaged or of other rows.
    """
    path = folder / QUANTIZATION_FILE
    codecs: dict[Tower, RowCodec] = {}
    try:
        check_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            of_type = (file.metadata() or {}).get("dtype")
            for tower in towers:
                offset, scale = (file.get_tensor(f"{tower}_{each}") for each in ("offset", "scale"))
                codecs[tower] = RowCodec(dtype, offset.float(), scale.float())
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read ({reason}); embed into a new folder") from error
    for codec in codecs.values():
        wide = codec.offset.shape == codec.scale.shape == (width or codec.offset.numel(),)
        sound = bool(codec.offset.isfinite().all() and (codec.scale > 0).all())
        if of_type != dtype or not wide or not sound or not codec.scale.isfinite().all():
            raise UserError(f"{path} is damaged, or of other rows; embed into a new folder")
    return codecs


@torch.no_grad()
def quantized_recall(
    rows: Mapping[Tower, Tensor], codecs: Mapping[Tower, RowCodec]
) -> dict[str, Any]:
    """Measure which part of the exact nearest rows is found among quantised ones.

    Queries are floats: up to 1,024 texts, evenly taken, against all pictures; of one tower alone,
    its rows against the others of it. recall@k is the mean over queries of
    ``|nearest k exactly, and by the codes| / k``.

    Args:
        rows: (R, D) float32 of each tower.
        codecs: of each tower.

    Returns:
        dtype, rows, queries, what the queries are, recall@k for each k below the rows; of binary
        rows also hamming_recall@k, by differing bits alone, which ``index`` re-scores.
    """
    target: Tower = "image" if "image" in rows else "text"
    source: Tower = "text" if "text" in rows else "image"
    items, codec = rows[target].float(), codecs[target]
    chosen = spread(len(rows[source]), _QUERIES)
    queries = rows[source].float()[chosen]
    own = chosen if source == target else None
    codes = codec.encode(items)
    exact = queries @ items.T
    ways = {"": queries @ codec.decode(codes.numpy()).T}
    if codec.dtype == "binary":
        signs = [
            (each > codecs[tower].offset).float() * 2 - 1
            for tower, each in ((source, queries), (target, items))
        ]
        ways["hamming_"] = signs[0] @ signs[1].T
    found: dict[str, Any] = {
        "dtype": codec.dtype,
        "rows": len(items),
        "queries": len(queries),
        "query_tower": source,
    }
    for name, scores in ways.items():
        for k in (k for k in RECALL_AT if k < len(items)):
            nearest = [nearest_rows(each, k, own) for each in (exact, scores)]
            found[f"{name}recall@{k}"] = overlap(*nearest)
    return found


def spread(count: int, most: int) -> Tensor:
    """Choose at most so many of ``count`` row numbers, evenly.

    Example:
        >>> spread(10, 3).tolist(), spread(2, 3).tolist()
        ([0, 4, 9], [0, 1])
    """
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def nearest_rows(scores: Tensor, k: int, own: Tensor | None = None) -> Tensor:
    """Return (Q, k) numbers of the highest of (Q, N) scores; ``own`` is a column to pass over."""
    if own is not None:
        scores = scores.scatter(1, own[:, None], -torch.inf)
    return scores.topk(k, dim=1).indices


def overlap(exact: Tensor, found: Tensor) -> float:
    """Return the mean share of (Q, k) row numbers that are among those found.

    Example:
        >>> overlap(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 5], [3, 2]]))
        0.75
    """
    return (exact[:, :, None] == found[:, None, :]).any(-1).double().mean().item()


__all__ = [
    "CALIBRATION_ROWS",
    "QUANTIZATION_FILE",
    "QUANTIZED",
    "QuantizedType",
    "RowCodec",
    "find_codecs",
    "quantized_recall",
    "read_codecs",
]
