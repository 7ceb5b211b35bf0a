"""Tables of emoji pictures and their words, and the model that learns them.

    python emoji.py PACKAGES TABLES MODEL_JSON TEXT_TOWER

PACKAGES holds the unpacked packages emoji-datasource-google, -twitter, -facebook, -apple and
emojilib. TABLES gets ``train.jsonl`` (three vendors) and ``val.jsonl`` (Apple's drawings under
their names). Skin tones are left out: there is one drawing of each emoji and vendor. TEXT_TOWER is
a folder of transformers, whose features are the space that the pictures are to learn.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRAIN = ("google", "twitter", "facebook")
VAL = "apple"  # has 1,908 of the 1,911 emoji
MOST_KEYWORDS = 6


def read_keywords(packages: Path) -> dict[str, list[str]]:
    """Read emojilib's words of each emoji, by its characters without variation selectors."""
    text = (packages / "emojilib/dist/emoji-en-US.json").read_text(encoding="utf-8")
    return {
        characters.replace("\ufe0f", ""): [word.replace("_", " ").strip() for word in words]
        for characters, words in json.loads(text).items()
    }


def captions(emoji: dict[str, Any], keywords: dict[str, list[str]]) -> list[str]:
    """List what a drawing is called: its name, and the name with other words for it."""
    name = emoji["name"].lower()
    characters = "".join(chr(int(code, 16)) for code in emoji["unified"].split("-"))
    words = [short.replace("_", " ").replace("-", " ") for short in emoji["short_names"]]
    words += keywords.get(characters.replace("\ufe0f", ""), [])
    words = [word for word in dict.fromkeys(words) if word != name][:MOST_KEYWORDS]
    return [name, *([f"{name}, {', '.join(words)}"] if words else [])]


def rows(
    packages: Path, vendor: str, keywords: dict[str, list[str]], most: int
) -> Iterator[dict[str, str]]:
    """Yield a row for each drawing of a vendor and each of its first captions."""
    folder = f"emoji-datasource-{vendor}"
    for emoji in json.loads((packages / folder / "emoji.json").read_text(encoding="utf-8")):
        if emoji[f"has_img_{vendor}"]:
            picture = f"{folder}/img/{vendor}/64/{emoji['image']}"
            for caption in captions(emoji, keywords)[:most]:
                yield {"image": picture, "caption": caption}


def model(text_tower: str) -> dict[str, Any]:
    """Return a vision transformer of 48 pixels, 3 layers and width 96, beside a text tower."""
    return {
        "embed_dim": 384,
        "vision_cfg": {
            "image_size": 48,
            "layers": 3,
            "width": 96,
            "head_width": 32,
            "patch_size": 8,
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
    keywords = read_keywords(packages)
    train = [row for vendor in TRAIN for row in rows(packages, vendor, keywords, most=2)]
    val = list(rows(packages, VAL, keywords, most=1))
    for name, table in (("train", train), ("val", val)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        (tables / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model_json.write_text(json.dumps(model(text_tower), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
