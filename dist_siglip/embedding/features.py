"""How do embeddings lie in a folder that training reads in place of pictures or captions?

One file for each shard, see ``data.feature_file``; a part is finished when its file is there.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.samples.cached_features import (
    FeatureFile,
    Tower,
    feature_path,
    write_features,
)
from dist_siglip.embedding.part import Part, PartRows
from dist_siglip.errors import UserError


class FeaturesLayout:
    """Writes parts as files of features.

    Args:
        folder: of all parts.
        shard_lines: of the table, one for each part.
    """

    def __init__(self, folder: Path, shard_lines: Sequence[str]) -> None:
        self._folder = folder
        self._lines = shard_lines

    def files(self, part: Part) -> list[Path]:
        """Name the file of a part."""
        return [feature_path(self._folder, self._lines[part.number])]

    def num_rows(self, part: Part) -> int | None:
        """Count the rows of a finished part; None if it is not finished."""
        (path,) = self.files(part)
        if not path.exists():
            return None
        try:
            return FeatureFile(path).num_rows
        except OSError as error:
            raise UserError(f"{error}; delete it and start again") from error

    def write(self, done: PartRows) -> None:
        """Write a part, one without any row too."""
        rows = np.full(done.part.num_samples, -1, dtype=np.int32)
        rows[done.places()] = np.arange(len(done.rows.sample_ids), dtype=np.int32)
        features: dict[Tower, NDArray[np.floating]] = {}
        if done.rows.image_features is not None:
            features["image"] = done.rows.image_features
        if done.rows.text_features is not None:
            features["text"] = done.rows.text_features
        ids = {tower: done.rows.ids[tower] for tower in features if tower in done.rows.ids}
        write_features(self.files(done.part)[0], features, rows, ids)

    def finish(self) -> None:
        """Do nothing: the files of the parts are what is wanted."""
