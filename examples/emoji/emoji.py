"""Tables of emoji pictures and their words, and the model that learns them.

    python emoji.py PACKAGES TABLES MODEL_JSON TEXT_TOWER

PACKAGES holds the unpacked packages emoji-datasource-google, -twitter, -facebook and -apple. TABLES
gets ``train.jsonl`` (drawings of three vendors and their names) and ``val.jsonl`` (Apple's). Skin
tones are left out: there is one drawing of each emoji and vendor. TEXT_TOWER is a folder of
transformers, whose features are the space that the pictures are to learn.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRAIN = ("google", "twitter", "facebook")
VAL = "apple"  # has 1,908 of the 1,911 emoji


def rows(packages: Path, vendor: str) -> Iterator[dict[str, str]]:
    """Yield a row for each drawing of a vendor: the file, and its name."""
    folder = f"emoji-datasource-{vendor}"
    for emoji in json.loads((packages / folder / "emoji.json").read_text(encoding="utf-8")):
        if emoji[f"has_img_{vendor}"]:
            picture = f"{folder}/img/{vendor}/64/{emoji['image']}"
            yield {"image": picture, "caption": emoji["name"].lower()}


def model(text_tower: str) -> dict[str, Any]:
    """Return a vision transformer of 48 pixels, 3 layers and width 96, beside a text tower."""
    return {
        "embed_dim": 384,
        "vision_cfg": {
            "image_size": 48,
            "layers": 3,
            "width": 96,
            "head_width": 32,
            "patch_size": 24,
            "pool_type": "avg",
        },
        "text_cfg": {
            "hf_model_name": text_tower,
            "hf_proj_type": None,  # its own space: rows can be read from disk
            "hf_pooler_type": "mean_pooler",
            "context_length": 32,
        },
    }


def main(packages: Path, tables: Path, model_json: Path, text_tower: str) -> None:
    """Write the tables and the model."""
    tables.mkdir(parents=True, exist_ok=True)
    train = [row for vendor in TRAIN for row in rows(packages, vendor)]
    val = list(rows(packages, VAL))
    for name, table in (("train", train), ("val", val)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        (tables / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model_json.write_text(json.dumps(model(text_tower), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
