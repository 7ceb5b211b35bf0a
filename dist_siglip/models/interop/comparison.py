"""Features of an export against those of the model it was written from.

Pixels and captions go through our towers and tokenizer, and through what another library made of
the files. The largest difference of any entry of a feature is reported, and the lowest cosine.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dist_siglip.data.samples.patches import PatchBudget, pack_pictures, target_grid
from dist_siglip.errors import UserError
from dist_siglip.models.build import BuiltModel
from dist_siglip.models.dual_encoder import evaluation_mode

# Plain, with punctuation and capitals, with odd spaces, and longer than any context.
CAPTIONS = (
    "two dogs on a beach",
    "A Red car, parked outside (in 1987)!",
    "  three   spaces\tand a tab ",
    " ".join(["word"] * 300),
)


class Reader(NamedTuple):
    """A model as another library reads it; both features have length 1.

    Attributes:
        encode_image: (B, 3, H, W) normalised pixels, or packed patches of a NaFlex tower, to (B, D)
            features.
        encode_captions: B captions to (B, D) features, with the tokenizer that was written.
        encode_tokens: (B, L) token ids to (B, D) features, where the form takes tokens.
    """

    encode_image: Callable[[Tensor], Tensor]
    encode_captions: Callable[[list[str]], Tensor]
    encode_tokens: Callable[[Tensor], Tensor] | None = None


class Difference(NamedTuple):
    """Features of an export against ours, over a few pictures and captions.

    Attributes:
        largest: difference of an entry, not-a-number if a feature read back is none.
        lowest_cosine: of a feature and ours, likewise.
    """

    largest: float
    lowest_cosine: float


def compare(built: BuiltModel, reader: Reader) -> Difference:
    """Compare features of pixels and captions.

    Raises:
        UserError: If our own features are not numbers.
    """
    size = built.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    if built.patches is not None:
        images = _flexible(built.patches)
    captions = list(CAPTIONS)
    with torch.inference_mode(), evaluation_mode(built.encoder):
        ours = torch.cat(
            (
                built.encoder.encode_image(images),
                built.encoder.encode_text(built.tokenizer(captions)),
            )
        )
        if not ours.isfinite().all():
            raise UserError(
                "the features of this model are not numbers; name a checkpoint from before it "
                "diverged"
            )
        theirs = torch.cat((reader.encode_image(images), reader.encode_captions(captions)))
    lowest = float((ours * theirs).sum(1).min() if theirs.isfinite().all() else torch.nan)
    return Difference(float((ours - theirs).abs().max()), lowest)


def _flexible(budget: PatchBudget) -> Tensor:
    """Packed patches of random pictures: a square, a wide one, a high one and a strip."""
    generator = torch.Generator().manual_seed(0)
    side, num_patches = budget
    packed = []
    for height, width in ((100, 100), (100, 290), (300, 110), (10, 2000)):
        rows, columns = target_grid(height, width, side, num_patches)
        pixels = torch.randn(3, rows * side, columns * side, generator=generator)
        packed.append(pack_pictures(pixels, side, num_patches))
    return torch.stack(packed)
