"""Shards as of DataCompDR, of deliberately small rows that say where they are from."""

import io
import json

import numpy as np

from tests.support.shards import caption, encode, picture, write_shard

DIMS = (3, 2)
SIDE = 20  # of the pictures
NUM_AUGMENTATIONS, NUM_SYNTHETIC = 4, 2


def row(sample_id, kind, number):
    """A row of both teachers, L2-normalised by teacher: another for each picture and text."""
    values = np.random.default_rng([sample_id, "image text".find(kind), number]).normal(size=5)
    parts = np.split(values, [DIMS[0]])
    return np.concatenate([part / np.linalg.norm(part) for part in parts]).astype(np.float32)


def augmentation(sample_id, number):
    """A crop, and operations that differ from sample to sample."""
    draw = np.random.default_rng([sample_id, number])
    rows, columns = (int(each) for each in draw.integers(8, SIDE + 1, 2))
    top, left = int(draw.integers(0, SIDE - rows + 1)), int(draw.integers(0, SIDE - columns + 1))
    return [[top, left, rows, columns], [[int(draw.integers(6, 10)), 0.3], [5, -9.0]]]


def synthetic(sample_id, number):
    return f"synthetic {number} of {sample_id}"


def npz(image, text, **options):
    buffer = io.BytesIO()
    save = np.savez_compressed if options.get("compressed") else np.savez
    save(buffer, image_emb=image, text_emb=text)
    return buffer.getvalue()


def members(sample_id, **changed):
    """Members of one sample; ``changed`` replaces arrays, lists or, by extension, whole members."""
    image = [row(sample_id, "image", number) for number in range(NUM_AUGMENTATIONS)]
    text = [row(sample_id, "text", number) for number in range(1 + NUM_SYNTHETIC)]
    listed = [augmentation(sample_id, number) for number in range(NUM_AUGMENTATIONS)]
    texts = [synthetic(sample_id, number) for number in range(NUM_SYNTHETIC)]
    found = {
        "png": encode(picture(sample_id, SIDE)),
        "txt": caption(sample_id).encode(),
        "url.txt": b"https://example.com/a.png",
        "json": json.dumps({"uid": f"{sample_id:032x}"}).encode(),
        "syn.json": json.dumps({"syn_text": changed.pop("syn_text", texts)}).encode(),
        "paug.json": json.dumps(
            {"param_aug": json.dumps(changed.pop("param_aug", listed))}
        ).encode(),
        "npz": npz(changed.pop("image_emb", np.stack(image)), changed.pop("text_emb", text)),
    }
    found |= {kind.replace("_", "."): data for kind, data in changed.items()}
    return {kind: data for kind, data in found.items() if data is not None}


def write_reinforced(folder, counts=(7, 5), bad=None):
    """Write shards; ``bad`` has changes by sample id."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for number, count in enumerate(counts):
        samples = [
            (f"{i:06d}", members(i, **(bad or {}).get(i, {}))) for i in range(first, first + count)
        ]
        paths.append(str(write_shard(folder / f"{number:05d}.tar", samples)))
        first += count
    return paths
