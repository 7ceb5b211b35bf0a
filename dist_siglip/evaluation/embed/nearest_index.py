"""Indexes of image rows by faiss: which rows may be near, without looking at all of them.

    flat     all rows, as small as they are stored; bits for binary rows
    hnsw     a graph of neighbours over such rows
    ivf_pq   cells of near rows, of which some are looked at; D / 4 bytes a row
    bits     a bit for each column of all rows that are stored otherwise; D / 8 bytes a row

What an index finds is a shortlist, ``max(4 k, 100)`` rows, scored again by the stored rows and the
query in floats. ``index/index.faiss`` and ``index/index.json`` lie in the folder of the embeddings;
``metrics.json`` there says which part of the exact nearest rows is found, before and after.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_siglip.data.samples.cached_features import Tower
from dist_siglip.errors import UserError
from dist_siglip.evaluation.embed.quantized import (
    CALIBRATION_ROWS,
    RECALL_AT,
    RowCodec,
    overlap,
    read_codecs,
    spread,
)
from dist_siglip.evaluation.embed.shard_job import remove_partial
from dist_siglip.evaluation.embed.stored_rows import StoredRows, read_object
from dist_siglip.system.atomic import open_atomically, write_atomically
from dist_siglip.system.process_lock import hold
from dist_siglip.system.regular_file import check_regular, read_json

_LOGGER = logging.getLogger(__name__)

IndexKind = Literal["auto", "flat", "hnsw", "ivf_pq", "bits"]
METRICS_FILE = "metrics.json"
_FOLDER, _FILE, _FACTS = "index", "index.faiss", "index.json"
_FLAT_BELOW, _HNSW_BELOW = 20_000, 2_000_000  # rows, for "auto"
_NEIGHBORS, _SEARCHED = 32, 128  # of HNSW: links of a row, candidates of a query
_LEAST_PQ = 1024  # rows; 256 centroids of each part of a row are trained
_QUERIES = 256
_STORED = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}


def load_faiss(otherwise: str = "") -> Any:
    """Import faiss; ``otherwise`` is what a user may do without it.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return import_module("faiss")
    except ImportError as error:
        raise UserError(
            f'index (faiss) needs faiss-cpu ({error}); pip install "dist-siglip[search]"{otherwise}'
        ) from error


def shortlist_length(k: int) -> int:
    """Rows of a shortlist for the k nearest."""
    return max(4 * k, 100)


def query_bits(codec: RowCodec, queries: Tensor) -> NDArray[np.uint8]:
    """Return the bits of (Q, D) float queries, (Q, D/8 rounded up)."""
    return codec.encode(queries).numpy()


class NearestIndex:
    """An index of the image rows of a folder.

    Args:
        rows: the stored rows.
        index: of faiss.
        kind: of the index.
        query_codecs: by tower, what makes bits of queries; nothing for an index of floats.
    """

    def __init__(
        self,
        rows: StoredRows,
        index: Any,
        kind: str,
        query_codecs: dict[Tower, RowCodec],
    ) -> None:
        self.kind = kind
        self._rows, self._index, self._codecs = rows, index, query_codecs

    @classmethod
    def read(cls, rows: StoredRows) -> "NearestIndex | None":
        """Read the index of a folder; None if it has none.

        Raises:
            UserError: if faiss is missing, or the index is damaged or of other rows.
        """
        folder = rows.folder / _FOLDER
        if not (folder / _FACTS).exists():
            return None
        facts = read_object(folder / _FACTS)
        kind = str(facts.get("kind"))
        faiss = load_faiss(", or search without the index: --exact true")
        remedy = "build it anew: embed with --index faiss, or search with --exact true"
        if kind not in get_args(IndexKind) or facts != _facts_of(kind, rows):
            raise UserError(f"{folder / _FACTS} is not of the rows beside it; {remedy}")
        is_binary = _has_bits(kind, rows)
        read = faiss.read_index_binary if is_binary else faiss.read_index
        try:
            check_regular(folder / _FILE)
            # A file may name others that hold its cells: none outside of this folder.
            index = read(str(folder / _FILE), faiss.IO_FLAG_ONDISK_SAME_DIR)
        except (OSError, RuntimeError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "it is damaged"
            raise UserError(f"{folder / _FILE} cannot be read ({reason}); {remedy}") from error
        width = -(-rows.dim // 8) * 8 if is_binary else rows.dim
        if index.ntotal != len(rows) or index.d != width:
            raise UserError(
                f"{folder / _FILE} holds {index.ntotal} rows of width {index.d}, not the "
                f"{len(rows)} of width {width} beside it; {remedy}"
            )
        return cls(rows, index, kind, _query_codecs(kind, rows))

    def shortlist(self, queries: Tensor, count: int, tower: Tower = "text") -> NDArray[np.int64]:
        """Find rows that may be near.

        Args:
            queries: (Q, D) float32.
            count: rows wanted.
            tower: what the queries are of.

        Returns:
            (Q, count) int64 row numbers, best first; -1 where fewer were found.
        """
        given: NDArray[Any] = queries.numpy()
        if self._codecs:
            given = query_bits(self._codecs[tower], queries)
        _, numbers = self._index.search(np.ascontiguousarray(given), min(count, len(self._rows)))
        found = np.asarray(numbers, dtype=np.int64)
        return np.where(found < len(self._rows), found, -1)  # a damaged file may name any


def build_index(folder: Path, kind: IndexKind) -> None:
    """Build the index of a finished folder, measure it, and note both; one that is there stays.

    Ranks need not talk: one of those that find the folder finished builds it.

    Raises:
        UserError: if faiss is missing, the folder is not finished, there are too few rows for the
            kind, or it cannot be written.
    """
    faiss = load_faiss()
    with hold(str(folder / ".lock"), "index", math.inf):
        rows = StoredRows(folder)
        chosen = _choose(kind, rows)
        facts = _facts_of(chosen, rows)
        at = folder / _FOLDER
        remove_partial([at / _FILE, at / _FACTS])
        if (at / _FACTS).exists() and read_object(at / _FACTS) == facts and (at / _FILE).exists():
            return
        started = time.monotonic()
        _LOGGER.info("building a %s index of %d rows", chosen, len(rows))
        is_binary, codecs = _has_bits(chosen, rows), _query_codecs(chosen, rows)
        if is_binary:
            index = _binary(faiss, chosen, rows, codecs["image"])
        else:
            index = _floats(faiss, chosen, rows)
        seconds = time.monotonic() - started
        made = NearestIndex(rows, index, chosen, codecs)
        found = measure_index(made, rows, *_queries(rows))
        content = (faiss.serialize_index_binary if is_binary else faiss.serialize_index)(index)
        sizes = {"bytes": content.nbytes, "build_seconds": seconds}
        try:
            (at / _FACTS).unlink(missing_ok=True)
            with open_atomically(at / _FILE) as file:
                file.write(memoryview(content))
            note_metrics(folder, "index", {**facts, **sizes, **found})
            write_atomically(at / _FACTS, json.dumps(facts, indent=2) + "\n")  # last: all is there
        except OSError as error:
            raise UserError(f"{at / _FILE} cannot be written: {error.strerror or error}") from error


def _choose(kind: IndexKind, rows: StoredRows) -> str:
    is_binary = rows.dtype == "binary"
    if kind == "auto":
        if len(rows) < _FLAT_BELOW:
            return "flat"
        return "hnsw" if is_binary or len(rows) < _HNSW_BELOW else "ivf_pq"
    if kind in ("ivf_pq", "bits") and is_binary:
        raise UserError(f"index_kind ({kind}) must be flat or hnsw with binary rows")
    if kind == "ivf_pq" and len(rows) < _LEAST_PQ:
        raise UserError(
            f"index_kind (ivf_pq) is trained on at least {_LEAST_PQ:,} rows, and there are "
            f"{len(rows):,}; take flat or hnsw"
        )
    return kind


def _facts_of(kind: str, rows: StoredRows) -> dict[str, Any]:
    """Say what an index is, and by a digest of embed.json which rows it is of."""
    manifest = json.dumps(rows.manifest, sort_keys=True).encode()
    digest = hashlib.blake2b(manifest, digest_size=8).hexdigest()
    facts = {"kind": kind, "dtype": rows.dtype, "rows": len(rows), "dim": rows.dim}
    return {**facts, "manifest": digest}


def _has_bits(kind: str, rows: StoredRows) -> bool:
    return rows.dtype == "binary" or kind == "bits"


def _floats(faiss: Any, kind: str, rows: StoredRows) -> Any:
    dim, metric = rows.dim, faiss.METRIC_INNER_PRODUCT
    stored = _STORED[rows.dtype]
    if kind == "ivf_pq":
        cells = max(1, min(int(4 * math.sqrt(len(rows))), len(rows) // 39))
        parts = next(each for each in range(max(1, dim // 4), 0, -1) if dim % each == 0)
        # np: codes are not sorted for a comparison of their bits, which takes long.
        index = faiss.index_factory(dim, f"IVF{cells},PQ{parts}np", metric)
        index.nprobe = max(8, cells // 16)
        trained_on = max(64 * cells, 256 * 64)
    else:
        name = stored if kind == "flat" else f"HNSW{_NEIGHBORS},{stored}"
        index = faiss.index_factory(dim, name, metric)
        if kind == "hnsw":
            index.hnsw.efSearch = _SEARCHED
        trained_on = 65_536
    if not index.is_trained:
        train = rows.take(spread(len(rows), trained_on).numpy())
        index.train(np.ascontiguousarray(train.numpy()))
    for block in rows.blocks():
        index.add(np.ascontiguousarray(block.numpy()))
    return index


def _binary(faiss: Any, kind: str, rows: StoredRows, codec: RowCodec) -> Any:
    width = -(-rows.dim // 8) * 8
    if kind == "hnsw":
        index = faiss.IndexBinaryHNSW(width, _NEIGHBORS)
        index.hnsw.efSearch = _SEARCHED
    else:
        index = faiss.IndexBinaryFlat(width)
    if kind == "bits":
        blocks: Iterator[NDArray[Any]] = (codec.encode(block).numpy() for block in rows.blocks())
    else:
        blocks = rows.code_blocks()
    for codes in blocks:
        index.add(np.ascontiguousarray(codes))
    return index


def _query_codecs(kind: str, rows: StoredRows) -> dict[Tower, RowCodec]:
    """Find what makes bits of queries; without text rows, texts are cut where pictures are.

    Bits of rows that are stored otherwise are calibrated on the first of these, each time alike.
    """
    has_texts = rows.manifest.get("towers") == "both"
    if kind == "bits":
        of_towers: dict[Tower, StoredRows] = {"image": rows, "text": rows}
        if has_texts:
            of_towers["text"] = StoredRows(rows.folder, "text")
        return {tower: _fit_bits(each) for tower, each in of_towers.items()}
    if rows.codec is None or rows.dtype != "binary":
        return {}
    texts = rows.codec
    if has_texts:
        texts = read_codecs(rows.folder, "binary", ("text",), rows.dim)["text"]
    return {"image": rows.codec, "text": texts}


def _fit_bits(rows: StoredRows) -> RowCodec:
    return RowCodec.fit("binary", rows.take(np.arange(min(CALIBRATION_ROWS, len(rows)))))


def _queries(rows: StoredRows) -> tuple[Tensor, Tower, Tensor | None]:
    """Choose queries to measure by: texts if there are any, else pictures."""
    if rows.manifest.get("towers") == "both":
        texts = StoredRows(rows.folder, "text")
        return texts.take(spread(len(texts), _QUERIES).numpy()), "text", None
    own = spread(len(rows), _QUERIES)
    return rows.take(own.numpy()), "image", own


def measure_index(
    index: NearestIndex,
    rows: StoredRows,
    queries: Tensor,
    tower: Tower,
    own: Tensor | None = None,
) -> dict[str, Any]:
    """Compare what an index finds with an exact search of the stored rows.

    Args:
        index: of the rows.
        rows: that were indexed.
        queries: (Q, D) float32.
        tower: what they are of.
        own: (Q,) row numbers of the queries themselves, which count as no neighbours; None if they
            are no rows.

    Returns:
        queries, and for each k below the number of rows: recall@k, the mean share of the k exact
        nearest rows among the k best of the shortlist scored again, and unscored_recall@k, among
        the first k of the shortlist as the index orders it.
    """
    found: dict[str, Any] = {"queries": len(queries), "query_tower": tower}
    extra = 0 if own is None else 1
    wanted = [k for k in RECALL_AT if k + extra <= len(rows)]
    exact = _without(exact_nearest(rows, queries, max(wanted, default=0) + extra)[1], own)
    for k in wanted:
        listed = index.shortlist(queries, shortlist_length(k + extra), tower)
        scored = torch.stack(
            [
                _filled(rescore(rows, query, numbers, k + extra)[1], k + extra)
                for query, numbers in zip(queries, listed, strict=True)
            ]
        )
        found[f"recall@{k}"] = overlap(exact[:, :k], _without(scored, own))
        plain = torch.from_numpy(listed[:, : k + extra])
        found[f"unscored_recall@{k}"] = overlap(exact[:, :k], _without(plain, own))
    return found


def _filled(numbers: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(numbers, (0, length - len(numbers)), value=-1)


def _without(numbers: Tensor, own: Tensor | None) -> Tensor:
    """Drop the query itself of (Q, k + 1) row numbers, or else the last."""
    if own is None:
        return numbers
    keys = (numbers == own[:, None]).int()
    return numbers.gather(1, keys.argsort(dim=1, stable=True))[:, :-1]


def exact_nearest(rows: StoredRows, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return scores and numbers, (Q, k), of the rows of highest product with (Q, D) queries."""
    scores = torch.empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64)
    first = 0
    for block in rows.blocks():
        here = queries @ block.T
        own = torch.arange(first, first + len(block)).expand(len(queries), -1)
        first += len(block)
        scores, numbers = torch.cat([scores, here], 1), torch.cat([numbers, own], 1)
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        numbers = numbers.gather(1, order)
    return scores, numbers


def rescore(
    rows: StoredRows, query: Tensor, numbers: NDArray[np.int64], k: int
) -> tuple[Tensor, Tensor]:
    """Return scores and numbers of the best k of a shortlist, by the stored rows."""
    listed = np.unique(numbers[numbers >= 0])
    scores, order = (rows.take(listed) @ query).topk(min(k, len(listed)))
    return scores, torch.from_numpy(listed)[order]


def note_metrics(folder: Path, name: str, numbers: dict[str, Any]) -> None:
    """Put numbers under a name into ``metrics.json`` of a folder, beside what it holds."""
    path = folder / METRICS_FILE
    with hold(str(folder / ".lock"), "metrics", math.inf):
        content = read_metrics(folder)
        try:
            write_atomically(path, json.dumps(content | {name: numbers}, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def read_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """Read ``metrics.json`` of a folder: what was measured, by name; damaged parts are left out."""
    try:
        found = read_json(folder / METRICS_FILE)
    except (OSError, ValueError):
        return {}
    named = found.items() if isinstance(found, dict) else ()
    return {name: numbers for name, numbers in named if _is_measured(numbers)}


def measured_name(name: str, numbers: Mapping[str, Any]) -> str:
    """Name what an entry of ``metrics.json`` is about.

    Example:
        >>> measured_name("rows", {"dtype": "int8"}), measured_name("index", {"kind": "ivf_pq"})
        ('int8 rows', 'ivf-pq index')
    """
    return f"{numbers.get('kind') or numbers['dtype']} {name}".replace("_", "-")


def _is_measured(numbers: object) -> bool:
    """Tell whether there is all that ``measure_index`` and ``quantized_recall`` have in common."""
    if not isinstance(numbers, dict):
        return False
    return (
        all(type(numbers.get(name)) is int for name in ("rows", "queries"))
        and all(type(numbers.get(name)) is str for name in ("dtype", "query_tower"))
        and all(type(each) is float for name, each in numbers.items() if "recall@" in name)
    )


__all__ = [
    "IndexKind",
    "NearestIndex",
    "build_index",
    "exact_nearest",
    "load_faiss",
    "measure_index",
    "measured_name",
    "note_metrics",
    "read_metrics",
    "rescore",
    "shortlist_length",
]
