"""Do these embeddings belong into this folder?

``embed.json`` says what decides the numbers: weights, preprocessing, shards, number format. Another
model, or shards that changed, go into another folder. Ranks need not talk: all of them find the
same file, or write the same one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_siglip.errors import UserError
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import read_json

_NAME = "embed.json"


def claim_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write what decides the numbers into a new folder, or compare it with what is there.

    Args:
        folder: made if missing.
        identity: plain values by name.

    Raises:
        UserError: if the folder holds something else, or cannot be written.
    """
    manifest = folder / _NAME
    now = json.loads(json.dumps(identity))
    try:
        if not manifest.exists():
            _check_empty(folder)
            write_atomically(manifest, json.dumps(now, indent=2) + "\n")
        before = dict(read_json(manifest))
    except OSError as error:
        raise UserError(f"out ({folder}) cannot be used: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{manifest} is damaged; give a new folder") from error
    changes = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise UserError(
            f"out ({folder}) holds other embeddings: {'; '.join(changes)}; give a new folder, or "
            "the same model, shards and settings"
        )


def _check_empty(folder: Path) -> None:
    """Refuse a folder that holds anything but what another rank has begun this moment."""
    found = sorted(os.listdir(folder)) if folder.exists() else []
    visible = [name for name in found if not name.startswith(".")]
    if visible and not (folder / _NAME).exists():
        raise UserError(f"out ({folder}) holds {visible[0]!r} and no {_NAME}; give a new folder")
