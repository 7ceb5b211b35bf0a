"""Arguments of a loss: checks, the default size of a tile, and the description ranks compare."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_siglip.errors import UserError

DEFAULT_CHUNK_ROWS = 1024
_GPU_CHUNK_ROWS = 4096
_FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def default_chunk_rows(device: torch.device) -> int:
    """Side of a tile that keeps a device busy and stays near its caches."""
    return DEFAULT_CHUNK_ROWS if device.type == "cpu" else _GPU_CHUNK_ROWS


def check_rows(**features: Tensor) -> None:
    """Raise ``UserError`` unless each named tensor is (B, D), real and with at least one column.

    Example:
        >>> check_rows(image_features=torch.eye(2))
    """
    for name, rows in features.items():
        if not isinstance(rows, Tensor):
            raise UserError(
                f"{name} is a {type(rows).__module__}.{type(rows).__name__} and must be a tensor; "
                "torch.as_tensor makes one of an array"
            )
        if rows.dtype not in _FEATURE_DTYPES:
            raise UserError(
                f"{name} ({rows.dtype}) must be float32, float64, bfloat16 or float16; "
                "L2-normalised features are"
            )
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise UserError(f"{name} {tuple(rows.shape)} must be (B, D) with D of at least 1")


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Raise ``UserError`` unless both sides are (B, D) of one dtype."""
    check_rows(image_features=image_features, text_features=text_features)
    if image_features.shape != text_features.shape:
        raise UserError(
            f"image_features {tuple(image_features.shape)} and text_features "
            f"{tuple(text_features.shape)} must both be (B, D), row i of one belonging to row i "
            "of the other"
        )
    if image_features.dtype != text_features.dtype:
        raise UserError(
            f"image_features ({image_features.dtype}) and text_features ({text_features.dtype}) "
            "must have one dtype; cast one of them"
        )


def check_scalar(name: str, value: Tensor | None) -> None:
    """Raise ``UserError`` unless ``value`` is None or a tensor with one real element."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise UserError(f"{name} ({value!r}) must be a tensor with one element: torch.tensor(10.0)")
    if value.numel() != 1:
        raise UserError(f"{name} {tuple(value.shape)} must have one element")
    if value.is_complex() or value.dtype == torch.bool:
        raise UserError(f"{name} ({value.dtype}) must be a real number")


def check_chunk_rows(chunk_rows: int) -> None:
    """Raise ``UserError`` unless a tile has at least one row."""
    if chunk_rows < 1:
        raise UserError(f"chunk_rows ({chunk_rows}) must be at least 1")


def refuse_second_order(name: str) -> None:
    """Raise in a backward under create_graph=True.

    The saved gradients are constants to autograd: a second derivative would be zero.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has first-order gradients only; call backward or "
            "torch.autograd.grad without create_graph=True"
        )


def describe_wanted(wanted: Mapping[str, bool]) -> str:
    """Name the gradients that are wanted, for the ranks to agree on.

    Example:
        >>> describe_wanted({"image": True, "text": False, "scale": True})
        'image, scale'
    """
    return ", ".join(name for name, is_wanted in wanted.items() if is_wanted) or "none"
