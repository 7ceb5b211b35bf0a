"""Search of pictures by a text, a picture or another of them, in a finished folder of ``embed``.

Scores are cosines: products of a query in float32 with the stored rows, or with what quantised rows
stand for. Without an index all rows are looked at; with one, its shortlist is scored so.
"""

import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.data.samples.picture import EncodedPicture
from dist_siglip.data.samples.picture_policy import PicturePolicy
from dist_siglip.data.samples.transforms import Preprocessing
from dist_siglip.errors import UserError
from dist_siglip.evaluation.benchmark import EvaluatedModel
from dist_siglip.evaluation.embed.nearest_index import (
    NearestIndex,
    exact_nearest,
    rescore,
    shortlist_length,
)
from dist_siglip.evaluation.embed.rotation import (
    PCA,
    ROTATION_FILE,
    find_rotation,
    name_rotation,
)
from dist_siglip.evaluation.embed.stored_rows import RowPlace, StoredRows
from dist_siglip.evaluation.encoding import encode_pictures, encode_texts
from dist_siglip.metrics.prefixes import check_dim, cut_rows
from dist_siglip.models.build import BuiltModel, tower_fingerprint

_KEPT_BYTES = 2**30  # float32 rows that are kept in memory rather than read for each query


class Hit(NamedTuple):
    """A picture that was found.

    Attributes:
        row: its number in the folder.
        score: cosine with the query.
        place: what it is of.
    """

    row: int
    score: float
    place: RowPlace


class PictureSearch:
    """The pictures of a folder, and the model that its rows were made by.

    Threads may share one: the towers are called by one at a time.

    Args:
        folder: that ``embed`` wrote, with image rows.
        built: the model; its towers are moved to the device.
        device: of the towers; rows stay on the host.
        exact: whether all rows are looked at although there is an index.

    Attributes:
        rows: of the pictures.
        built: the model, its pictures decoded as those of the folder were.
        method: "exact", or the kind of the index.

    Raises:
        UserError: if the folder is not finished, of another model or damaged, or faiss is missing
            for its index.
    """

    def __init__(
        self, folder: Path, built: BuiltModel, *, device: torch.device, exact: bool = False
    ) -> None:
        self.rows = StoredRows(folder)
        self.built = replace(built, pictures=_policy_of(self.rows, built.pictures))
        self._check_model()
        self._rotation = self._find_rotation()
        self._index = None if exact else NearestIndex.read(self.rows)
        self.method = "exact" if self._index is None else self._index.kind
        self._model = EvaluatedModel.of(
            built.encoder.to(device).eval(),
            Preprocessing.of(self.built),
            logit_scale=built.start_scale,
            logit_bias=built.start_bias,
            device=device,
        )
        self._lock = threading.Lock()
        if self._index is None and len(self.rows) * self.rows.dim * 4 <= _KEPT_BYTES:
            self.rows.keep()

    def by_text(self, text: str, k: int) -> list[Hit]:
        """Find the k pictures nearest to a text.

        Raises:
            UserError: if the text is empty, or gives numbers that are not finite.
        """
        text = text.encode(errors="replace").decode()  # of bytes that are no UTF-8
        if not text.strip():
            raise UserError("query is an empty text; say what the pictures show")
        with self._lock:
            query = encode_texts(self._model, [text])
        return self._nearest(self._changed(query), k, "text")

    def by_picture(self, data: bytes, k: int) -> list[Hit]:
        """Find the k pictures nearest to one.

        Args:
            data: of a JPEG, PNG or WebP file.
            k: pictures wanted.

        Raises:
            BadSampleError: if it cannot be decoded, or is too large for the policy of the model.
            UserError: if it gives numbers that are not finite.
        """
        picture = EncodedPicture(data, self.built.pictures)
        with self._lock:
            query = encode_pictures(self._model, [picture])
        return self._nearest(self._changed(query), k, "image")

    def by_row(self, row: int, k: int) -> list[Hit]:
        """Find the k pictures nearest to one of the folder, which is not among them.

        Raises:
            UserError: if there is no such row.
        """
        if not 0 <= row < len(self.rows):
            raise UserError(f"row ({row}) must be 0 to {len(self.rows) - 1}")
        query = self.rows.take(np.array([row]))
        found = self._nearest(query / query.norm().clamp_min(1e-12), k + 1, "image")
        return [hit for hit in found if hit.row != row][:k]

    def _nearest(self, query: Tensor, k: int, tower: Tower) -> list[Hit]:
        if not bool(query.isfinite().all()):
            raise UserError(f"query gives numbers of the {tower} tower that are not finite")
        if self._index is None:
            with self._lock:  # blocks of float rows are large, and one search uses all cores
                scores, numbers = (each[0] for each in exact_nearest(self.rows, query, k))
        else:
            listed = self._index.shortlist(query, shortlist_length(k), tower)[0]
            scores, numbers = rescore(self.rows, query[0], listed, k)
        if not bool(scores.isfinite().all()):
            raise UserError(
                f"index ({self.rows.folder}) is damaged: it holds numbers that are not finite; "
                "embed into a new folder"
            )
        found = sorted(zip(numbers.tolist(), scores.tolist(), strict=True), key=_best_first)
        return [Hit(row, score, self.rows.place(row)) for row, score in found]

    def _changed(self, query: Tensor) -> Tensor:
        """Cut and turn a query as the rows are."""
        query = query.float().cpu()
        if self._rotation is None and self.rows.dim == self.built.embed_dim:
            return query
        return cut_rows(query, self.rows.dim, self._rotation)

    def _find_rotation(self) -> Tensor | None:
        """Read the rotation of the rows: that of the folder, or the file that was named."""
        name = self.rows.manifest.get("rotate")
        if name is None:
            return None
        if name == PCA:
            path = str(self.rows.folder / ROTATION_FILE)
        else:
            path = str(self.rows.source.get("rotation"))
            if name_rotation(path) != name:
                raise UserError(
                    f"rotate ({path}) is not the file that index ({self.rows.folder}) was made "
                    "with; put that one back, or embed anew"
                )
        return find_rotation(path, self.rows.folder, self.built, _no_pictures)

    def _check_model(self) -> None:
        """Refuse a model other than that of the rows; a text tower that has no rows may be any."""
        towers: Sequence[Tower] = ("image", "text")
        for tower in towers:
            of_rows = self.rows.manifest.get(f"{tower}_tower")
            if of_rows is None and tower == "text":
                continue
            if tower_fingerprint(self.built, tower) != of_rows:
                raise UserError(
                    f"index ({self.rows.folder}) was made by another model, or other "
                    f"weights: the {tower} towers differ; name the run_dir and ckpt_path it was "
                    "made by, or embed anew"
                )
        check_dim(self.rows.dim, self.built.embed_dim)
        if self.rows.dim != self.rows.manifest.get("dim", self.built.embed_dim):
            raise UserError(
                f"index ({self.rows.folder}) is damaged: its rows have {self.rows.dim} columns; "
                "embed into a new folder"
            )


def _policy_of(rows: StoredRows, policy: PicturePolicy) -> PicturePolicy:
    """Decode pictures as those of the rows were."""
    stated = rows.source.get("pictures")
    said = {**(stated if isinstance(stated, dict) else {}), **rows.manifest}
    names = [each.name for each in fields(PicturePolicy) if each.name in said]
    try:
        return policy.changed(**{name: said[name] for name in names})
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"index ({rows.folder}) is damaged ({error}); run embed again") from error


def _best_first(found: tuple[int, float]) -> tuple[float, int]:
    return -found[1], found[0]


def _no_pictures() -> Tensor:
    raise AssertionError("a rotation that is read is not fitted")


__all__ = ["Hit", "PictureSearch"]
