"""Stored features of a training set: of the model's locked tower, and of teachers."""

from collections.abc import Sequence

from dist_siglip.data.index.pairs import PairTable
from dist_siglip.data.samples.cached_features import TOWERS, CachedFeatures
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.stages import Stage, names_of_changing
from dist_siglip.data.samples.transforms import TeacherInputs
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
    changing = names_of_changing(stages, features.towers)
    if changing:
        raise UserError(
            f"stages ({', '.join(changing)}) may change samples that train_features were made of "
            "without them; leave one of the two out (stages with leaves_texts: True, as "
            "augmentations have, may stand beside rows of texts alone)"
        )
    if "image" in features.towers and train_crop_scale is not None:
        raise UserError(
            f"train_crop_scale ({train_crop_scale}) has no effect on train_features, which hold "
            "whole pictures; set it to null"
        )
    features.check_captions(captions)
    return features


def load_teacher_features(
    teachers: TeacherInputs,
    table: PairTable,
    *,
    captions: CaptionRule,
    stages: Sequence[Stage],
    train_crop_scale: tuple[float, float] | None,
) -> tuple[CachedFeatures, ...]:
    """Open the stored rows of the teachers of a training set.

    Args:
        teachers: of the model.
        table: of the training set.
        captions: rule of the run.
        stages: of the run.
        train_crop_scale: of the run.

    Raises:
        UserError: if the model would see other crops or captions than the teachers saw, rows of a
            side are missing, or as ``CachedFeatures``.
    """
    found = []
    for folders in teachers.features:
        features = CachedFeatures(folders, table, "teachers.features")
        if set(features.towers) != set(TOWERS):
            raise UserError(
                f"teachers.features ({', '.join(folders)}) hold {' and '.join(features.towers)} "
                "features; a teacher needs both: embed with --towers both"
            )
        features.check_captions(captions)
        found.append(features)
    if found and stages:
        raise UserError(
            f"stages ({len(stages)}) change samples that teachers.features were made of without "
            "them; leave one of the two out, or take a live teacher"
        )
    if found and train_crop_scale is not None and not teachers.other_crops:
        raise UserError(
            f"train_crop_scale ({train_crop_scale}) shows the model other crops than those of "
            "teachers.features, which are whole pictures; set it to null, take a live teacher, or "
            "set other_crops: true of the teacher to train on that mismatch"
        )
    return tuple(found)
