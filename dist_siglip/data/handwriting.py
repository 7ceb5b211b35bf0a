"""Pictures with captions for tests and the quickstart, without a network.

scikit-learn ships 1,797 digits written by hand (8 x 8 pixels, 17 grey levels). Four of them in a
row make the picture of a number, and English spells it out: "four thousand seven hundred twelve".

Neither the handwriting nor the numbers of the validation pairs occur in a training pair. Pictures
are a function of (seed, split, shard) alone, so equal arguments give equal bytes.
"""

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_siglip.errors import UserError
from dist_siglip.system.atomic import write_atomically
from dist_siglip.system.regular_file import read_json

_LOGGER = logging.getLogger(__name__)

MOST_DIGITS = 6

_UNITS = (
    *("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

_VALUES = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS)
}


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
    lowest, highest = number_range(num_digits)
    if not lowest <= value < highest:
        raise UserError(
            f"value ({value}) must have {num_digits} digits and no leading zero; "
            f"use {lowest} to {highest - 1}"
        )
    thousands, rest = divmod(value, 1000)
    words = [*_words_below_thousand(thousands), "thousand"] if thousands else []
    return " ".join(words + _words_below_thousand(rest))


def number_from_words(text: str) -> int | None:
    """Read what ``number_in_words`` writes; None for any other text.

    Example:
        >>> number_from_words("four thousand seven hundred twelve"), number_from_words("a cat")
        (4712, None)
    """
    thousands, rest = 0, 0
    for word in text.split():
        if word == "thousand":
            thousands, rest = rest, 0
        elif word == "hundred":
            rest *= 100
        else:
            rest += _VALUES.get(word, 0)
    value = 1000 * thousands + rest
    num_digits = len(str(value))
    is_number = value > 0 and num_digits <= MOST_DIGITS
    return value if is_number and number_in_words(value, num_digits) == text else None


def number_range(num_digits: int) -> tuple[int, int]:
    """Return the half-open range of the numbers of ``num_digits`` digits, without a leading zero.

    Example:
        >>> number_range(4)
        (1000, 10000)
    """
    if not 1 <= num_digits <= MOST_DIGITS:
        raise UserError(f"num_digits ({num_digits}) must be 1 to {MOST_DIGITS}; use 4")
    return 10 ** (num_digits - 1), 10**num_digits


def _words_below_thousand(value: int) -> list[str]:
    """Spell out 0 to 999, with no words for 0."""
    hundreds, rest = divmod(value, 100)
    words = [_UNITS[hundreds], "hundred"] if hundreds else []
    if rest < 20:
        return words + [_UNITS[rest]] * (rest > 0)
    return [*words, _TENS[rest // 10], *[_UNITS[rest % 10]] * (rest % 10 > 0)]


DIGITS = ("zero", *_UNITS[1:10])
NO_DIGIT = -1  # of masks, where two digits meet
_INK = 0.1  # of black, from which on a pixel of a digit is inside of its box
_FORMAT_VERSION = 1  # raised whenever equal arguments give other bytes
_MANIFEST = "manifest.json"
_VALIDATION_FRACTION = 0.2
_CHUNK_PAIRS = 256  # pictures composed at a time; bounds memory
_STREAMS = {
    "split": 0,
    "numbers": 1,
    "train": 2,
    "val": 3,
    "masks of train": 4,
    "masks of val": 5,
}  # independent random streams of one seed


@dataclass(frozen=True, kw_only=True)
class HandwritingShards:
    """Where the shards are."""

    train: list[str]
    val: list[str]


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
    regions: bool

    def facts(self) -> dict[str, Any]:
        """What a manifest says; without regions, what it said before there were any."""
        return {name: value for name, value in asdict(self).items() if value is not False}


class _Handwriting(NamedTuple):
    """The digits of scikit-learn: ink (S, 8, 8) in [0, 1] and class (S,)."""

    ink: NDArray[np.float32]
    classes: NDArray[np.int64]


def write_handwriting_shards(
    folder: str | Path,
    *,
    num_train_pairs: int = 20480,
    num_val_pairs: int = 500,
    num_train_shards: int = 8,
    digits_per_image: int = 4,
    image_size: int = 64,
    seed: int = 0,
    regions: bool = False,
) -> HandwritingShards:
    """Write webdataset shards of handwritten numbers and their names, once.

    Every pair is three members: ``<key>.png`` (RGB, ``image_size`` squared), ``<key>.txt`` (the
    number in words) and ``<key>.json`` (``number``, ``digits`` and ``handwriting``, the rows of
    ``load_digits`` that were used). Shards are written beside their names and renamed; the manifest
    comes last, so a folder with a manifest is complete. A complete folder of the same arguments is
    left untouched; a shard that has gone missing is made anew.

    Args:
        folder: Created if missing.
        num_train_pairs: Numbers are drawn with replacement, so captions repeat.
        num_val_pairs: All different numbers, none of them in a training caption; in one shard.
        num_train_shards: Pairs are spread evenly, the first shards take the remainder.
        digits_per_image: 2 to 6.
        image_size: Side of the square picture in pixels, at least 8 a digit.
        seed: Decides the numbers, the handwriting, its split and its looks.
        regions: Whether the JSON has ``regions``, too: of each digit that occurs once in the number
            its English name as ``text`` and the ``box`` of its ink, (top, left, bottom, right) in
            shares of the picture. Everything else stays as it is without them.

    Returns:
        The paths of both splits, below ``folder`` as given.

    Raises:
        UserError: If an argument is out of range, or if the folder holds shards of other arguments.
    """
    recipe = _Recipe(
        format_version=_FORMAT_VERSION,
        num_train_pairs=num_train_pairs,
        num_val_pairs=num_val_pairs,
        num_train_shards=num_train_shards,
        digits_per_image=digits_per_image,
        image_size=image_size,
        seed=seed,
        regions=regions,
    )
    _check(recipe)
    folder = Path(folder)
    shards = HandwritingShards(
        train=[str(folder / _shard_name("train", shard)) for shard in range(num_train_shards)],
        val=[str(folder / _shard_name("val", 0))],
    )
    if _is_written(folder, recipe):
        return shards
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"folder ({folder}) cannot be made: {error.strerror}; choose another"
        ) from error
    handwriting = _load_handwriting()
    train_rows, val_rows = _split_rows(handwriting.classes, seed)
    train_numbers, val_numbers = _draw_numbers(recipe)
    per_shard = np.array_split(train_numbers, num_train_shards)
    jobs = [("train", shard, numbers, train_rows) for shard, numbers in enumerate(per_shard)]
    jobs.append(("val", 0, val_numbers, val_rows))
    names = [
        _write_shard(folder, split, shard, _pairs(recipe, handwriting, rows, numbers, split, shard))
        for split, shard, numbers, rows in jobs
    ]
    manifest = {"recipe": recipe.facts(), "shards": names}
    write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
    _LOGGER.info("wrote %d shards of handwritten numbers to %s", len(names), folder)
    return shards


def compose_with_boxes(
    ink: NDArray[np.float32], image_size: int, generator: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Set handwritten digits in a row, with jitter, on coloured paper; say where their ink is.

    A digit is stretched by bilinear interpolation, which is separable: with row weights R (H, 8)
    and column weights C (W, 8) its picture is R @ digit @ C.T, so two products draw all digits.

    Args:
        ink: (N, digits, 8, 8) in [0, 1].
        image_size: Side of the square pictures in pixels.
        generator: Source of place, size, colours and noise.

    Returns:
        (N, image_size, image_size, 3), RGB; (N, digits, 4), top, left, bottom and right of each
        digit in shares of the picture, cut off at its edges.
    """
    num_pictures, num_digits = ink.shape[:2]
    shape = (num_pictures, num_digits)
    cell = image_size / num_digits  # pixels of width for one digit
    width = cell * generator.uniform(0.85, 1.15, shape)
    height = width * generator.uniform(1.0, 1.6, shape)
    column = cell * (np.arange(num_digits) + 0.5 + generator.uniform(-0.12, 0.12, shape))
    row = image_size * (0.5 + generator.uniform(-0.15, 0.15, (num_pictures, 1)))
    row = row + cell * generator.uniform(-0.12, 0.12, shape)
    rows_of = _interpolation_weights(row, height, image_size)  # (N, digits, H, 8)
    columns_of = _interpolation_weights(column, width, image_size)  # (N, digits, W, 8)
    coverage = (rows_of @ ink @ columns_of.swapaxes(-1, -2)).max(axis=1)[..., None]  # (N, H, W, 1)
    paper = generator.uniform(150, 255, (num_pictures, 1, 1, 3)).astype(np.float32)
    pen = generator.uniform(0, 110, (num_pictures, 1, 1, 3)).astype(np.float32)
    noise = generator.standard_normal(coverage.shape, dtype=np.float32) * 4
    pictures = paper + coverage * (pen - paper) + noise
    top, bottom = _extent(ink.max(axis=-1) >= _INK, row, height)
    left, right = _extent(ink.max(axis=-2) >= _INK, column, width)
    boxes = np.stack([top, left, bottom, right], axis=-1) / image_size
    return np.clip(np.rint(pictures), 0, 255).astype(np.uint8), boxes.clip(0, 1)


def draw_masked_numbers(
    count: int,
    *,
    is_training: bool,
    digits_per_image: int = 4,
    image_size: int = 64,
    seed: int = 0,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw N pictures as those of ``write_handwriting_shards``, and say which digit is where.

    Handwriting of the pictures that are not for training is in none for training, nor in a training
    pair of shards of the same seed.

    Returns:
        (N, image_size, image_size, 3), RGB; (N, image_size, image_size), the digit in whose box
        each pixel is, 10 on bare paper and ``NO_DIGIT`` in two boxes.

    Example:
        >>> pictures, masks = draw_masked_numbers(2, is_training=False)
        >>> pictures.shape, masks.shape, int(masks.max())
        ((2, 64, 64, 3), (2, 64, 64), 10)
    """
    handwriting = _load_handwriting()
    train_rows, val_rows = _split_rows(handwriting.classes, seed)
    generator = _generator(seed, f"masks of {'train' if is_training else 'val'}")
    rows = train_rows if is_training else val_rows
    chosen = generator.choice(rows, size=(count, digits_per_image))
    masks = np.full((count, image_size, image_size), len(DIGITS))
    parts = []
    for start in range(0, count, _CHUNK_PAIRS):
        ink = handwriting.ink[chosen[start : start + _CHUNK_PAIRS]]
        pictures, boxes = compose_with_boxes(ink, image_size, generator)
        parts.append(pictures)
        edges = np.rint(boxes * image_size).astype(np.int64)
        for offset, of_picture in enumerate(edges.tolist(), start):
            num_boxes = np.zeros((image_size, image_size), np.int64)
            for row, (top, left, bottom, right) in zip(chosen[offset], of_picture, strict=True):
                box = slice(top, bottom), slice(left, right)
                masks[offset][box] = handwriting.classes[row]
                num_boxes[box] += 1
            masks[offset][num_boxes > 1] = NO_DIGIT
    return np.concatenate(parts), masks


def _extent(
    is_inked: NDArray[np.bool_], center: NDArray[np.float64], extent: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Start and stop in pixels of what is marked of (..., 8) samples stretched over a length."""
    first = is_inked.argmax(axis=-1)
    stop = 8 - is_inked[..., ::-1].argmax(axis=-1)
    return center + extent * (first / 8 - 0.5), center + extent * (stop / 8 - 0.5)


def _interpolation_weights(
    center: NDArray[np.float64], extent: NDArray[np.float64], num_pixels: int
) -> NDArray[np.float32]:
    """Bilinear weights (..., num_pixels, 8) of 8 samples stretched over ``extent`` pixels."""
    pixel = np.arange(num_pixels) + 0.5
    position = ((pixel - center[..., None]) / extent[..., None] + 0.5) * 8 - 0.5
    distance = np.abs(position[..., None] - np.arange(8))
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def _pairs(
    recipe: _Recipe,
    handwriting: _Handwriting,
    rows: NDArray[np.int64],
    numbers: NDArray[np.int64],
    split: str,
    shard: int,
) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard, a function of the recipe, the split and the shard."""
    from PIL import Image

    generator = _generator(recipe.seed, split, shard)
    place_values = 10 ** np.arange(recipe.digits_per_image - 1, -1, -1)
    digits = numbers[:, None] // place_values % 10  # (N, digits)
    rows_of_class = [rows[handwriting.classes[rows] == digit] for digit in range(10)]
    chosen = np.empty_like(digits)
    for digit, candidates in enumerate(rows_of_class):
        wanted = digits == digit
        chosen[wanted] = generator.choice(candidates, size=int(wanted.sum()))
    for start in range(0, len(numbers), _CHUNK_PAIRS):
        part = slice(start, start + _CHUNK_PAIRS)
        pictures, boxes = compose_with_boxes(
            handwriting.ink[chosen[part]], recipe.image_size, generator
        )
        for offset, picture in enumerate(pictures):
            index = start + offset
            stream = io.BytesIO()
            Image.fromarray(picture).save(stream, format="PNG", compress_level=1)
            facts: dict[str, Any] = {
                "number": int(numbers[index]),
                "digits": digits[index].tolist(),
                "handwriting": chosen[index].tolist(),
            }
            if recipe.regions:
                facts["regions"] = [
                    {"text": DIGITS[digit], "box": box.round(6).tolist()}
                    for digit, box in zip(facts["digits"], boxes[offset], strict=True)
                    if facts["digits"].count(digit) == 1
                ]
            yield {
                "__key__": f"{split}-{shard:05d}-{index:06d}",
                "png": stream.getvalue(),
                "txt": number_in_words(int(numbers[index]), recipe.digits_per_image).encode(),
                "json": json.dumps(facts).encode(),
            }


def _write_shard(folder: Path, split: str, shard: int, pairs: Iterator[dict[str, Any]]) -> str:
    """Write one tar beside its name, rename it and return the name."""
    from webdataset import TarWriter

    name = _shard_name(split, shard)
    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0) as writer:
        for pair in pairs:
            writer.write(pair)
    write_atomically(folder / name, stream.getvalue())
    return name


def _shard_name(split: str, shard: int) -> str:
    """Return the file name of one shard."""
    return f"{split}-{shard:05d}.tar"


def _load_handwriting() -> _Handwriting:
    """Read the digits of scikit-learn, in its order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _Handwriting((digits.images / 16).astype(np.float32), digits.target.astype(np.int64))


def _split_rows(
    classes: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the handwriting of every class into training and validation rows, both sorted."""
    generator = _generator(seed, "split")
    val_rows = []
    for digit in range(10):
        rows = generator.permutation(np.flatnonzero(classes == digit))
        val_rows.append(rows[: round(len(rows) * _VALIDATION_FRACTION)])
    val = np.sort(np.concatenate(val_rows))
    return np.setdiff1d(np.arange(len(classes)), val), val


def _draw_numbers(recipe: _Recipe) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw different validation numbers, then training numbers among the others."""
    generator = _generator(recipe.seed, "numbers")
    numbers = generator.permutation(np.arange(*number_range(recipe.digits_per_image)))
    val, others = np.split(numbers, [recipe.num_val_pairs])
    return generator.choice(others, size=recipe.num_train_pairs), val


def _generator(seed: int, stream: str, shard: int = 0) -> np.random.Generator:
    """Return the random stream of one purpose, independent of all others."""
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence([seed, _STREAMS[stream], shard]))
    )


def _is_written(folder: Path, recipe: _Recipe) -> bool:
    """Return whether the folder is complete; refuse one that another recipe made."""
    path = folder / _MANIFEST
    if not path.exists():
        return False
    remedy = "choose another folder or delete this one"
    try:
        manifest = read_json(path)
        found, names = dict(manifest["recipe"]), list(manifest["shards"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest of handwriting shards; {remedy}") from error
    wanted = asdict(recipe)
    found.setdefault("regions", False)
    differences = [
        f"{name} is {found.get(name)} there and {value} was asked for"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differences:
        raise UserError(
            f"folder ({folder}) holds other handwriting shards: {', '.join(differences)}; {remedy}"
        )
    return all((folder / name).is_file() for name in names)


def _check(recipe: _Recipe) -> None:
    """Refuse a recipe that cannot be cooked."""
    check_numbers(recipe.digits_per_image, recipe.image_size, recipe.seed)
    lowest, highest = number_range(recipe.digits_per_image)
    if not 1 <= recipe.num_val_pairs < highest - lowest:
        raise UserError(
            f"num_val_pairs ({recipe.num_val_pairs}) must be 1 to {highest - lowest - 1}, for they "
            f"are different numbers of {recipe.digits_per_image} digits and some must be left for "
            "training; use more digits_per_image or fewer pairs"
        )
    if not 1 <= recipe.num_train_shards <= recipe.num_train_pairs:
        raise UserError(
            f"num_train_shards ({recipe.num_train_shards}) must be 1 to num_train_pairs "
            f"({recipe.num_train_pairs}), so that no shard is empty"
        )


def check_numbers(digits_per_image: int, image_size: int, seed: int) -> None:
    """Refuse pictures of numbers that cannot be drawn.

    Raises:
        UserError: If one of them is out of range.
    """
    if not 2 <= digits_per_image <= MOST_DIGITS:
        raise UserError(f"digits_per_image ({digits_per_image}) must be 2 to {MOST_DIGITS}; use 4")
    lowest_size = 8 * digits_per_image
    if not lowest_size <= image_size <= 1024:
        raise UserError(
            f"image_size ({image_size}) must be {lowest_size} to 1024 pixels for "
            f"{digits_per_image} digits; use 64"
        )
    if seed < 0:
        raise UserError(f"seed ({seed}) must be 0 or above; use 0")
