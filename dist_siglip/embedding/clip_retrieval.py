"""How does clip-retrieval want embeddings to lie in a folder?

FOLDER/
img_emb/img_emb_0.npy            (R, D), one file a shard
text_emb/text_emb_0.npy          (R, D), same rows
metadata/metadata_0.parquet      image_path (the key), caption, shard, place

The number has leading zeros where there are ten shards or more. The metadata are written last: a
part that has them is finished.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_siglip.atomic import open_atomically
from dist_siglip.embedding.arrow import num_rows_of, part_table, write_parquet
from dist_siglip.embedding.part import Part, PartRows


class ClipRetrievalLayout:
    """Writes parts in clip-retrieval's layout.

    Args:
        folder: of all parts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def num_rows(self, part: Part) -> int | None:
        """Count the rows of a finished part; None if it is not finished."""
        return num_rows_of(self._file("metadata", part, ".parquet"))

    def write(self, done: PartRows) -> None:
        """Write a part."""
        for name, features in (
            ("img_emb", done.rows.image_features),
            ("text_emb", done.rows.text_features),
        ):
            if features is not None:
                _write_array(self._file(name, done.part, ".npy"), features)
        write_parquet(self._file("metadata", done.part, ".parquet"), part_table(done))

    def _file(self, name: str, part: Part, suffix: str) -> Path:
        return self._folder / name / f"{name}_{part.label}{suffix}"


def _write_array(path: Path, array: NDArray[np.floating]) -> None:
    with open_atomically(path) as file:
        np.save(file, array, allow_pickle=False)
