"""The policy by which the bytes of a picture become pixels, wherever pictures are decoded.

Colour behind transparency and orientation belong to a model as its mean and size do, and an export
states them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any, Literal

from PIL import ImageColor, features

from dist_siglip.errors import UserError

ExifOrientation = Literal["ignore", "apply"]
TruncatedPictures = Literal["replace", "use"]

MAX_IMAGE_PIXELS = 64_000_000
PictureFormat = Literal["jpeg", "png", "webp", "avif", "gif", "tiff", "bmp", "heic"]
FORMATS: tuple[PictureFormat, ...] = ("jpeg", "png", "webp")
# Extensions of each format; "image/" and its name are its media type.
EXTENSIONS_OF: dict[str, tuple[str, ...]] = {
    "jpeg": ("jpg", "jpeg"),
    "png": ("png",),
    "webp": ("webp",),
    "avif": ("avif",),
    "gif": ("gif",),
    "tiff": ("tif", "tiff"),
    "bmp": ("bmp",),
    "heic": ("heic", "heif"),
}
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of members, in order of preference
DROP = "drop"
AUTO: Literal["auto"] = "auto"
# What runs did before these settings had a name: a run of then goes on so.
BEFORE_THE_SETTINGS: dict[str, Any] = {
    "transparency": DROP,
    "exif_orientation": "ignore",
    "truncated_pictures": "replace",
    "formats": list(FORMATS),
    "intensity_window": None,
}


def with_formats(extensions: Sequence[str], formats: Iterable[str]) -> tuple[str, ...]:
    """Add the extensions of formats beyond JPEG, PNG and WebP, if none were named otherwise.

    Example:
        >>> with_formats(PICTURE_EXTENSIONS, ["png", "gif"])
        ('jpg', 'jpeg', 'png', 'webp', 'gif')
        >>> with_formats(["png"], ["png", "gif"])
        ('png',)
    """
    if tuple(extensions) != PICTURE_EXTENSIONS:
        return tuple(extensions)
    further = [each for name in formats if name not in FORMATS for each in EXTENSIONS_OF[name]]
    return (*PICTURE_EXTENSIONS, *further)


def formats_of(present: Iterable[str], read: Iterable[str]) -> list[str]:
    """Name the formats beyond JPEG, PNG and WebP whose extensions are present and not read.

    Example:
        >>> formats_of(["txt", "tif", "png"], PICTURE_EXTENSIONS)
        ['tiff']
    """
    unread = set(present) - set(read)
    return [
        name for name, found in EXTENSIONS_OF.items() if name not in FORMATS and unread & {*found}
    ]


@dataclass(frozen=True, kw_only=True)
class PicturePolicy:
    """What decides the pixels of an encoded picture.

    Args:
        transparency: colour that pictures with transparency are laid on, as "#rrggbb" or by name;
            it is kept as "#rrggbb". "drop" takes the alpha away, and what was hidden shows.
        exif_orientation: "ignore", as open_clip does, or "apply": turn a picture as its camera
            says.
        truncated_pictures: a JPEG or PNG that ends too early: "replace" it, as any that is
            damaged, or "use" what there is; the rest is grey in a JPEG, black or transparent in a
            PNG.
        max_image_pixels: largest width times height, read from the header.
        formats: that are decoded, whatever a file is called.
        intensity_window: (low, high), the values of grey pictures of more than 8 bits that become
            black and white; what is between is spread evenly, what is beyond is cut off. None:
            (0, 65535).

    Raises:
        UserError: if a value is none of these, or the package of a format is missing.

    Example:
        >>> PicturePolicy(transparency="white") == PicturePolicy()
        True
    """

    transparency: str = "#ffffff"
    exif_orientation: ExifOrientation = "ignore"
    truncated_pictures: TruncatedPictures = "replace"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    formats: tuple[PictureFormat, ...] = FORMATS
    intensity_window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", _formats(self.formats))
        object.__setattr__(self, "intensity_window", _window(self.intensity_window))
        object.__setattr__(self, "transparency", _colour(self.transparency))
        for name, allowed in (
            ("exif_orientation", ("ignore", "apply")),
            ("truncated_pictures", ("replace", "use")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} ({getattr(self, name)}) must be {' or '.join(allowed)}")
        if self.max_image_pixels < 1:
            raise UserError(f"max_image_pixels ({self.max_image_pixels}) must be at least 1")

    @property
    def of_model(self) -> dict[str, str]:
        """What belongs to the preprocessing of a model, by the names that exports write."""
        return {"transparency": self.transparency, "exif_orientation": self.exif_orientation}

    def changed(self, **settings: Any) -> "PicturePolicy":
        """Take over settings; "auto" leaves one as it is.

        Raises:
            UserError: if a value is none of those allowed.

        Example:
            >>> PicturePolicy(transparency="drop").changed(transparency="auto").transparency
            'drop'
        """
        return replace(self, **{key: value for key, value in settings.items() if value != AUTO})

    @classmethod
    def of_preprocessing(cls, stated: Mapping[str, Any], source: object) -> "PicturePolicy":
        """Read what the preprocessing config of a model states; the rest is as by default.

        Args:
            stated: values by name, others among them.
            source: where they stand, for the error.

        Raises:
            UserError: if one of them is wrong.
        """
        try:
            return cls(**{key: stated[key] for key in cls().of_model if key in stated})
        except UserError as error:
            raise UserError(f"preprocessing of {source}: {error}") from error

    def of_run(self, data: Mapping[str, Any]) -> "PicturePolicy":
        """Take over what a run did with pictures.

        Args:
            data: the recorded settings of its data, those of a run of before among them.
        """
        recorded = {**BEFORE_THE_SETTINGS, **data}
        return self.changed(**{key: recorded[key] for key in _NAMES if key in recorded})


def _formats(names: Sequence[str]) -> tuple[str, ...]:
    """Return formats in one order, each once.

    Raises:
        UserError: if one is unknown or cannot be read here, or there is none.
    """
    unknown = [name for name in names if name not in EXTENSIONS_OF]
    if unknown or not names:
        raise UserError(
            f"formats ({', '.join(map(str, names))}) must be some of {', '.join(EXTENSIONS_OF)}"
        )
    if "heic" in names and find_spec("pillow_heif") is None:
        raise UserError('formats (heic) needs pillow-heif; pip install "dist-siglip[heic]"')
    if "avif" in names and not features.check("avif"):
        raise UserError(
            "formats (avif) needs a Pillow that reads AVIF; install Pillow 11.3 or later from its "
            "wheels"
        )
    return tuple(name for name in EXTENSIONS_OF if name in names)


def _window(window: Sequence[float] | None) -> tuple[float, float] | None:
    """Return a window as two floats.

    Raises:
        UserError: if they are not finite, or not low and high.
    """
    if window is None:
        return None
    low, high = map(float, window)
    if not (math.isfinite(high - low) and low < high):
        raise UserError(f"intensity_window ([{low:g}, {high:g}]) must be [low, high], low < high")
    return low, high


_NAMES = tuple(field.name for field in fields(PicturePolicy))


def _colour(text: object) -> str:
    """Write a colour as "#rrggbb"; "drop" stays.

    Raises:
        UserError: if it is no colour, or itself transparent.
    """
    if text == DROP:
        return DROP
    try:
        colour = ImageColor.getrgb(text) if isinstance(text, str) else ()
    except ValueError:
        colour = ()
    if len(colour) != 3:
        raise UserError(
            f'transparency ({text}) must be a colour such as "#ffffff" or white, or drop; in YAML '
            "a colour with # needs quotes"
        )
    return "#{:02x}{:02x}{:02x}".format(*colour)
