"""Files of the newest evaluation, RUN/evaluation, and samples of earlier ones.

Of some evaluations the same few pairs are kept, so that a point can be followed from one to the
next, and coarse histograms of all pairs: some megabytes a run, however long it is.
"""

import base64
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw

from dist_siglip.data import PairDataset
from dist_siglip.data.samples.regions import Window
from dist_siglip.metrics import Evaluation
from dist_siglip.metrics.evaluation import describe_num_pairs
from dist_siglip.runs import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.best_effort import best_effort
from dist_siglip.training.module.objective_measures import (
    GALLERY_PICTURES,
    FoundRegion,
    Written,
    spread_rows,
)

logger = logging.getLogger(__name__)


class StartEvaluation(Callback):
    """Evaluates a new run before its first step, and logs that as the evaluation of step 0.

    It takes the place of Lightning's sanity check and needs ``num_sanity_val_steps`` of -1: a check
    of a few batches is no evaluation.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was found; Lightning itself logs nothing of a sanity check."""
        evaluation = getattr(pl_module, "last_evaluation", None)
        is_whole = trainer.num_sanity_val_steps == math.inf
        if evaluation is None or not is_whole or not trainer.is_global_zero:
            return
        values = {f"val/{name}": value for name, value in evaluation.metrics.items()}
        for each in trainer.loggers:
            each.log_metrics(values, step=0)
        shown = ("image_to_text_recall@1", "text_to_image_recall@1", "loss", "modality_gap")
        parts = [f"{name} {values[f'val/{name}']:.4g}" for name in shown]
        pairs = describe_num_pairs(evaluation.metrics)
        logger.info("before the first step, on %s: %s", pairs, ", ".join(parts))


MOST_KEPT = 8
_MOST_PAIRS = 500
_MOST_BINS = 400


def keep_evaluation(folder: RunFolder, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write down a part of an evaluation, and take away those that are too many.

    Args:
        folder: of the run.
        step: optimizer steps behind the evaluated weights; an earlier one of it is replaced.
        arrays: as ``Evaluation.arrays``. Kept are ``image_features`` and ``text_features`` of the
            first 500 pairs as float16, their ``sample_ids``, and both histograms in 400 bins.
    """
    packed = io.BytesIO()
    np.savez_compressed(packed, **_excerpt(arrays))
    with best_effort(f"what is kept of the evaluation of step {step}"):
        write_atomically(folder.kept_evaluation(step), packed.getvalue())
    _drop(folder, surplus(list(folder.kept_evaluations()), MOST_KEPT))


def forget_after(folder: RunFolder, step: int) -> None:
    """Drop what is kept of later steps, which a run that goes on from ``step`` does again."""
    _drop(folder, [kept for kept in folder.kept_evaluations() if kept > step])


def surplus(steps: Sequence[int], most: int) -> list[int]:
    """Choose the steps to give up, so that at most ``most`` stay and lie evenly.

    The first and the last stay. Of the others the one whose neighbours lie closest together goes
    first; of several the earliest.

    Args:
        steps: in order.
        most: at least 2.

    Example:
        >>> surplus([0, 10, 20, 30, 31, 40], 4)
        [31, 10]
    """
    kept, given_up = list(steps), []
    while len(kept) > most:
        spans = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        given_up.append(kept.pop(1 + spans.index(min(spans))))
    return given_up


def _excerpt(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    kept: dict[str, Any] = {
        name: arrays[name][:_MOST_PAIRS].astype(np.float16)
        for name in ("image_features", "text_features")
    }
    kept["sample_ids"] = arrays["sample_ids"][:_MOST_PAIRS]
    edges = arrays["histogram_edges"]
    merged = max(1, (len(edges) - 1) // _MOST_BINS)
    starts = np.arange(0, len(edges) - 1, merged)
    kept["histogram_edges"] = np.append(edges[starts], edges[-1])
    for name in ("positive_histogram", "negative_histogram"):
        kept[name] = np.add.reduceat(arrays[name], starts)
    return kept


def _drop(folder: RunFolder, steps: Sequence[int]) -> None:
    for step in steps:
        with suppress(OSError):
            folder.kept_evaluation(step).unlink()


class EvaluationRecord(Callback):
    """Writes metrics.json, arrays.npz and examples.json after every evaluation, on rank 0.

    Reads ``pl_module.last_evaluation``, ``last_evaluated_step`` and, for pictures and captions,
    ``trainer.datamodule.val_dataset``.

    Args:
        gallery_images: number of validation pictures that are kept for the report. Captions that
            the model writes are those of 24.
    """

    def __init__(self, gallery_images: int = GALLERY_PICTURES) -> None:
        self.gallery_images = gallery_images

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget evaluations after the checkpoint the run goes on from."""
        if trainer.is_global_zero:
            forget_after(RunFolder(Path(trainer.default_root_dir)), trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files; each appears whole or, on a full disk, not at all."""
        evaluation = getattr(pl_module, "last_evaluation", None)
        is_check = trainer.sanity_checking and trainer.num_sanity_val_steps != math.inf
        if evaluation is None or not trainer.is_global_zero or is_check:
            return
        run = RunFolder(Path(trainer.default_root_dir))
        folder = run.evaluation
        step: int = getattr(pl_module, "last_evaluated_step", 0)
        numbers = {"step": step, **evaluation.metrics}
        finite = {
            name: value if math.isfinite(value) else str(value) for name, value in numbers.items()
        }
        _replace(folder / "metrics.json", json.dumps(finite, indent=1) + "\n")
        packed = io.BytesIO()
        np.savez_compressed(packed, **evaluation.arrays)
        _replace(folder / "arrays.npz", packed.getvalue())
        keep_evaluation(run, step, evaluation.arrays)
        dataset = getattr(getattr(trainer, "datamodule", None), "val_dataset", None)
        if dataset is not None:
            written = getattr(pl_module, "written", {})
            examples = self._examples(dataset, evaluation, written)
            _replace(folder / "examples.json", json.dumps(examples))

    def _examples(
        self, dataset: PairDataset, evaluation: Evaluation, written: Mapping[int, Written]
    ) -> dict[str, object]:
        captions, images = [], []
        sample_ids = evaluation.arrays["sample_ids"].tolist()
        chosen = spread_rows(len(sample_ids), self.gallery_images)
        for row, sample_id in enumerate(sample_ids):
            image_bytes, _, caption = dataset.raw(sample_id)
            captions.append(caption)
            if row in chosen:
                images.append({"row": row, **_image(dataset, image_bytes, written.get(sample_id))})
        return {"captions": captions, "images": images}


def _image(dataset: PairDataset, data: bytes, written: Written | None) -> dict[str, str]:
    """An entry of examples.json: a stored picture as it is shown, and what was written of it."""
    region = None if written is None else written.region
    seen = None if region is None else dataset.seen(data)
    data, media_type = dataset.shown(data)
    found = {} if written is None else {"written": written.caption}
    if region is not None and seen is not None:
        kind = "PNG" if media_type == "image/png" else "JPEG"
        data, media_type = with_boxes(*seen, region, kind), f"image/{kind.lower()}"
        found["sought"] = region.text
    return {"media_type": media_type, "base64": base64.b64encode(data).decode(), **found}


_BOX_COLOURS = ("#00a000", "#ff6a00")  # of the region, and of what the decoder wrote


def with_boxes(image: Image.Image, window: Window, region: FoundRegion, kind: str) -> bytes:
    """Draw the box of a region and the one that a decoder wrote.

    Args:
        image: RGB; drawn into.
        window: the part of it that the model saw.
        region: boxes in shares of that part.
        kind: format of the result.
    """
    pen = ImageDraw.Draw(image)
    for box, colour in zip((region.box, region.written), _BOX_COLOURS, strict=True):
        top, left, bottom, right = window.place(box)
        columns = sorted((left * image.width, right * image.width - 1))
        rows = sorted((top * image.height, bottom * image.height - 1))
        pen.rectangle(
            (columns[0], rows[0], columns[1], rows[1]),
            outline=colour,
            width=max(1, min(image.size) // 64),
        )
    image.info.clear()
    stream = io.BytesIO()
    image.save(stream, kind, quality=90, subsampling=0)  # thin lines keep their colours
    return stream.getvalue()


def _replace(path: Path, content: str | bytes) -> None:
    """Write a file; without room for it, take away that of the evaluation before."""
    with best_effort(str(path)):
        try:
            write_atomically(path, content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
