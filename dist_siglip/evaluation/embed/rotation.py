"""A rotation of embeddings after training, so that their first columns hold most of the pictures.

Fitted once for a folder, ``rotation.safetensors``, and taken over for others: rows that are
compared must be turned alike. Ranks that fit it at the same time need not talk: the first file
stays, and all read it.
"""

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.metrics.prefixes import pca_rotation
from dist_siglip.models.build import BuiltModel, tower_fingerprint
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.process_lock import hold
from dist_siglip.system.regular_file import check_regular, read_regular

_LOGGER = logging.getLogger(__name__)

PCA = "pca"
ROTATION_PICTURES = 16_384
ROTATION_FILE = "rotation.safetensors"
_MOST_BYTES = 2**30
_TOWER = "image_tower"


def name_rotation(rotate: str) -> str:
    """Name a rotation for the manifest of a folder: "pca", or the digest of a file.

    Raises:
        UserError: if the file cannot be read.
    """
    if rotate == PCA:
        return PCA
    try:
        return hashlib.sha256(read_regular(Path(rotate), _MOST_BYTES)).hexdigest()[:16]
    except OSError as error:
        raise UserError(
            f"rotate ({rotate}) must be {PCA} or a {ROTATION_FILE} that embed wrote: "
            f"{error.strerror or error}"
        ) from error


def find_rotation(
    rotate: str, folder: Path, built: BuiltModel, pictures: Callable[[], Tensor]
) -> Tensor:
    """Read the rotation of a folder or a file; fit that of a new folder.

    Args:
        rotate: "pca", or the path of a file.
        folder: of the embeddings.
        built: the model.
        pictures: gives the image features to fit to, (n, D).

    Returns:
        (D, D) float32, orthonormal columns.

    Raises:
        UserError: if the file is damaged, of another model, or cannot be written.
    """
    path = folder / ROTATION_FILE if rotate == PCA else Path(rotate)
    tower = tower_fingerprint(built, "image")
    if rotate == PCA and not path.exists():
        features = pictures()
        _LOGGER.info("fitted a rotation to %d pictures", len(features))
        tensors = {"rotation": pca_rotation(features).float().contiguous()}
        write_first(path, save(tensors, metadata={_TOWER: tower}))
    return _read(path, built.embed_dim, tower)


def write_first(path: Path, content: bytes) -> None:
    """Write a file, whole, unless another rank has meanwhile.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with hold(str(path.parent / ".lock"), path.name, math.inf):
            if not path.exists():
                write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _read(path: Path, width: int, tower: str) -> Tensor:
    try:
        check_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            rotation: Tensor = file.get_tensor("rotation").float()
            of_tower = (file.metadata() or {}).get(_TOWER)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"rotate ({path}) cannot be read ({reason}); fit it anew") from error
    if of_tower != tower or rotation.shape != (width, width):
        raise UserError(
            f"rotate ({path}) was fitted to another model; embed the pictures of this one with "
            f"--rotate {PCA}"
        )
    largest = (rotation.T @ rotation - torch.eye(width)).abs().max()
    if not largest < 1e-4:  # not-a-number fails, too
        raise UserError(f"rotate ({path}) is no rotation: it is damaged; fit it anew")
    return rotation
