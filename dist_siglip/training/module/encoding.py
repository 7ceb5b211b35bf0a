"""The pass of a training step through the towers: whole, in micro-batches, or beside features."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dist_siglip.data import ImageTextBatch
from dist_siglip.models import encode_in_micro_batches, encode_tower_in_micro_batches
from dist_siglip.models.dual_encoder import CachedEncoding
from dist_siglip.models.tuning import layer_groups
from dist_siglip.objectives import Objective
from dist_siglip.training.module.captions import caption_weights_of, num_negatives_of
from dist_siglip.training.module.locked_features import encode_beside_features
from dist_siglip.training.module.objectives import ObjectiveModule, Terms, encode_with_terms


class EncodingModule(ObjectiveModule):
    """A module that encodes a batch once for its loss and its objectives.

    Attributes:
        micro_batch_size: rows that a tower encodes together; None for all.
        loss: of the pairs.
        caption_weights: by field, of captions that train together, as a data module of ours says;
            empty weighs them alike.
        num_negatives: texts without a picture that each pair brings.
    """

    micro_batch_size: int | None
    loss: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.caption_weights: dict[str, float] = {}
        self.num_negatives = 0
        self._is_sharded = False
        self._cached: list[CachedEncoding] = []

    def check_data(self, data: object) -> None:
        """Check what a data module reads; take its weights of captions and its negatives.

        Raises:
            UserError: as ``check_features``, or as ``caption_weights_of`` and ``num_negatives_of``.
        """
        super().check_data(data)
        if hasattr(data, "captions"):
            self.caption_weights = caption_weights_of(data, self.loss)
            self.num_negatives = num_negatives_of(data, self.loss)

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
        size = self.micro_batch_size
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
        size, step = self.micro_batch_size or len(batch.images), self.global_step
        self._cached = []
        later = self._cached if self._is_sharded else None
        images, terms = encode_with_terms(self.towers, objectives, batch, step, size, later=later)
        texts, encode = batch.all_texts(), self.towers.encode_text
        size = self.micro_batch_size or len(texts)
        return images, self._encode_part("text", texts, encode, size), terms

    @cached_property
    def _trained_towers(self) -> set[str]:
        """Towers of which something trains."""
        groups = layer_groups(self.towers)
        named = self.towers.named_parameters()
        return {groups[name].tower for name, value in named if value.requires_grad}
