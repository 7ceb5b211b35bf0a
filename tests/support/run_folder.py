"""A synthetic run folder: what a finished run leaves behind, without training anything."""

import base64
import io
import json

import numpy as np
from PIL import Image

from dist_siglip.runs import RunFolder
from dist_siglip.training.callbacks.evaluation_record import keep_evaluation

CAPTIONS = ("one two", "three four", "nine nine", "zero seven", "five", "six eight")


def png(seed):
    """A small noisy picture, as PNG bytes."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def metrics_lines(num_steps=60, every=2):
    """Training lines with a falling loss, and an evaluation every 20 steps."""
    lines = []
    for step in range(every, num_steps + 1, every):
        share = step / num_steps
        lines.append(
            {
                "step": step,
                "time": 1.7e9 + step,
                "train/loss": 4.0 * 0.02**share + 0.1 * np.sin(step),
                "train/logit_scale": 10 + 5 * share,
                "train/logit_bias": -10 + 2 * share,
                "train/relative_bias": (10 - 2 * share) / (10 + 5 * share),
                "train/pairs_per_second": 900.0 + step,
                "train/data_wait_percent": 20.0 + step / 10,
                "train/grad_norm": 5.0 - 4 * share,
                "train/learning_rate": 1e-3 * (1 - share),
                "train/substituted_samples": float(step // 20),
                "train/skipped_steps": float(step >= 40),
                "data/epochs": step * 64 / 1920,
            }
        )
        if step % 20 == 0:
            lines.append(
                {
                    "step": step,
                    "time": 1.7e9 + step,
                    "val/loss": 3.0 * 0.05**share,
                    "val/relative_bias": 0.5,
                    "val/image_to_text_recall@1": 0.8 * share,
                    "val/modality_gap": 1.0 - 0.4 * share,
                    "val/margin_5_95": 0.2 * share - 0.1,
                    "val/image_uniformity": -3.0 * share,
                    "val/image_effective_rank": 1 + 9 * share,
                }
            )
    return lines


def evaluation_metrics():
    """Numbers of a final evaluation."""
    numbers = {
        f"{direction}_{name}": value
        for direction in ("image_to_text", "text_to_image")
        for name, value in {
            "recall@1": 0.623,
            "recall@5": 0.871,
            "recall@10": 0.938,
            "median_rank": 1.0,
        }.items()
    }
    return numbers | {
        "step": 60,
        "loss": 0.4321,
        "modality_gap": 0.512,
        "relative_modality_gap": 0.21,
        "linear_separability": 1.0,
        "margin": -0.123,
        "relative_bias": 0.345,
        "margin_5_95": 0.045,
        "relative_bias_5_95": 0.31,
        "alignment": 0.4,
        "image_uniformity": -3.1,
        "text_uniformity": -3.2,
        "image_cosine": 0.1,
        "text_cosine": 0.2,
        "image_effective_rank": 9.5,
        "text_effective_rank": 6.5,
        "logit_scale": 15.0,
        "logit_bias": -8.0,
        "gallery_pairs": 120.0,
        "distinct_captions": 6.0,
    }


def evaluation_arrays(captions, width=16):
    """Features in which each caption has a direction, images apart from texts."""
    generator = np.random.default_rng(0)
    names = sorted(set(captions))
    directions = generator.normal(size=(len(names), width))
    own = directions[[names.index(caption) for caption in captions]]
    apart = generator.normal(size=width)

    def unit(rows):
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    images = unit(own + apart + 0.9 * generator.normal(size=own.shape))
    texts = unit(own - apart)
    cosines = images @ texts.T
    same = np.array(captions)[:, None] == np.array(captions)[None, :]
    edges = np.linspace(-1, 1, 20_001)
    return {
        "image_features": images,
        "text_features": texts,
        "sample_ids": np.arange(len(captions)),
        "caption_ids": np.array([names.index(caption) for caption in captions]),
        "image_to_text_ranks": np.ones(len(captions), dtype=np.int64),
        "text_to_image_ranks": np.ones(len(captions), dtype=np.int64),
        "histogram_edges": edges,
        "positive_histogram": np.histogram(cosines[same], edges)[0],
        "negative_histogram": np.histogram(cosines[~same], edges)[0],
    }


def write_history(folder, captions, steps=(20, 40, 60)):
    """What is kept of evaluations: the modalities come nearer to each other."""
    run, arrays = RunFolder(folder), evaluation_arrays(list(captions))
    images, texts = arrays["image_features"], arrays["text_features"]
    for step in steps:
        kept = arrays | {"image_features": images + (60 - step) / 30 * (images - texts).mean(0)}
        lengths = np.linalg.norm(kept["image_features"], axis=1, keepdims=True)
        kept["image_features"] = (kept["image_features"] / lengths).astype(np.float32)
        keep_evaluation(run, step, kept)


def write_benchmark(folder, name="handwriting", recall=0.75):
    """A result in the form of CLIP_benchmark."""
    path = folder / "benchmarks" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    metrics = {"image_retrieval_recall@5": recall, "not": "a number"}
    said = {"dataset": name, "task": "zeroshot_retrieval", "metrics": metrics, "step": 60}
    path.write_text(json.dumps(said))


def write_run(folder, captions=CAPTIONS * 20, num_images=8):
    """Write every file the report reads; returns the folder."""
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    lines = [json.dumps(line) for line in metrics_lines()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("model: tiny\ndata:\n  global_batch_size: 64\n")
    provenance = {"command": "dist-siglip fit", "world_size": 2}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    bad = [{"shard": "a.tar", "key": str(n), "reason": f"only {n} bytes"} for n in (7, 8, 9)]
    (folder / "bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    skipped = {"step": 33, "reason": "gradient norm 4e+03 is a spike"}
    (folder / "skipped_steps.jsonl").write_text(json.dumps(skipped) + "\n")
    (evaluation / "metrics.json").write_text(json.dumps(evaluation_metrics()))
    np.savez_compressed(evaluation / "arrays.npz", **evaluation_arrays(list(captions)))
    write_history(folder, captions)
    write_benchmark(folder)
    images = [
        {
            "row": row,
            "media_type": "image/png",
            "base64": base64.b64encode(png(row)).decode(),
        }
        for row in range(num_images)
    ]
    (evaluation / "examples.json").write_text(
        json.dumps({"captions": list(captions), "images": images})
    )
    return folder
