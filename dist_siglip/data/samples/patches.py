"""Pictures as rows of patches under a budget, their shape kept (NaFlex).

A picture is resized to the largest grid of patches, of nearly its own shape, that a budget allows.
It travels packed, as one tensor like any picture: row 0 says how many rows and columns of patches
there are, the others are patches, row by row, and zeros up to the budget. A patch is its pixels in
the order (row, column, colour).

Source:
    Tschannen et al. 2025 (SigLIP 2), arXiv:2502.14786, section 2.4.2.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_siglip.errors import UserError

MOST_PATCHES = 65_535  # rows and columns travel as two bytes each
LARGEST_ZOOM = 100  # a picture is enlarged at most so many times
_COLOURS = 3
_SHAPE_BYTES = 4  # rows and columns, the low byte first


class PatchBudget(NamedTuple):
    """What a tower of patches takes.

    Attributes:
        patch_size: side of a patch in pixels.
        num_patches: most patches of a picture where a batch does not say otherwise.
    """

    patch_size: int
    num_patches: int

    def check(self) -> "PatchBudget":
        """Return itself.

        Raises:
            UserError: if a budget holds no patch, or a patch is a single pixel.
        """
        if not isinstance(self.num_patches, int) or not 1 <= self.num_patches <= MOST_PATCHES:
            raise UserError(
                f"num_patches ({self.num_patches}) must be a whole number from 1 to {MOST_PATCHES}"
            )
        if self.patch_size < 2:
            raise UserError(f"patch_size ({self.patch_size}) of a NaFlex tower must be at least 2")
        return self


@lru_cache(maxsize=4096)
def target_grid(height: int, width: int, patch_size: int, num_patches: int) -> tuple[int, int]:
    """Return the rows and columns of patches that a picture is resized to.

    With zoom r a picture has ceil(height * r / p) rows and ceil(width * r / p) columns, at least
    one each. Of all r < 100 whose product is within the budget the largest counts. From (1, 1) on,
    the side whose next row or column begins at a smaller r grows, both on a tie, for as long as
    the product allows; integers, so exact.

    Args:
        height: of the picture in pixels, >= 1.
        width: likewise.
        patch_size: p.
        num_patches: the budget, >= 1.

    Example:
        >>> target_grid(480, 640, 16, 256), target_grid(256, 64, 8, 15)
        ((14, 18), (7, 2))

    Source:
        The limit of the bisection of big_vision's ``ops_naflex.py``, which stops 1e-5 before it: of
        pictures of thousands of pixels about one in 4000 has a row or column more here.
    """
    rows = columns = 1
    while True:
        # One row more begins behind r = rows * p / height.
        row_is_next = rows * width <= columns * height
        column_is_next = columns * height <= rows * width
        side, pixels = (rows, height) if row_is_next else (columns, width)
        more_rows, more_columns = rows + row_is_next, columns + column_is_next
        if side * patch_size >= LARGEST_ZOOM * pixels or more_rows * more_columns > num_patches:
            return rows, columns
        rows, columns = more_rows, more_columns


def pack_pictures(pixels: Tensor, patch_size: int, num_patches: int | None = None) -> Tensor:
    """Cut pictures of one size into patches.

    Args:
        pixels: (..., 3, H, W), sides multiples of the patch.
        patch_size: p.
        num_patches: N >= (H / p) (W / p); None is as many as there are.

    Returns:
        (..., 1 + N, 3 p^2) of the dtype of the pixels.

    Raises:
        UserError: if a side is no multiple of the patch.

    Example:
        >>> packed = pack_pictures(torch.zeros(2, 3, 32, 16, dtype=torch.uint8), 8, 10)
        >>> packed.shape, unpack(packed)[1].tolist()
        (torch.Size([2, 11, 192]), [[4, 2], [4, 2]])
    """
    *batch, _, height, width = pixels.shape
    if height % patch_size or width % patch_size:
        raise UserError(
            f"pictures of {height} x {width} pixels cannot be cut into patches of {patch_size}; "
            "resize them to multiples of it"
        )
    rows, columns = height // patch_size, width // patch_size
    cut = pixels.reshape(*batch, _COLOURS, rows, patch_size, columns, patch_size)
    first = len(batch)
    order = [first + axis for axis in (1, 3, 2, 4, 0)]
    patches = cut.permute(*range(first), *order).reshape(*batch, rows * columns, -1)
    shape = [rows % 256, rows // 256, columns % 256, columns // 256]
    head = torch.tensor(shape).to(pixels).expand(*batch, 1, _SHAPE_BYTES)
    head = F.pad(head, (0, patches.shape[-1] - _SHAPE_BYTES))
    padding = 0 if num_patches is None else num_patches - rows * columns
    return torch.cat([head, F.pad(patches, (0, 0, 0, padding))], dim=-2)


def side_of_patch(patches: Tensor) -> int:
    """Return the side in pixels of patches (..., 3 p^2)."""
    return math.isqrt(patches.shape[-1] // _COLOURS)


def kernel_of(matrix: Tensor) -> Tensor:
    """Kernel (C, 3, p, p) of a convolution from a matrix (C, 3 p^2) of flattened patches.

    Siglip2Model and timm's NaFlexVit flatten a patch row by row, its three colours last.
    """
    side = side_of_patch(matrix)
    return matrix.reshape(-1, side, side, _COLOURS).permute(0, 3, 1, 2).contiguous()


def is_packed(images: Tensor) -> bool:
    """Whether a batch of pictures is one of packed patches, not of pixels."""
    return images.ndim == 3


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return patches (B, N, 3 p^2) and rows and columns (B, 2) int64 of packed pictures."""
    shape = packed[:, 0, :_SHAPE_BYTES].long()
    return packed[:, 1:], shape[:, 0::2] + 256 * shape[:, 1::2]


def patch_mask(images: Tensor) -> Tensor | None:
    """Return (B, N) bool, True at patches that are no padding; None for pictures that have none.

    Example:
        >>> patch_mask(pack_pictures(torch.zeros(1, 3, 8, 16), 8, 3))
        tensor([[ True,  True, False]])
    """
    if not is_packed(images):
        return None
    patches, shapes = unpack(images)
    return mask_of(shapes, patches.shape[1])


def padding_of(images: Tensor) -> dict[str, Tensor]:
    """Return patches of a picture, and the share of padding in them; nothing where none has any.

    Example:
        >>> padding_of(pack_pictures(torch.zeros(1, 3, 8, 16), 8, 4))
        {'patches': tensor(4.), 'padding': tensor(0.5000)}
    """
    if not is_packed(images):
        return {}
    shapes, num_patches = unpack(images)[1].float(), images.shape[1] - 1
    used = shapes.prod(dim=1).mean() / num_patches
    return {"patches": used.new_tensor(num_patches), "padding": 1 - used}


def mask_of(shapes: Tensor, num_patches: int) -> Tensor:
    """Return (B, N) bool for rows and columns (B, 2): True at patches that are no padding."""
    places = torch.arange(num_patches, device=shapes.device)
    return places < shapes[:, :1] * shapes[:, 1:]


def unpack_pictures(packed: Tensor) -> list[Tensor]:
    """Put each packed picture together again, (1, 3, H, W) each, without its padding."""
    patches, shapes = unpack(packed)
    side = side_of_patch(packed)
    found = []
    for own, (rows, columns) in zip(patches, shapes.tolist(), strict=True):
        cut = own[: rows * columns].reshape(rows, columns, side, side, _COLOURS)
        pixels = cut.permute(4, 0, 2, 1, 3).reshape(1, _COLOURS, rows * side, columns * side)
        found.append(pixels)
    return found
