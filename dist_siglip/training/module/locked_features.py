"""Stored features in place of a locked tower: when they may stand in, and how a step uses them."""

import logging

import torch

from dist_siglip.data import ImageTextBatch, PairDataset
from dist_siglip.data.samples.cached_features import CachedFeatures
from dist_siglip.errors import UserError
from dist_siglip.models import BuiltModel, DualEncoder, encode_tower_in_micro_batches
from dist_siglip.models.build import tower_fingerprint
from dist_siglip.models.tuning import layer_groups

logger = logging.getLogger(__name__)


def check_features(data: object, built: BuiltModel, towers: DualEncoder) -> None:
    """Check that the features a data module reads are those of towers that are locked whole.

    Args:
        data: data module; one without ``features`` is fine.
        built: what the towers were built as.
        towers: as they will train.

    Raises:
        UserError: if a tower trains, or gives other features.
    """
    features: CachedFeatures | None = getattr(data, "features", None)
    if features is None:
        return
    found = layer_groups(towers)
    for tower in features.towers:
        trained = [
            name
            for name, parameter in towers.named_parameters()
            if parameter.requires_grad and found[name].tower == tower
        ]
        if trained:
            raise UserError(
                f"train_features hold features of the {tower} tower, which trains ({trained[0]}, "
                f"{len(trained)} in all); set {tower}_tower.locked: true without unlocked_groups "
                "or lora, or leave train_features out"
            )
        if built.awaits_weights:
            continue  # the first rank has them, and looks
        if tower_fingerprint(built, tower) != features.digests[tower]:
            raise UserError(
                f"train_features are not those of this {tower} tower: other weights or other "
                "preprocessing, such as data.transparency; embed the shards again with the model "
                "and the settings of this run"
            )


def settle_identities(data: object, *, are_used: bool) -> None:
    """Spare a data module the identity of training pictures if nobody asks; else look for it.

    Args:
        data: data module; another one than ours is left alone.
        are_used: whether the loss of the run asks which pictures are the same.
    """
    dataset = getattr(data, "train_dataset", None)
    features: CachedFeatures | None = getattr(data, "features", None)
    if isinstance(dataset, PairDataset) and not are_used:
        dataset.picture_id = None
    elif are_used and features is not None and not features.has_ids:
        logger.warning(
            "train_features do not say which pictures and captions are the same, so duplicates "
            "among them stay negatives; embed the shards again to have it"
        )


def encode_beside_features(
    towers: DualEncoder, batch: ImageTextBatch, micro_batch_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the side of a batch that has no features; those of the other side are taken as is.

    Returns:
        Image features (B, D) and text features (B, D), L2-normalised, float32.
    """
    image_features, text_features = batch.image_features, batch.text_features
    size = micro_batch_size or max(len(batch.images), len(batch.texts))
    if image_features is None:
        image_features = encode_tower_in_micro_batches(towers.encode_image, batch.images, size)
    if text_features is None:
        text_features = encode_tower_in_micro_batches(towers.encode_text, batch.texts, size)
    return image_features, text_features
