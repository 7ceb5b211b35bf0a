"""Layouts of an embedded data set: the files in which its shards lie.

``features`` is what training reads in place of pictures or captions: one file for each shard, see
``data.samples.cached_features``; a shard is finished when its file is there.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dist_siglip.data.samples.cached_features import (
    FeatureFile,
    Tower,
    feature_path,
    write_features,
)
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.shard_job import JobRows, ShardJob

Format = Literal["clip-retrieval", "parquet", "features"]


class Layout(Protocol):
    """Writes shards into a folder, each whole or not at all."""

    def files(self, job: ShardJob) -> list[Path]:
        """Name the files of a job."""
        ...

    def num_rows(self, job: ShardJob) -> int | None:
        """Count the rows of a finished shard; None if it is not finished."""
        ...

    def write(self, done: JobRows) -> None:
        """Write a job."""
        ...

    def finish(self) -> None:
        """Do what is left when this rank has written its shards; others may still write."""
        ...


class FeaturesLayout:
    """Writes shards as files of features.

    Args:
        folder: of all shards.
        shard_lines: of the table, one for each job.
    """

    def __init__(self, folder: Path, shard_lines: Sequence[str]) -> None:
        self._folder = folder
        self._lines = shard_lines

    def files(self, job: ShardJob) -> list[Path]:
        """Name the file of a job."""
        return [feature_path(self._folder, self._lines[job.number])]

    def num_rows(self, job: ShardJob) -> int | None:
        """Count the rows of a finished shard; None if it is not finished."""
        (path,) = self.files(job)
        if not path.exists():
            return None
        try:
            return FeatureFile(path).num_rows
        except OSError as error:
            raise UserError(f"{error}; delete it and start again") from error

    def write(self, done: JobRows) -> None:
        """Write a shard, one without any row too."""
        rows = np.full(done.job.num_samples, -1, dtype=np.int32)
        rows[done.places()] = np.arange(len(done.rows.sample_ids), dtype=np.int32)
        features: dict[Tower, NDArray[np.floating]] = {}
        if done.rows.image_features is not None:
            features["image"] = done.rows.image_features
        if done.rows.text_features is not None:
            features["text"] = done.rows.text_features
        ids = {tower: done.rows.ids[tower] for tower in features if tower in done.rows.ids}
        write_features(self.files(done.job)[0], features, rows, ids)

    def finish(self) -> None:
        """Do nothing: the files of the shards are what is wanted."""


def layout_of(
    name: Format, folder: Path, jobs: Sequence[ShardJob], shard_lines: Sequence[str]
) -> Layout:
    """Return the layout of a format.

    Raises:
        UserError: if a package that it needs is missing.
    """
    if name == "features":
        return FeaturesLayout(folder, shard_lines)
    try:
        from dist_siglip.evaluation.embed.parquet_layouts import (
            ClipRetrievalLayout,
            SingleFileLayout,
        )
    except ImportError as error:
        raise UserError(
            f'format ({name}) needs pyarrow ({error}); pip install "dist-siglip[pack]"'
        ) from error
    if name == "parquet":
        return SingleFileLayout(folder, jobs)
    return ClipRetrievalLayout(folder)


def remove_partial(files: Iterable[Path]) -> None:
    """Delete what a killed process left beside files it was writing, hidden and half-written."""
    names: dict[Path, set[str]] = {}
    for file in files:
        names.setdefault(file.parent, set()).add(file.name)
    for folder, wanted in names.items():
        for left in folder.glob(".*.tmp"):  # .NAME.RANDOM.tmp
            if left.name[1:].rsplit(".", 2)[0] in wanted:
                left.unlink(missing_ok=True)
