"""Settings of the embeddings of a data set."""

from dataclasses import dataclass, field, fields
from typing import Literal

from dist_siglip.data.index.damage import MAX_BAD_FRACTION
from dist_siglip.data.samples.cached_features import TOWERS, Tower
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.picture_policy import (
    AUTO,
    MAX_IMAGE_PIXELS,
    ExifOrientation,
    PictureFormat,
    PicturePolicy,
    TruncatedPictures,
)
from dist_siglip.errors import UserError, check_least
from dist_siglip.evaluation.embed.nearest_index import IndexKind
from dist_siglip.evaluation.embed.quantized import QUANTIZED
from dist_siglip.evaluation.embed.rotation import PCA
from dist_siglip.evaluation.embed.shard_job import Format
from dist_siglip.evaluation.encoding import Precision, RowType, Towers


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """How a data set is embedded.

    Attributes:
        towers: which features are wanted.
        format: of the folder.
        dtype: of the features in the files.
        precision: of the computation.
        device: "auto", or a device of torch.
        local_batch_size: samples of a batch on each rank.
        workers: loader processes of each rank.
        captions: which caption a sample has.
        max_image_pixels: pictures with more cannot be used.
        transparency: see ``PicturePolicy``; "auto" is as the model was trained, or says.
        exif_orientation: likewise.
        truncated_pictures: likewise.
        formats: likewise.
        intensity_window: likewise.
        max_bad_fraction: share of the samples of each rank that may be skipped.
        dim: columns of the rows; None for all of the model.
        rotate: "pca" or the path of a rotation, see ``rotation.find_rotation``; None for none.
        index: "faiss" builds an index of the image rows when all shards are written; None for none.
        index_kind: of the index, see ``nearest_index``.
        tokens: whether patch tokens are written, too; with format clip-retrieval.

    Raises:
        UserError: if a number is out of its range, rows for training would be changed, or there is
            no such index of such rows.
    """

    towers: Towers = "both"
    format: Format = "clip-retrieval"
    dtype: RowType = "float16"
    precision: Precision = "32-true"
    device: str = "auto"
    local_batch_size: int = 256
    workers: int = 2
    captions: CaptionRule = field(default_factory=CaptionRule)
    max_image_pixels: int = MAX_IMAGE_PIXELS
    transparency: str = AUTO
    exif_orientation: ExifOrientation | Literal["auto"] = AUTO
    truncated_pictures: TruncatedPictures | Literal["auto"] = AUTO
    formats: tuple[PictureFormat, ...] | Literal["auto"] = AUTO
    intensity_window: tuple[float, float] | Literal["auto"] | None = AUTO
    max_bad_fraction: float = MAX_BAD_FRACTION
    dim: int | None = None
    rotate: str | None = None
    index: Literal["faiss"] | None = None
    index_kind: IndexKind = "auto"
    tokens: bool = False

    def __post_init__(self) -> None:
        check_least(1, local_batch_size=self.local_batch_size)
        check_least(0, workers=self.workers)
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction ({self.max_bad_fraction}) must be in [0, 1]")
        for name in ("dim", "rotate"):
            if self.format == "features" and getattr(self, name) is not None:
                raise UserError(
                    f"{name} ({getattr(self, name)}) must be null with format features: training "
                    "reads whole rows of the tower"
                )
        if self.tokens and (self.format != "clip-retrieval" or self.towers == "text"):
            raise UserError(
                f"tokens (true) needs format clip-retrieval, not {self.format}, and towers image "
                f"or both, not {self.towers}"
            )
        if self.tokens and self.dtype in QUANTIZED:
            raise UserError(f"tokens (true) needs rows of float16 or float32, not {self.dtype}")
        if self.rotate == PCA and self.towers == "text":
            raise UserError(
                f"rotate ({PCA}) is fitted to pictures, and towers is text; name the rotation file "
                "of the folder that holds the pictures"
            )
        if self.format == "features" and (self.dtype in QUANTIZED or self.index is not None):
            name = "dtype" if self.dtype in QUANTIZED else "index"
            raise UserError(
                f"{name} ({getattr(self, name)}) needs format clip-retrieval or parquet: training "
                "reads float rows and no index"
            )
        if self.index is not None and self.towers == "text":
            raise UserError(f"index ({self.index}) is one of pictures, and towers is text")
        if self.index_kind in ("ivf_pq", "bits") and self.dtype == "binary":
            raise UserError(
                f"index_kind ({self.index_kind}) must be auto, flat or hnsw with binary rows"
            )
        if self.index_kind != "auto" and self.index is None:
            raise UserError(f"index_kind ({self.index_kind}) needs an index; give --index faiss")
        self.captions.check()
        self.pictures(PicturePolicy())

    @property
    def wanted(self) -> list[Tower]:
        """Towers that have rows."""
        return [tower for tower in TOWERS if self.towers in ("both", tower)]

    def pictures(self, of_model: PicturePolicy) -> PicturePolicy:
        """Return what decides the pixels of pictures."""
        names = [each.name for each in fields(PicturePolicy)]
        return of_model.changed(**{name: getattr(self, name) for name in names})
