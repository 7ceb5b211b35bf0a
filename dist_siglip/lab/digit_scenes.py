"""Pictures of two handwritten digits at known places, and towers small enough for them.

A picture has 16 x 16 pixels and 16 patches; a digit of scikit-learn (8 x 8 pixels) covers four of
them, at one of nine places. Its caption names both digits, the smaller first: there are 55. No
handwriting of the pictures for evaluation is in one for training.
"""

from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip import CustomTextCLIP
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dist_siglip.losses.logit_scale import START_BIAS, START_SCALE
from dist_siglip.models import BuiltModel, DualEncoder

BACKGROUND, NUM_CLASSES = 10, 11  # of patches
DIMENSION = 32  # of the features
_SIDE, _PATCH, _DIGIT = 16, 4, 8  # pixels
_PLACES = [(top, left) for top in (0, 4, 8) for left in (0, 4, 8)]
_NUM_TRAIN_DIGITS = 1300
_HEAD_WIDTH = 16
_POSITION_STD = 0.5  # at timm's 0.02 places are not learned in a short training
_PAD, _END, _FIRST_DIGIT = 0, 1, 2
_LENGTH, _VOCABULARY = 3, 12  # of captions


class Scenes(NamedTuple):
    """N pictures and what is known of them.

    Attributes:
        pictures: (N, 1, 16, 16) float32, ink from -0.5 to 2.
        digits: (N, 2) int64, the smaller first.
        boxes: (N, 2, 4) float32 of these digits: top, left, bottom, right in shares of the picture.
        patch_labels: (N, 16) int64, the digit on each patch, or ``BACKGROUND``.
    """

    pictures: Tensor
    digits: Tensor
    boxes: Tensor
    patch_labels: Tensor

    @property
    def caption_ids(self) -> Tensor:
        """(N,) int64; equal captions have equal ids."""
        return self.digits[:, 0] * 10 + self.digits[:, 1]

    def pixels(self, rows: Tensor | slice) -> Tensor:
        """(n, 3, 16, 16), as image towers take them."""
        return self.pictures[rows].expand(-1, 3, -1, -1)


def draw_scenes(count: int, *, is_training: bool, seed: int) -> Scenes:
    """Draw pictures: two digits that do not touch, at random places, on a noisy ground.

    Example:
        >>> scenes = draw_scenes(3, is_training=True, seed=0)
        >>> scenes.patch_labels.shape, int((scenes.patch_labels < BACKGROUND).sum())
        (torch.Size([3, 16]), 24)
    """
    from sklearn.datasets import load_digits

    generator = np.random.default_rng([seed, is_training])
    found = load_digits()
    rows = _handwriting(len(found.target), is_training=is_training)
    rows = rows[generator.integers(len(rows), size=(count, 2))]
    digits = found.target[rows]
    by_size = digits.argsort(axis=1, kind="stable")
    rows, digits = (np.take_along_axis(each, by_size, axis=1) for each in (rows, digits))
    apart = [
        pair
        for pair in permutations(_PLACES, 2)
        if max(abs(a - b) for a, b in zip(*pair, strict=True)) >= _DIGIT
    ]
    corners = np.array(apart)[generator.integers(len(apart), size=count)]  # (N, 2, 2) top, left
    pictures = 0.1 * generator.random((count, _SIDE, _SIDE))
    labels = np.full((count, _SIDE // _PATCH, _SIDE // _PATCH), BACKGROUND)
    for which in range(2):
        pixels = _window(corners[:, which], _DIGIT)
        pictures[pixels] = np.maximum(pictures[pixels], found.images[rows[:, which]] / 16)
        patches = _window(corners[:, which] // _PATCH, _DIGIT // _PATCH)
        labels[patches] = digits[:, which, None, None]
    boxes = np.concatenate([corners, corners + _DIGIT], axis=2) / _SIDE
    return Scenes(
        pictures=_normalised(pictures),
        digits=torch.from_numpy(digits),
        boxes=torch.from_numpy(boxes).float(),
        patch_labels=torch.from_numpy(labels).flatten(1),
    )


def draw_repeated(count: int, *, is_training: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pictures of one digit four times, in another handwriting each; every crop shows it.

    Returns:
        (N, 1, 16, 16) pictures, (N,) digits.

    Example:
        >>> pictures, digits = draw_repeated(3, is_training=True, seed=0)
        >>> pictures.shape, digits.shape
        (torch.Size([3, 1, 16, 16]), torch.Size([3]))
    """
    from sklearn.datasets import load_digits

    generator = np.random.default_rng([seed, is_training])
    found = load_digits()
    rows = _handwriting(len(found.target), is_training=is_training)
    digits = generator.integers(10, size=count)
    written = np.empty((count, 4, _DIGIT, _DIGIT))
    for digit in range(10):
        own = rows[found.target[rows] == digit]
        here = np.flatnonzero(digits == digit)
        written[here] = found.images[own[generator.integers(len(own), size=(len(here), 4))]]
    by_place = written.reshape(count, 2, 2, _DIGIT, _DIGIT).transpose(0, 1, 3, 2, 4)
    ground = 0.1 * generator.random((count, _SIDE, _SIDE))
    pictures = np.maximum(ground, by_place.reshape(count, _SIDE, _SIDE) / 16)
    return _normalised(pictures), torch.from_numpy(digits)


def _handwriting(count: int, *, is_training: bool) -> NDArray[np.int64]:
    """Rows of scikit-learn's digits to train on, or the others."""
    order = np.random.default_rng(0).permutation(count)
    return order[:_NUM_TRAIN_DIGITS] if is_training else order[_NUM_TRAIN_DIGITS:]


def _normalised(pictures: NDArray[np.float64]) -> Tensor:
    """(N, 1, 16, 16) of ink from 0 to 1."""
    return torch.from_numpy((pictures - 0.2) / 0.4).float()[:, None]


def _window(corners: NDArray[np.int64], side: int) -> tuple[NDArray[np.int64], ...]:
    """Index of a square of each picture, by its (N, 2) upper left corners."""
    along = np.arange(side)
    rows = corners[:, 0, None, None] + along[:, None]
    columns = corners[:, 1, None, None] + along
    return np.arange(len(corners))[:, None, None], rows, columns


def tokenize(texts: list[str]) -> Tensor:
    """Turn digits with blanks between them into rows of ids.

    Example:
        >>> tokenize(["3 7", "4"])
        tensor([[5, 9, 1],
                [6, 1, 0]])
    """
    rows = torch.full((len(texts), _LENGTH), _PAD)
    for row, text in zip(rows, texts, strict=True):
        ids = [_FIRST_DIGIT + int(word) for word in text.split()]
        row[: len(ids) + 1] = torch.tensor([*ids, _END])
    return rows


def token_table() -> tuple[Tensor, Tensor]:
    """Return the rows of all captions by caption id, (100, L), and of all digits, (10, 1).

    Those of digits are cut before the end, so that a box follows the digit it belongs to.
    """
    captions = tokenize([f"{first} {second}" for first in range(10) for second in range(10)])
    return captions, tokenize([str(digit) for digit in range(10)])[:, :1]


def build_digit_towers(width: int, seed: int) -> BuiltModel:
    """Build a vision transformer of timm and a text transformer of open_clip, at random.

    Args:
        width: channels of both, a multiple of 16; three blocks for pictures, two for texts.
        seed: of their values.
    """
    text_config = {
        "context_length": _LENGTH,
        "vocab_size": _VOCABULARY,
        "width": width,
        "heads": width // _HEAD_WIDTH,
        "layers": 2,
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # open_clip builds timm's towers by name alone; one of these sizes has none.
        named = {"image_size": _SIDE, "timm_model_name": "test_vit", "timm_pool": "map"}
        network = CustomTextCLIP(
            embed_dim=DIMENSION,
            vision_cfg={**named, "timm_proj": "none"},
            text_cfg=text_config,
        )
        trunk = VisionTransformer(
            img_size=_SIDE,
            patch_size=_PATCH,
            num_classes=DIMENSION,
            global_pool="map",
            class_token=False,
            embed_dim=width,
            depth=3,
            num_heads=width // _HEAD_WIDTH,
            weight_init="skip",
        )
        nn.init.normal_(trunk.pos_embed, std=_POSITION_STD)
    assert isinstance(network.visual, TimmModel)
    network.visual.trunk = trunk
    encoder = DualEncoder(network)
    return BuiltModel(
        encoder=encoder,
        embed_dim=DIMENSION,
        image_size=_SIDE,
        mean=(0.2, 0.2, 0.2),
        std=(0.4, 0.4, 0.4),
        interpolation="bicubic",
        resize_mode="squash",
        context_length=_LENGTH,
        tokenizer=tokenize,
        start_scale=START_SCALE,
        start_bias=START_BIAS,
        random_parameters=frozenset(name for name, _ in encoder.named_parameters()),
        architecture={"embed_dim": DIMENSION, "text_cfg": text_config},
    )
