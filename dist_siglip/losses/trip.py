"""What every trip around the ranks needs: checked arguments, wide sums, products of tiles."""

import torch
from torch import Tensor

from dist_siglip.errors import UserError

DEFAULT_CHUNK_ROWS = 1024


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Raise ``UserError`` unless both sides are (B, D) of one dtype."""
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
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
    """Raise ``UserError`` unless ``value`` is None or has one element."""
    if value is not None and value.numel() != 1:
        raise UserError(f"{name} {tuple(value.shape)} must have one element")


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


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``, accumulating in its dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def inner_product(features: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum over all elements of features * gradient, in ``sum_dtype``."""
    return (features * gradient).sum(dim=1).sum(dtype=sum_dtype(features.device))


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype for sums over many tiles; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def product_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype in which a tile's derivative meets the features.

    Derivatives of negatives can be below the smallest fp16 number.
    """
    return torch.float32 if features.dtype == torch.float16 else features.dtype
