"""Which features stand in for the pictures, or captions, of a data set?

A tower that is locked gives a picture the same features in every epoch. ``embed --format
features`` writes them once; training then reads a row instead of decoding and encoding a picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dist_siglip.data.captions import CaptionRule
from dist_siglip.data.faults import BadSampleError
from dist_siglip.data.feature_file import TOWERS, FeatureFile, Tower, feature_path
from dist_siglip.data.pairs import PairTable
from dist_siglip.errors import UserError
from dist_siglip.system.regular_file import read_json

_MANIFEST = "embed.json"
_MOST_OPEN = 64  # files at once; a block of shards is read together


class CachedFeatures:
    """Features of the samples of a table, by sample id.

    Travels to loader processes, which open files of their own.

    Args:
        folders: that ``embed --format features`` wrote, of one model; together they have every
            shard of the table.
        table: the data set.

    Attributes:
        towers: whose features are there.
        digests: what decides the features of each tower, see ``models.digest``.
        has_ids: whether all folders say which pictures and captions are the same.

    Raises:
        UserError: if a folder is not of that format, folders differ, or a shard has no file.
    """

    def __init__(self, folders: Sequence[str], table: PairTable) -> None:
        manifests = [_read_manifest(Path(folder)) for folder in folders]
        first = manifests[0]
        self.digests: dict[Tower, str] = {
            tower: first[f"{tower}_tower"] for tower in TOWERS if first.get(f"{tower}_tower")
        }
        self.towers = tuple(self.digests)
        self.has_ids = all("ids" in manifest for manifest in manifests)
        for folder, manifest in zip(folders, manifests, strict=True):
            if any(manifest.get(f"{tower}_tower") != self.digests.get(tower) for tower in TOWERS):
                raise UserError(
                    f"train_features ({folder}) are of another model than those in {folders[0]}; "
                    "embed all shards with the same"
                )
        self._captions = first
        self._starts = table.starts
        self._paths = [_find(folders, line) for line in table.shard_lines.split("\n")]
        self._open: dict[int, FeatureFile] = {}

    def check_captions(self, rule: CaptionRule) -> None:
        """Check that the text features are those of the captions of a rule.

        Raises:
            UserError: if captions are drawn, or were taken from elsewhere.
        """
        if "text" not in self.towers:
            return
        if rule.pick != "first":
            raise UserError(
                f"captions.pick ({rule.pick}) must be first: train_features holds the features of "
                "one caption for each sample"
            )
        for name in ("members", "json_field", "split_lines"):
            now, then = getattr(rule, name), self._captions.get(f"caption_{name}")
            if (list(now) if isinstance(now, tuple) else now) != then:
                raise UserError(
                    f"captions.{name} ({now}) is not what train_features were made with ({then}); "
                    "set it so, or embed again"
                )

    def row(self, sample_id: int, tower: Tower) -> Tensor:
        """Return the features (D,) of a sample, float32.

        Raises:
            BadSampleError: if it has none, or the file cannot be read.
        """
        file, place = self._file_of(sample_id)
        found = file.row(place, tower)
        if found is None:
            raise BadSampleError(f"it has no {tower} features: it was bad when it was embedded")
        return found

    def identity(self, sample_id: int, tower: Tower) -> int | None:
        """Return the id of a sample's picture or caption; None if ids were not stored.

        Raises:
            BadSampleError: if the file cannot be read.
        """
        if not self.has_ids:
            return None
        file, place = self._file_of(sample_id)
        return file.identity(place, tower)

    def _file_of(self, sample_id: int) -> tuple[FeatureFile, int]:
        """Return the open file of a sample's shard, and the sample's place in it."""
        shard = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        try:
            if shard not in self._open:
                while len(self._open) >= _MOST_OPEN:
                    del self._open[next(iter(self._open))]
                self._open[shard] = FeatureFile(self._paths[shard])
        except OSError as error:
            raise BadSampleError(f"its features cannot be read ({error})") from error
        return self._open[shard], sample_id - int(self._starts[shard])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / _MANIFEST)
        kind = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"train_features ({folder}) is no folder of embeddings ({_MANIFEST}: "
            f"{' '.join(str(error).split())[:80]}); make one: dist-siglip embed --format features"
        ) from error
    if kind != "features":
        raise UserError(
            f"train_features ({folder}) has format {kind}; embed the shards with --format features"
        )
    return dict(manifest)


def _find(folders: Sequence[str], line: str) -> Path:
    for folder in folders:
        path = feature_path(Path(folder), line)
        if path.is_file():
            return path
    raise UserError(
        f"train_features ({', '.join(folders)}) lack shard {line.split(chr(9))[0]}, or hold those "
        "of another version of it; run dist-siglip embed --format features again"
    )
