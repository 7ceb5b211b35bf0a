"""Pictures of a dense evaluation for the report: masks, and what was told of each patch."""

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup

from dist_siglip.data.samples.patches import unpack, unpack_pictures
from dist_siglip.distributed import gather_rows

_SHOWN = 4  # pictures in the report
_SHOWN_SIDE = 224  # pixels


class ShownPictures:
    """A few pictures with their patches as they are and as they are told to be.

    Args:
        num_pictures: of the split; those shown are spread over it.
    """

    def __init__(self, num_pictures: int) -> None:
        self._wanted = {num_pictures * place // _SHOWN for place in range(_SHOWN)}
        self._kept: list[tuple[Tensor, ...]] = []
        self._grid: tuple[int, int] | None = None
        self._panels: list[str] = []

    def add(
        self,
        numbers: Sequence[int],
        pixels: Tensor,
        maps: Mapping[str, Tensor],
        grid: tuple[int, int] | None,
    ) -> None:
        """Keep the wanted ones among the pictures of a batch.

        Args:
            numbers: of the B pictures.
            pixels: (B, 3, H, W) uint8, or packed patches.
            maps: by name, (B, T) classes of the patches; -1 for none.
            grid: rows and columns of the T patches; None of packed patches, which say their own.
        """
        self._grid, self._panels = grid, list(maps)
        rows = [row for row, number in enumerate(numbers) if number in self._wanted]
        found = torch.stack(list(maps.values()), dim=1)[rows]
        chosen = torch.tensor([numbers[row] for row in rows], device=found.device).long()
        self._kept.append((chosen, pixels[rows].to(found.device), found))

    def render(
        self, classes: Sequence[str], background: int | None, group: ProcessGroup | None
    ) -> list[dict[str, Any]]:
        """Draw each alone, and beside it with every map over it.

        Distributed contract: three ``gather_rows``; all ranks get the same.
        """
        numbers, pixels, maps = (
            gather_rows(torch.cat(each), group).cpu() for each in zip(*self._kept, strict=True)
        )
        examples = []
        for row in numbers.argsort().tolist():
            shown, grid, own = pixels[row], self._grid, maps[row]
            if grid is None:
                rows, columns = unpack(shown[None])[1][0].tolist()
                shown = unpack_pictures(shown[None])[0][0]
                grid, own = (rows, columns), own[:, : rows * columns]
            picture = shown.permute(1, 2, 0).numpy()
            labels = [each.reshape(grid).numpy() for each in own]
            panels = [picture, *(_overlay(picture, each, background) for each in labels)]
            seen = [number for number in own.unique().tolist() if number >= 0]
            examples.append(
                {
                    "media_type": "image/jpeg",
                    "base64": _encoded(panels),
                    "panels": ["picture", *self._panels],
                    "classes": [
                        {"name": classes[number], "colour": _hex(_colour(number))}
                        for number in seen
                        if number != background
                    ],
                }
            )
        return examples


def _overlay(
    picture: NDArray[np.uint8], labels: NDArray[np.int64], background: int | None
) -> NDArray[np.uint8]:
    """Tint each patch in the colour of its class, but for background; no class is white."""
    height, width = picture.shape[:2]
    rows = np.minimum(np.arange(height) * labels.shape[0] // height, labels.shape[0] - 1)
    columns = np.minimum(np.arange(width) * labels.shape[1] // width, labels.shape[1] - 1)
    own = labels[rows[:, None], columns]
    tint = np.zeros((height, width, 3))
    for label in np.unique(own).tolist():
        tint[own == label] = (255, 255, 255) if label < 0 else _colour(label)
    mixed = np.rint(0.4 * picture + 0.6 * tint).astype(np.uint8)
    return np.where((own == background)[:, :, None], picture, mixed)


def _colour(number: int) -> tuple[int, int, int]:
    """A colour that differs from those of the numbers near by: hues a golden section apart."""
    light = (0.95, 0.7)[number // 16 % 2]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, light)
    return round(255 * red), round(255 * green), round(255 * blue)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _encoded(panels: Sequence[NDArray[np.uint8]]) -> str:
    """Put pictures beside each other, none larger than the report has room for."""
    height, width = panels[0].shape[:2]
    scale = _SHOWN_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    gap, step = 4, size[0] + 4
    sheet = Image.new("RGB", (step * len(panels) - gap, size[1]), "white")
    for place, panel in enumerate(panels):
        sheet.paste(
            Image.fromarray(panel).resize(size, Image.Resampling.NEAREST), (place * step, 0)
        )
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=85)
    return base64.b64encode(stream.getvalue()).decode()
