"""Checks of settings: shares, and whether the next samples have the fields that are named."""

import logging
from collections.abc import Iterable
from itertools import chain, islice

from dist_siglip.data.order.sequence import StreamPosition
from dist_siglip.data.samples.dataset import PairDataset
from dist_siglip.errors import UserError

_CAPTIONS_LOOKED_AT = 64  # samples about to be trained on, in which each field is looked for
_REGIONS_LOOKED_AT = 1024  # likewise, in which any region is looked for
_LOGGER = logging.getLogger(__name__)


def check_captions(
    dataset: PairDataset, batches: Iterable[Iterable[StreamPosition]], *, is_told: bool
) -> None:
    """Refuse fields of captions that none of the next samples has, as a misspelt one.

    Args:
        dataset: of the training, whose rule names fields.
        batches: global ones that come next.
        is_told: whether to log in how many samples each field is.

    Raises:
        UserError: naming the field.
    """
    positions = list(islice(chain.from_iterable(batches), _CAPTIONS_LOOKED_AT))
    counts = dataset.count_fields(positions)
    for name, count in counts.items():
        if not count:
            raise UserError(
                f"captions: none of the next {len(positions)} training samples has field {name!r}; "
                "correct its name, or leave it out"
            )
    if is_told:
        listed = ", ".join(f"{name} in {count}" for name, count in counts.items())
        _LOGGER.info("captions of the next %d training samples: %s", len(positions), listed)


def check_regions(
    dataset: PairDataset, batches: Iterable[Iterable[StreamPosition]], field: str
) -> None:
    """Refuse a field of regions that none of the next samples has.

    Args:
        dataset: of the training.
        batches: global ones that come next.
        field: of the .json, where regions are.

    Raises:
        UserError: naming the field.
    """
    positions = list(islice(chain.from_iterable(batches), _REGIONS_LOOKED_AT))
    if positions and not any(map(dataset.shows_region, positions)):
        raise UserError(
            f"regions.json_field ({field}): none of the next {len(positions)} training samples has "
            "a region there, of regions.min_score or more; correct its name, or leave out what "
            "needs regions"
        )


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
