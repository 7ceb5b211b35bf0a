"""How do the embeddings of a shard lie in a file, so that each sample finds its row?

FOLDER/features/NAME.DIGEST.safetensors, one for every shard: ``rows`` (N,) int32, the row of each
of the N complete samples of the shard, -1 for one that has none, and ``image_features`` and
``text_features``, (R, D) each, or one of them; beside them ``image_ids`` and ``text_ids``, (R,)
int64, of pictures and captions (see ``identity``), which older files lack. The digest is that of
the shard's members, so a shard that changed has no file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import check_regular

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")


def feature_path(folder: Path, shard_line: str) -> Path:
    r"""Name the file of a shard.

    Args:
        folder: of all shards.
        shard_line: "name<TAB>samples<TAB>digest", as ``PairTable.shard_lines`` has it.

    Example:
        >>> feature_path(Path("f"), "train-0.tar\t10\t0123456789abcdef").as_posix()
        'f/features/train-0.tar.0123456789abcdef.safetensors'
    """
    name, _, digest = shard_line.split("\t")
    return folder / "features" / f"{name}.{digest}.safetensors"


def write_features(
    path: Path,
    features: Mapping[Tower, NDArray[np.floating]],
    rows: NDArray[np.int32],
    ids: Mapping[Tower, NDArray[np.int64]] | None = None,
) -> None:
    """Write the file of a shard, whole.

    Args:
        path: as ``feature_path`` names it.
        features: (R, D) for each tower, L2-normalised.
        rows: (N,), the row of each sample, or -1.
        ids: (R,), of the pictures and of the captions; None writes none.
    """
    tensors: dict[str, NDArray[Any]] = {"rows": rows.astype(np.int32)}
    for tower, values in features.items():
        tensors[f"{tower}_features"] = np.ascontiguousarray(values)
    for tower, numbers in (ids or {}).items():
        tensors[f"{tower}_ids"] = numbers.astype(np.int64)
    write_atomically(path, save(tensors))


class FeatureFile:
    """The rows of one shard, read one at a time from a file that stays open.

    Raises:
        OSError: if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            check_regular(path)
            self._file = safe_open(path, framework="pt", device="cpu")
            self._rows: NDArray[np.int32] = self._file.get_tensor("rows").numpy()
            self._slices = {
                tower: self._file.get_slice(f"{tower}_features")
                for tower in TOWERS
                if f"{tower}_features" in self._file.keys()  # noqa: SIM118 - it is no mapping
            }
            self._ids: dict[Tower, NDArray[np.int64]] = {
                tower: self._file.get_tensor(f"{tower}_ids").numpy()
                for tower in TOWERS
                if f"{tower}_ids" in self._file.keys()  # noqa: SIM118 - it is no mapping
            }
            counts = {each.get_shape()[0] for each in self._slices.values()}
            counts |= {len(each) for each in self._ids.values()}
        except SafetensorError as error:
            raise OSError(f"{path} is damaged ({error})") from error
        most = int(self._rows.max(initial=-1))
        if self._rows.ndim != 1 or not counts or most >= min(counts):
            raise OSError(f"{path} is damaged (row {most} of {min(counts, default=0)})")

    @property
    def num_samples(self) -> int:
        """Samples of the shard, those without a row included."""
        return len(self._rows)

    @property
    def num_rows(self) -> int:
        """Samples that have a row."""
        return int((self._rows >= 0).sum())

    def row(self, place: int, tower: Tower) -> Tensor | None:
        """Return the features (D,) of the sample at a place of the shard; None if it has none."""
        row = int(self._rows[place])
        if row < 0:
            return None
        found: Tensor = self._slices[tower][row : row + 1][0]
        return found.float()

    def identity(self, place: int, tower: Tower) -> int | None:
        """Return the id of the picture or caption at a place; None if the file has none."""
        row = int(self._rows[place])
        return int(self._ids[tower][row]) if row >= 0 and tower in self._ids else None
