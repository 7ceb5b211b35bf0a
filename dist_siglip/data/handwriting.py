"""Where do real pictures with captions come from when there is no network?

scikit-learn ships 1,797 digits written by hand (8 x 8 pixels, 17 grey levels). Four of them set in a
row make the picture of a number, and English spells the number out: "four thousand seven hundred
twelve". The pairs are many (9,000 numbers times the choice of handwriting, place, size and colour),
the task is honest (reading handwriting never seen in training), and the writing takes seconds.

Two splits keep the gallery honest: the handwriting samples of the validation pairs never occur in a
training picture, and neither do the numbers of the validation captions. Pictures are a function of
(seed, split, shard) alone, so equal arguments give equal bytes.
"""

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.errors import UserError

_LOGGER = logging.getLogger(__name__)

_FORMAT_VERSION = 1  # raised whenever equal arguments give other bytes
_MANIFEST = "manifest.json"
_VALIDATION_FRACTION = 0.2
_CHUNK_PAIRS = 256  # pictures composed at a time; bounds memory
_STREAMS = {"split": 0, "numbers": 1, "train": 2, "val": 3}  # independent random streams of one seed
_UNITS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
_UNITS += ("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True, kw_only=True)
class HandwritingShards:
    """Where the shards are, as brace patterns that webdataset expands.

    Attributes:
        train: Pattern of the training shards.
        val: Pattern of the validation shards.
    """

    train: str
    val: str


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """Everything the bytes depend on; the manifest holds it."""

    format_version: int
    num_train_pairs: int
    num_val_pairs: int
    num_train_shards: int
    digits_per_image: int
    image_size: int
    seed: int


class _Handwriting(NamedTuple):
    """The digits of scikit-learn: ink (S, 8, 8) in [0, 1] and class (S,)."""

    ink: NDArray[np.float32]
    classes: NDArray[np.int64]


def number_in_words(value: int, num_digits: int) -> str:
    """Spell out a whole number of ``num_digits`` decimal digits, without hyphens or "and".

    Numbers do not start with zero, so the words and the digits determine each other.

    Args:
        value: The number, with exactly ``num_digits`` digits and no leading zero.
        num_digits: 1 to 6.

    Returns:
        Lower-case English words separated by single spaces.

    Raises:
        UserError: If ``num_digits`` is out of range or ``value`` has another number of digits.

    Example:
        >>> number_in_words(4712, 4)
        'four thousand seven hundred twelve'
        >>> number_in_words(8005, 4), number_in_words(340, 3), number_in_words(90, 2)
        ('eight thousand five', 'three hundred forty', 'ninety')
    """
    lowest, highest = _number_range(num_digits)
    if not lowest <= value < highest:
        raise UserError(
            f"value ({value}) must have {num_digits} digits and no leading zero; "
            f"use {lowest} to {highest - 1}"
        )
    thousands, rest = divmod(value, 1000)
    words = [*_words_below_thousand(thousands), "thousand"] if thousands else []
    return " ".join(words + _words_below_thousand(rest))
