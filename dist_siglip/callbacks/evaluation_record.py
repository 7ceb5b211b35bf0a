"""RUN/evaluation: the newest evaluation in files that the report, or anyone, can read.

Of those before it a few pairs are kept (``evaluation_history``).
"""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from dist_siglip.callbacks.evaluation_history import forget_after, keep_evaluation
from dist_siglip.data import PairDataset
from dist_siglip.metrics import Evaluation
from dist_siglip.runs import RunFolder
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.best_effort import going_on_without


class EvaluationRecord(Callback):
    """Writes metrics.json, arrays.npz and examples.json after every evaluation, on rank 0.

    Reads ``pl_module.last_evaluation``, ``last_evaluated_step`` and, for pictures and captions,
    ``trainer.datamodule.val_dataset``.

    Args:
        gallery_images: number of validation pictures that are kept for the report.
    """

    def __init__(self, gallery_images: int = 24) -> None:
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
            examples = self._examples(dataset, evaluation)
            _replace(folder / "examples.json", json.dumps(examples))

    def _examples(self, dataset: PairDataset, evaluation: Evaluation) -> dict[str, object]:
        captions, images = [], []
        sample_ids = evaluation.arrays["sample_ids"].tolist()
        # Evenly spread over the gallery, so that the choice does not depend on the model.
        count = min(self.gallery_images, len(sample_ids))
        chosen = {round(index * len(sample_ids) / count) for index in range(count)}
        for row, sample_id in enumerate(sample_ids):
            image_bytes, _, caption = dataset.raw(sample_id)
            captions.append(caption)
            if row in chosen:
                image_bytes, media_type = dataset.shown(image_bytes)
                encoded = base64.b64encode(image_bytes).decode()
                images.append({"row": row, "media_type": media_type, "base64": encoded})
        return {"captions": captions, "images": images}


def _replace(path: Path, content: str | bytes) -> None:
    """Write a file; without room for it, take away that of the evaluation before."""
    with going_on_without(str(path)):
        try:
            write_atomically(path, content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
