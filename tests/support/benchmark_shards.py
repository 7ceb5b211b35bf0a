"""Shards of benchmarks: labelled pictures, and pictures with several captions."""

import json

from tests.support.shards import encode, picture, write_shard

CLASSES = ("zero", "one", "two", "three", "four", "five")
TEMPLATES = ("a photo of {c}.", "the number {}")


def label_of(sample_id):
    """The last class never occurs; the others in uneven numbers."""
    return min(sample_id * sample_id % 7, len(CLASSES) - 2)


def captions_of(sample_id):
    """One to three captions; sample 5 has one of sample 2's."""
    texts = [f"picture {sample_id} seen {way}" for way in range(1 + sample_id % 3)]
    return [*texts, "picture 2 seen 1"] if sample_id == 5 else texts


def write_labelled(folder, counts=(7, 5, 1), label=label_of):
    """CLIP_benchmark's layout: test/0.tar ..., classnames.txt and templates one folder above."""
    paths = _write(folder, counts, lambda i: {"cls": str(label(i)).encode()})
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return paths


def write_captioned(folder, counts=(7, 5, 1), as_json=False):
    """Captions as lines of a .txt, or as a list in a .json."""

    def members(i):
        if as_json:
            return {"json": json.dumps({"caption": captions_of(i)}).encode()}
        return {"txt": "\n".join(captions_of(i)).encode()}

    return _write(folder, counts, members)


def _write(folder, counts, members):
    (folder / "test").mkdir(parents=True)
    paths, first = [], 0
    for number, count in enumerate(counts):
        samples = [
            (f"{i:04d}", {"png": encode(picture(i)), **members(i)})
            for i in range(first, first + count)
        ]
        paths.append(str(write_shard(folder / "test" / f"{number}.tar", samples)))
        first += count
    return paths
