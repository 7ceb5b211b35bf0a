"""In which files do the parts of an embedded data set lie?"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from dist_siglip.embedding.features import FeaturesLayout
from dist_siglip.embedding.part import Part, PartRows
from dist_siglip.errors import UserError

Format = Literal["clip-retrieval", "parquet", "features"]


class Layout(Protocol):
    """Writes parts into a folder, each whole or not at all."""

    def files(self, part: Part) -> list[Path]:
        """Name the files of a part."""
        ...

    def num_rows(self, part: Part) -> int | None:
        """Count the rows of a finished part; None if it is not finished."""
        ...

    def write(self, done: PartRows) -> None:
        """Write a part."""
        ...

    def finish(self) -> None:
        """Do what is left when this rank has written its parts; others may still write."""
        ...


def layout_of(
    name: Format, folder: Path, parts: Sequence[Part], shard_lines: Sequence[str]
) -> Layout:
    """Return the layout of a format.

    Args:
        name: of the format.
        folder: to write into.
        parts: all of the data set.
        shard_lines: what tells the versions of their shards apart.

    Raises:
        UserError: if a package that it needs is missing.
    """
    if name == "features":
        return FeaturesLayout(folder, shard_lines)
    try:
        from dist_siglip.embedding.clip_retrieval import ClipRetrievalLayout
        from dist_siglip.embedding.single_file import SingleFileLayout
    except ImportError as error:
        raise UserError(
            f'format ({name}) needs pyarrow ({error}); pip install "dist-siglip[pack]"'
        ) from error
    if name == "parquet":
        return SingleFileLayout(folder, parts)
    return ClipRetrievalLayout(folder)


def remove_partial(files: Iterable[Path]) -> None:
    """Delete what a killed process left beside files it was writing, hidden and half-written.

    Args:
        files: nobody else may be writing them.
    """
    names: dict[Path, set[str]] = {}
    for file in files:
        names.setdefault(file.parent, set()).add(file.name)
    for folder, wanted in names.items():
        for left in folder.glob(".*.tmp"):  # .NAME.RANDOM.tmp
            if left.name[1:].rsplit(".", 2)[0] in wanted:
                left.unlink(missing_ok=True)
