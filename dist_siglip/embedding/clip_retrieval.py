"""How does clip-retrieval want embeddings to lie in a folder?

FOLDER/
img_emb/img_emb_0.npy            (R, D), one file a shard
text_emb/text_emb_0.npy          (R, D), same rows
metadata/metadata_0.parquet      image_path (the key), caption, shard, place

The number has leading zeros where there are ten shards or more. The metadata are written last: a
part that has them is finished. A shard without any row has no files: embedding-reader, by which
clip-retrieval and autofaiss read, passes over empty arrays but not over their metadata, and would
pair all later files wrongly.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_siglip.embedding.arrow import metadata_table, num_rows_of, write_parquet
from dist_siglip.embedding.left_out import is_all_left_out
from dist_siglip.embedding.part import Part, PartRows
from dist_siglip.system.atomic import open_atomically


class ClipRetrievalLayout:
    """Writes parts in clip-retrieval's layout.

    Args:
        folder: of all parts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self, part: Part) -> list[Path]:
        """Name the files of a part; the last one is written last."""
        return [
            self._folder / name / f"{name}_{part.label}{suffix}"
            for name, suffix in (
                ("img_emb", ".npy"),
                ("text_emb", ".npy"),
                ("metadata", ".parquet"),
            )
        ]

    def num_rows(self, part: Part) -> int | None:
        """Count the rows of a finished part; None if it is not finished."""
        found = num_rows_of(self.files(part)[-1])
        return 0 if found is None and is_all_left_out(self._folder, part) else found

    def write(self, done: PartRows) -> None:
        """Write a part."""
        if not done.rows.sample_ids:
            return
        image_file, text_file, metadata_file = self.files(done.part)
        if done.rows.image_features is not None:
            _write_array(image_file, done.rows.image_features)
        if done.rows.text_features is not None:
            _write_array(text_file, done.rows.text_features)
        write_parquet(metadata_file, metadata_table(done))

    def finish(self) -> None:
        """Do nothing: the files of the parts are what is wanted."""


def _write_array(path: Path, array: NDArray[np.floating]) -> None:
    with open_atomically(path) as file:
        np.save(file, array, allow_pickle=False)
