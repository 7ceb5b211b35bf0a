"""Which numbers can a data module not work with?"""

from collections.abc import Mapping

from dist_siglip.errors import UserError


def check_least(values: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a setting below its least value.

    Args:
        values: (value, least) by name.

    Raises:
        UserError: naming the first that is too small.
    """
    for name, (value, least) in values.items():
        if value < least:
            raise UserError(f"{name} ({value}) must be at least {least}")


def check_shares(max_bad_fraction: float, train_crop_scale: tuple[float, float] | None) -> None:
    """Refuse shares outside of 0 to 1.

    Raises:
        UserError: naming the setting.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction ({max_bad_fraction}) must be in [0, 1]")
    if train_crop_scale and not 0 < train_crop_scale[0] <= train_crop_scale[1] <= 1:
        raise UserError(
            f"train_crop_scale ({train_crop_scale}) must be 0 < least <= most <= 1, or null"
        )
