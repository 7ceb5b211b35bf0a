"""Can features that were written down stand in for what this data module would load?"""

from collections.abc import Sequence

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.samples.cached_features import CachedFeatures
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.stages import Stage
from dist_siglip.errors import UserError


def load_features(
    folders: str | list[str] | None,
    table: PairTable,
    *,
    captions: CaptionRule,
    stages: Sequence[Stage],
    train_crop_scale: tuple[float, float] | None,
) -> CachedFeatures | None:
    """Open the features of a training set.

    Args:
        folders: the setting ``train_features``; None has none.
        table: of the training set.
        captions: rule of the run.
        stages: of the run.
        train_crop_scale: of the run.

    Raises:
        UserError: if pictures or captions would differ from epoch to epoch, or as
            ``CachedFeatures``.
    """
    if folders is None:
        return None
    features = CachedFeatures([folders] if isinstance(folders, str) else folders, table)
    if stages:
        raise UserError(
            f"stages ({len(stages)}) change samples that train_features were made of without "
            "them; leave one of the two out"
        )
    if "image" in features.towers and train_crop_scale is not None:
        raise UserError(
            f"train_crop_scale ({train_crop_scale}) has no effect on train_features, which hold "
            "whole pictures; set it to null"
        )
    features.check_captions(captions)
    return features
