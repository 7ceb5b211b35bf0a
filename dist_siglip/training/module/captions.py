"""The loss of a step whose pairs have several captions each, or texts that are negatives alone.

Pictures are encoded once and all captions in one pass of the text tower. The loss is then computed
once for each field of captions, with its own ids: a text of one field is no negative of another.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_siglip.data import ImageTextBatch
from dist_siglip.data.samples.cached_features import CachedFeatures
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.datacompdr import DataCompDR
from dist_siglip.distributed import agree_once
from dist_siglip.errors import UserError
from dist_siglip.losses.arguments import (
    LossOutput,
    Nonfinite,
    TeacherFeatures,
    call_loss,
    ids_for,
    uses_negative_texts,
    uses_teachers,
)


def caption_weights_of(data: object, loss: nn.Module | None) -> dict[str, float]:
    """Return the weights that a data module gives captions that train together, by field.

    Args:
        data: data module; one without a rule of captions weighs none.
        loss: of the run; None for a module that sees one caption of a pair.

    Raises:
        UserError: if the module, or its loss, has no use for a second caption.
    """
    rule: CaptionRule | None = getattr(data, "captions", None)
    weights = {} if rule is None else dict(rule.weights or {})
    reinforced: DataCompDR | None = getattr(data, "datacompdr", None)
    if reinforced is not None and reinforced.caption_weights:
        if loss is None:
            raise UserError(
                "datacompdr.synthetic (beside): this module takes one caption of each pair; set it "
                "to drawn"
            )
        return reinforced.caption_weights  # with rows of teachers for each
    if len(weights) > 1 and (loss is None or uses_teachers(loss)):
        who = "this module" if loss is None else f"loss ({type(loss).__name__}) with its teachers"
        raise UserError(
            f"captions.weights ({', '.join(weights)}): {who} takes one caption of each pair; set "
            "captions.probabilities, which draws one, or name one field"
        )
    return weights


def num_negatives_of(data: object, loss: nn.Module | None) -> int:
    """Return how many negative texts a data module brings with each picture; 0 for none.

    Args:
        data: data module; one without a rule of captions brings none.
        loss: of the run; None for a module that takes none.

    Raises:
        UserError: if there are some, and the loss takes none or texts are stored features.
    """
    rule: CaptionRule | None = getattr(data, "captions", None)
    if rule is None or rule.negatives is None:
        return 0
    setting = f"captions.negatives ({rule.negatives})"
    if loss is None or not uses_negative_texts(loss):
        who = "this module" if loss is None else f"loss ({type(loss).__name__})"
        raise UserError(
            f"{setting}: {who} takes no texts without a picture; take "
            "dist_siglip.losses.SigLipLoss or ClipLoss, or set it to null"
        )
    features: CachedFeatures | None = getattr(data, "features", None)
    if features is not None and "text" in features.towers:
        raise UserError(
            f"{setting}: train_features stand in for the text tower, which would encode them; "
            "leave one of the two out"
        )
    return rule.num_negatives


def part_negatives(text_features: Tensor, batch: ImageTextBatch) -> tuple[Tensor, Tensor | None]:
    """Part the features of captions from those of negative texts behind them.

    Args:
        text_features: (K * B + B * n, D), in the order of ``batch.all_texts``.
        batch: the pairs.

    Returns:
        (K * B, D) and (B * n, D), zeros for texts that do not exist; None without any.
    """
    if batch.negatives_exist is None:
        return text_features, None
    exist = batch.negatives_exist.flatten()
    captions, negatives = text_features.split([len(text_features) - len(exist), len(exist)])
    return captions, negatives * exist[:, None]


def loss_of_captions(
    loss: nn.Module,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    batch: ImageTextBatch,
    weights: Mapping[str, float],
    nonfinite: Nonfinite,
    teachers: TeacherFeatures | None = None,
    negative_text_features: Tensor | None = None,
) -> LossOutput:
    """Return the weighted mean of a loss over the captions of each pair.

        loss = sum_k w_k L(images, texts_k) / sum_k w_k

    With one caption this is the loss itself, to the bit.

    Distributed contract: that of the loss, called K times in the same order on every rank: K times
    the bytes of one trip, and one trip's memory.

    Args:
        loss: a module, as ``call_loss`` takes it.
        image_features: (B, D).
        text_features: (K * B, D), in the order of ``batch.all_texts``.
        logit_scale: one element.
        logit_bias: one element.
        batch: the pairs, with the ids of their captions.
        weights: > 0, by field; empty weighs all alike.
        nonfinite: as ``call_loss``.
        teachers: of the captions; their text rows (K * B, D) are in the order of
            ``batch.all_texts``.
        negative_text_features: (m, D), negatives beside the captions of every field.

    Returns:
        The loss; duplicates summed over fields; terms, and the loss of each field as
        ``pair_loss_FIELD`` if there are several.

    Raises:
        UserError: as the loss does, or if ranks weigh differently.
    """
    ids = [batch.caption_ids]
    if batch.more_caption_ids is not None:
        ids += batch.more_caption_ids.unbind(dim=1)
    by_field = dict(weights) or {str(number): 1.0 for number in range(len(ids))}
    if len(ids) > 1:
        agree_once(f"captions of a pair; weights {by_field}")
    total = sum(by_field.values())
    share_of = {name: weight / total for name, weight in by_field.items()}
    rows = [None] * len(ids) if teachers is None else _by_caption(teachers, len(ids))
    found = [
        call_loss(
            loss,
            image_features,
            texts,
            logit_scale,
            logit_bias,
            ids=ids_for(loss, caption_ids, batch.picture_ids),
            nonfinite=nonfinite,
            teachers=of_caption,
            negative_text_features=negative_text_features,
        )
        for caption_ids, texts, of_caption in zip(
            ids, text_features.tensor_split(len(ids)), rows, strict=True
        )
    ]
    if len(found) == 1:
        return found[0]
    shares = list(share_of.values())
    counts = [each.duplicate_pairs for each in found if each.duplicate_pairs is not None]
    terms = {
        name: weighted_sum([each.terms[name] for each in found], shares) for name in found[0].terms
    }
    for name, each in zip(share_of, found, strict=True):
        terms[f"pair_loss_{name}"] = each.loss.detach()
    return LossOutput(
        weighted_sum([each.loss for each in found], shares),
        torch.stack(counts).sum(dim=0) if counts else None,
        terms,
    )


def _by_caption(teachers: TeacherFeatures, count: int) -> list[TeacherFeatures | None]:
    """Cut the text rows of teachers into those of each caption."""
    return [teachers._replace(text=text) for text in teachers.text.tensor_split(count)]


def weighted_sum(values: list[Tensor], shares: list[float]) -> Tensor:
    """Sum K scalars, each times its share."""
    return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum()
