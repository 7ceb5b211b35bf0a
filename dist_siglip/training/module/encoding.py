"""The pass of a training step through the towers: whole, in micro-batches, or beside features."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.order.position import SequenceLengths
from dist_siglip.data.samples.patches import is_packed, patch_mask
from dist_siglip.errors import UserError
from dist_siglip.models import DualEncoder, encode_in_micro_batches, encode_tower_in_micro_batches
from dist_siglip.models.dual_encoder import CachedEncoding
from dist_siglip.models.tuning import layer_groups
from dist_siglip.objectives import MaskedPrediction, Objective, Regions, Rows, Targets, Term
from dist_siglip.training.module.captions import caption_weights_of, num_negatives_of
from dist_siglip.training.module.ema_teacher import student_views
from dist_siglip.training.module.locked_features import encode_beside_features
from dist_siglip.training.module.objective_measures import regions_of
from dist_siglip.training.module.objectives import ObjectiveModule, Terms, draws_of


def encode_with_terms(
    towers: DualEncoder,
    objectives: Mapping[str, Objective],
    batch: ImageTextBatch,
    step: int,
    micro_batch_size: int,
    *,
    later: list[CachedEncoding] | None = None,
    targets: Mapping[str, Targets] | None = None,
) -> tuple[Tensor, Terms]:
    """Encode the pictures of a batch once, and compute the terms of objectives on their tokens.

    Objectives that learn of a teacher have passes of their own: one for all local views of some
    rows, one for global views with hidden patches.

    Args:
        towers: as they train.
        objectives: those that count in this step.
        batch: of this rank.
        step: of the run, for batches that bring no draws.
        micro_batch_size: rows that are encoded, and whose terms are computed, together.
        later: takes up what goes backward by itself when the loss is done, micro-batch by
            micro-batch, as sharded towers do; None leaves that to autograd.
        targets: of the whole batch, by name of the objective.

    Returns:
        (B, D) L2-normalised features; terms of this rank's rows.
    """
    names: list[tuple[str, str]] = []
    targets = targets or {}
    columns = {
        "images": batch.images,
        "texts": batch.texts,
        "draws": draws_of(batch, step),
        "valid": batch.valid,
    }
    regions = regions_of(batch)
    if regions is not None:
        columns |= {"region_texts": regions.texts, "region_boxes": regions.boxes}
    columns |= student_views(objectives, batch)
    columns |= {f"targets {name}": each.rows for name, each in targets.items()}

    def encode(*parts: Tensor) -> tuple[Tensor, ...]:
        part = dict(zip(columns, parts, strict=True))
        features, tokens = towers.encode_image_tokens(part["images"])
        seen = Rows(
            tokens,
            part["texts"],
            part["draws"],
            part["valid"],
            Regions(part["region_texts"], part["region_boxes"]) if regions else None,
            patch_mask(part["images"]),
            targets={
                name: each._replace(rows=part[f"targets {name}"]) for name, each in targets.items()
            },
        )
        if "local_views" in part:
            views = part["local_views"]
            pooled, _ = towers.encode_view(views.flatten(0, 1))
            seen = seen._replace(local_views=pooled.unflatten(0, views.shape[:2]))
        found = {}
        for name, objective in objectives.items():
            own = seen
            if isinstance(objective, MaskedPrediction):
                mask = objective.mask(seen.draws, tokens.shape[1])
                _, masked = towers.encode_view(part["views"], mask, objective.stand_in())
                own = seen._replace(masked_tokens=masked, mask=mask)
            found[name] = objective(own)
        names[:] = [(name, term) for name, terms in found.items() for term in terms]
        terms = [found[name][term] for name, term in names]
        return (
            features,
            torch.stack([each.total for each in terms]),
            torch.stack([each.number for each in terms]),
        )

    every = tuple(columns.values())
    if later is not None and len(batch.images) > micro_batch_size:
        cached = CachedEncoding(encode, every, micro_batch_size)
        later.append(cached)
        features, (totals, numbers) = cached.features, cached.sums
    else:
        parts = list(zip(*(each.split(micro_batch_size) for each in every), strict=True))
        if len(parts) > 1 and torch.is_grad_enabled():
            found = [
                checkpoint(encode, *part, use_reentrant=False, preserve_rng_state=True)
                for part in parts
            ]
        else:
            found = [encode(*part) for part in parts]
        of_parts, *sums = zip(*found, strict=True)
        features = torch.cat(of_parts)
        totals, numbers = (torch.stack(each).sum(dim=0) for each in sums)
    terms: Terms = {name: {} for name in objectives}
    for (name, term), total, number in zip(names, totals, numbers, strict=True):
        terms[name][term] = Term(total, number)
    return features, terms


class EncodingModule(ObjectiveModule):
    """A module that encodes a batch once for its loss and its objectives.

    Attributes:
        micro_batch_size: rows that a tower encodes together; None for all.
        micro_batch_patches: of a NaFlex tower, patches that it encodes together in place of rows;
            None for no such limit.
        loss: of the pairs.
        caption_weights: by field, of captions that train together, as a data module of ours says;
            empty weighs them alike.
        num_negatives: texts without a picture that each pair brings.
    """

    micro_batch_size: int | None
    micro_batch_patches: int | None
    loss: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.caption_weights: dict[str, float] = {}
        self.num_negatives = 0
        self._is_sharded = False
        self._cached: list[CachedEncoding] = []

    def check_data(self, data: object) -> None:
        """Check what a data module reads, and the longest pictures; take weights and negatives.

        Raises:
            UserError: as ``check_features``, as ``caption_weights_of`` and ``num_negatives_of``, or
                if a picture of training has more patches than are encoded together.
        """
        super().check_data(data)
        if hasattr(data, "captions"):
            self.caption_weights = caption_weights_of(data, self.loss)
            self.num_negatives = num_negatives_of(data, self.loss)
        lengths: SequenceLengths | None = getattr(data, "lengths", None)
        budget = self.micro_batch_patches
        if budget is not None and lengths is not None and budget < max(lengths.lengths):
            raise UserError(
                f"micro_batch_patches ({budget}) must be at least the longest of "
                f"data.sequence_lengths ({max(lengths.lengths)}): a picture is encoded whole"
            )

    def _rows_at_once(self, batch: ImageTextBatch) -> int | None:
        """Rows of a batch that a tower encodes together; None for all."""
        if self.micro_batch_patches is None or not is_packed(batch.images):
            return self.micro_batch_size
        return max(1, self.micro_batch_patches // (batch.images.shape[1] - 1))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Go backward from the loss, then through the towers whose micro-batches wait for it."""
        super().backward(loss, *args, **kwargs)
        cached, self._cached = self._cached, []
        for each in cached:
            # Copies of the shards on other nodes meet once, after the last micro-batch.
            each.backward(self._reduce_over_nodes)

    def _reduce_over_nodes(self, is_wanted: bool) -> None:
        sharded: list[Any] = [self.towers, *self.objectives.values()]
        for module in sharded:
            module.set_requires_all_reduce(is_wanted)

    def encode(self, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
        """Encode a batch; features it brings along stand in for a locked tower."""
        size = self._rows_at_once(batch)
        if size is not None and self._is_sharded and torch.is_grad_enabled():
            return self._encode_by_parts(batch, size)
        if batch.image_features is not None or batch.text_features is not None:
            return encode_beside_features(self.towers, batch, size)
        if size is None:
            return self.towers(batch.images, batch.texts)
        return encode_in_micro_batches(self.towers, batch.images, batch.texts, size)

    def _encode_by_parts(self, batch: ImageTextBatch, size: int) -> tuple[Tensor, Tensor]:
        """Encode sharded towers, whose trained ones ``backward`` encodes again."""
        towers, features = self.towers, []
        self._cached = []
        for tower, inputs, given, encode in (
            ("image", batch.images, batch.image_features, towers.encode_image),
            ("text", batch.texts, batch.text_features, towers.encode_text),
        ):
            whole = self._encode_part(tower, inputs, encode, size) if given is None else given
            features.append(whole)
        image_features, text_features = features
        return image_features, text_features

    def _encode_part(
        self, tower: str, inputs: Tensor, encode: Callable[[Tensor], Tensor], size: int
    ) -> Tensor:
        if not self._is_sharded or len(inputs) <= size or tower not in self._trained_towers:
            return encode_tower_in_micro_batches(encode, inputs, size)
        self._cached.append(CachedEncoding(encode, (inputs,), size))
        return self._cached[-1].features

    def encode_with_terms(
        self, objectives: Mapping[str, Objective], batch: ImageTextBatch
    ) -> tuple[Tensor, Tensor, Terms]:
        """Encode both sides once, and compute the terms of objectives on the tokens."""
        asked, step = self._rows_at_once(batch), self.global_step
        self._cached = []
        later = self._cached if self._is_sharded else None
        size = asked or len(batch.images)
        targets = self.look_at_teacher(objectives, batch, size)
        images, terms = encode_with_terms(
            self.towers, objectives, batch, step, size, later=later, targets=targets
        )
        texts, encode = batch.all_texts(), self.towers.encode_text
        return images, self._encode_part("text", texts, encode, asked or len(texts)), terms

    @cached_property
    def _trained_towers(self) -> set[str]:
        """Towers of which something trains."""
        groups = layer_groups(self.towers)
        named = self.towers.named_parameters()
        return {groups[name].tower for name, value in named if value.requires_grad}
