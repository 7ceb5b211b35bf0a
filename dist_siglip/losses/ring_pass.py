"""What every trip around the ranks needs: checked arguments, wide sums, products of tiles."""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from dist_siglip.errors import UserError
from dist_siglip.losses.kernels.products import product, uses_onednn

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


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``, accumulating in its dtype."""
    if uses_onednn(left) and total.dtype == left.dtype:
        total += product(left, right.T)
    elif left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda" and total.dtype == torch.float32:
        # Tensor cores sum in float32: the product is not rounded before it is added.
        if _adds_half_products(left.dtype, left.device):
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        else:
            total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right


@lru_cache
def _adds_half_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch adds a product of half-precision matrices to a float32 matrix."""
    half = torch.zeros(8, 8, dtype=dtype, device=device)
    wide = torch.zeros(8, 8, device=device)
    try:
        torch.addmm(wide, half, half, out_dtype=wide.dtype, out=wide)
    except (RuntimeError, TypeError):  # older ones want the sum in the factors' dtype
        return False
    return True


def inner_product(features: Tensor, gradient: Tensor) -> Tensor:
    """Return the sum over all elements of features * gradient, in ``sum_dtype``."""
    total = gradient.new_zeros((), dtype=sum_dtype(features.device))
    # In pieces: the products of all rows would be as large as the gradient, and leave the caches.
    step = 256 if features.device.type == "cpu" else 4096
    for rows in range(0, features.shape[0], step):
        some = slice(rows, rows + step)
        total += (features[some] * gradient[some]).sum(dim=1).sum(dtype=total.dtype)
    return total


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype for sums over many tiles; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def product_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype in which a tile's derivative meets the features.

    Derivatives of negatives can be below the smallest fp16 number.
    """
    return torch.float32 if features.dtype == torch.float16 else features.dtype


def tile_slices(num_rows: int, num_columns: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut a rectangle into tiles of at most chunk_rows on a side, column by column.

    Example:
        >>> [(rows.start, columns.start) for rows, columns in tile_slices(3, 4, 2)]
        [(0, 0), (2, 0), (0, 2), (2, 2)]
    """
    for column in range(0, num_columns, chunk_rows):
        for row in range(0, num_rows, chunk_rows):
            yield slice(row, row + chunk_rows), slice(column, column + chunk_rows)


def describe_wanted(wanted: Mapping[str, bool]) -> str:
    """Name the gradients that are wanted, for the ranks to agree on.

    Example:
        >>> describe_wanted({"image": True, "text": False, "scale": True})
        'image, scale'
    """
    return ", ".join(name for name, is_wanted in wanted.items() if is_wanted) or "none"
