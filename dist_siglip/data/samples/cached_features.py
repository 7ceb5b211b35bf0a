"""Features of a locked tower that stand in for the pictures, or captions, of a data set.

``embed --format features`` writes them once; training then reads a row instead of decoding and
encoding a picture.

FOLDER/features/NAME.DIGEST.safetensors, one for every shard: ``rows`` (N,) int32, the row of each
of the N complete samples of the shard, -1 for one that has none, and ``image_features`` and
``text_features``, (R, D) each, or one of them; beside them ``image_ids`` and ``text_ids``, (R,)
int64, of pictures and captions, which older files lack. The digest is that of the shard's members,
so a shard that changed has no file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.samples.bad_samples import BadSampleError
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.errors import UserError
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import check_regular, read_json

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

    def width(self, tower: Tower) -> int:
        """D of the features of a tower."""
        return int(self._slices[tower].get_shape()[1])

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


MANIFEST = "embed.json"
_MOST_OPEN = 64  # files at once; a block of shards is read together


class CachedFeatures:
    """Features of the samples of a table, by sample id.

    Travels to loader processes, which open files of their own.

    Args:
        folders: that ``embed --format features`` wrote, of one model; together they have every
            shard of the table.
        table: the data set.
        name: of the setting, for error texts.

    Attributes:
        towers: whose features are there.
        digests: what decides the features of each tower, see ``models.digest``.
        manifest: what else ``embed`` wrote down about them.
        has_ids: whether all folders say which pictures and captions are the same.

    Raises:
        UserError: if a folder is not of that format, folders differ, or a shard has no file.
    """

    def __init__(
        self, folders: Sequence[str], table: PairTable, name: str = "train_features"
    ) -> None:
        manifests = [_read_manifest(Path(folder), name) for folder in folders]
        first = manifests[0]
        self.digests: dict[Tower, str] = {
            tower: first[f"{tower}_tower"] for tower in TOWERS if first.get(f"{tower}_tower")
        }
        self.towers = tuple(self.digests)
        self.has_ids = all("ids" in manifest for manifest in manifests)
        for folder, manifest in zip(folders, manifests, strict=True):
            if any(manifest.get(f"{tower}_tower") != self.digests.get(tower) for tower in TOWERS):
                raise UserError(
                    f"{name} ({folder}) are of another model than those in {folders[0]}; "
                    "embed all shards with the same"
                )
        self.manifest = first
        self._name = name
        self._starts = table.starts
        self._paths = [_find(folders, line, name) for line in table.shard_lines.split("\n")]
        self._open: dict[int, FeatureFile] = {}

    def check_captions(self, rule: CaptionRule) -> None:
        """Check that the text features are those of the captions of a rule.

        Raises:
            UserError: if captions are drawn, or were taken from elsewhere.
        """
        if "text" not in self.towers:
            return
        for name in ("weights", "probabilities"):
            if getattr(rule, name) is not None:
                raise UserError(
                    f"captions.{name} ({', '.join(rule.fields)}) must be null: {self._name} "
                    "holds the features of one caption for each sample"
                )
        if self.manifest.get("caption_field") is not None:
            raise UserError(
                f"{self._name} were made with captions of {self.manifest['caption_field']}; "
                "embed again without captions.weights and captions.probabilities"
            )
        if rule.pick != "first":
            raise UserError(
                f"captions.pick ({rule.pick}) must be first: {self._name} holds the features of "
                "one caption for each sample"
            )
        for name in ("members", "json_field", "split_lines"):
            now, then = getattr(rule, name), self.manifest.get(f"caption_{name}")
            if (list(now) if isinstance(now, tuple) else now) != then:
                raise UserError(
                    f"captions.{name} ({now}) is not what {self._name} were made with ({then}); "
                    "set it so, or embed again"
                )

    def width(self, tower: Tower) -> int:
        """Return D of the features of a tower.

        Raises:
            UserError: if the first file cannot be read.
        """
        try:
            return FeatureFile(self._paths[0]).width(tower)
        except OSError as error:
            raise UserError(f"{self._name}: {error}; embed the shards again") from error

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


def _read_manifest(folder: Path, name: str) -> dict[str, Any]:
    try:
        manifest = read_json(folder / MANIFEST)
        kind = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{name} ({folder}) is no folder of embeddings ({MANIFEST}: "
            f"{' '.join(str(error).split())[:80]}); make one: dist-siglip embed --format features"
        ) from error
    if kind != "features":
        raise UserError(
            f"{name} ({folder}) has format {kind}; embed the shards with --format features"
        )
    return dict(manifest)


def _find(folders: Sequence[str], line: str, name: str) -> Path:
    for folder in folders:
        path = feature_path(Path(folder), line)
        if path.is_file():
            return path
    raise UserError(
        f"{name} ({', '.join(folders)}) lack shard {line.split(chr(9))[0]}, or hold those "
        "of another version of it; run dist-siglip embed --format features again"
    )
