"""A fusion head as one safetensors file, which says whose tokens it reads.

A head is worth nothing without the towers it was trained on: their digests stand in the file, and
another model is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
from safetensors import SafetensorError

from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.depth import Tower
from dist_siglip.models.digest import digest_tower
from dist_siglip.models.fusion import FusionConfig, FusionHead
from dist_siglip.models.tokens import token_shapes
from dist_siglip.models.weights_file import refuse_not_finite
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import check_regular

_FORMAT = "dist_siglip fusion head 1"


def digest_towers(built: BuiltModel) -> dict[Tower, str]:
    """Hash both towers; see ``digest_tower``."""
    return {"image": digest_tower(built, "image"), "text": digest_tower(built, "text")}


def write_head(path: Path, head: FusionHead, built: BuiltModel) -> None:
    """Write a head whole; nothing of the towers but their digests."""
    about = {
        "format": _FORMAT,
        "config": json.dumps(asdict(head.config)),
        "towers": json.dumps(digest_towers(built)),
    }
    tensors = {name: value.contiguous().cpu() for name, value in head.state_dict().items()}
    write_atomically(path, safetensors.torch.save(tensors, metadata=about))


def read_head(path: Path, built: BuiltModel) -> FusionHead:
    """Read a head for the model it was trained on; on the CPU, in evaluation mode.

    Raises:
        UserError: if the file is missing or damaged, is no head, has an entry that is not finite,
            or is of another model.
    """
    try:
        check_regular(path)
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"head ({path}) cannot be read ({' '.join(str(error).split())[:120]}); name the file "
            "that rerank wrote"
        ) from error
    if about.get("format") != _FORMAT:
        raise UserError(f"{path} is no fusion head; name the file that rerank wrote")
    refuse_not_finite(tensors, f"head ({path})")
    check_towers(json.loads(about["towers"]), digest_towers(built), f"head ({path})")
    shapes = token_shapes(built)
    config = FusionConfig(**json.loads(about["config"]))
    head = FusionHead(shapes["image"], shapes["text"], config)
    head.load_state_dict(tensors)
    return head.eval()


def check_towers(recorded: Mapping[str, str], now: Mapping[Tower, str], what: str) -> None:
    """Check that tokens come from the towers they came from in training.

    Args:
        recorded: digests of then.
        now: digests of the model at hand.
        what: who reads the tokens, for the error.

    Raises:
        UserError: if a tower is another.
    """
    changed = [name for name, digest in now.items() if recorded.get(name) != digest]
    if changed:
        raise UserError(
            f"{what} reads the tokens of another {' and '.join(changed)} tower; name the model it "
            "was trained with"
        )
