"""Pairs that a fusion head judges, in training and when it re-ranks.

In training the positives of a batch, for each picture and each text the wrong partners that the
dual encoder finds most alike among the pairs of all ranks, and for each picture a few other texts:
with hard negatives alone a head learns slowly. The ring finds the hard ones, and only their tokens
are fetched. In an evaluation the candidates of every query.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from dist_siglip.distributed import World, fetch_rows, gather_rows
from dist_siglip.metrics.retrieval.nearest import nearest_neighbors
from dist_siglip.metrics.retrieval.positives import DistinctItems
from dist_siglip.metrics.retrieval.ranks import (
    median_rank,
    recall_at_k,
    reranked_ranks,
    retrieval_ranks_both_ways,
)
from dist_siglip.metrics.rows import first_occurrences, gather_in_order
from dist_siglip.models.reranker import Encoded, FusionHead

# P images and P texts, row by row, to (P,) logits or scores.
Judge = Callable[[Encoded, Encoded], Tensor]


class ChosenPairs(NamedTuple):
    """Pairs to judge; tokens are there once, however many pairs they are in.

    Attributes:
        images: own rows, then fetched ones.
        texts: likewise.
        image_rows: (P,) int64, rows of ``images``; the first are the own ones, the positives.
        text_rows: (P,) int64, rows of ``texts``.
        num_positives: own rows B; the other P - B pairs are negatives.
    """

    images: Encoded
    texts: Encoded
    image_rows: Tensor
    text_rows: Tensor
    num_positives: int


@torch.no_grad()
def choose_hard_pairs(
    images: Encoded,
    texts: Encoded,
    ids: Tensor,
    num_hard: int,
    num_easy: int = 0,
    *,
    group: ProcessGroup | None = None,
) -> ChosenPairs:
    """Choose this rank's positives, and wrong partners for each of its rows.

    For each image the ``num_hard`` texts of all ranks with the largest inner product, and for each
    text as many images; for each image also the texts of the ``num_easy`` next pairs in rank order,
    the first pair after the last, which are any pairs, as training batches are shuffled. Partners
    with the same caption, or of the same picture, are not wrong. B * (1 + 2 * num_hard + num_easy)
    pairs at most.

    Distributed contract: every rank passes its own rows, any number of them (0 too). Two exchanges
    of features without gradient, and ``fetch_rows`` of tokens and of ids. Over all ranks the same
    pairs are chosen however the rows are distributed.

    Args:
        images: B rows.
        texts: B rows; row i belongs to image i.
        ids: (B,) int64, equal for equal captions; or (B, 2), of captions and pictures.
        num_hard: hardest wrong partners of a row, at least 1.
        num_easy: other texts of an image, at least 0.
        group: process group.
    """
    own = torch.arange(len(ids), device=ids.device)
    sides = (images.features, texts.features)
    hard_texts = _hardest(*sides, ids, num_hard, group)
    hard_images = _hardest(*sides[::-1], ids, num_hard, group)
    wrong_texts = torch.cat([hard_texts, _next_texts(ids, num_easy, group)], dim=1)
    image_of, all_texts, text_rows = _with_fetched(texts, wrong_texts, group)
    text_of, all_images, image_rows = _with_fetched(images, hard_images, group)
    return ChosenPairs(
        images=all_images,
        texts=all_texts,
        image_rows=torch.cat([own, image_of, image_rows]),
        text_rows=torch.cat([own, text_rows, text_of]),
        num_positives=len(own),
    )


def judge_pairs(judge: Judge, pairs: ChosenPairs, pairs_per_pass: int) -> Tensor:
    """What a judge says of chosen pairs, (P,), in the memory of ``pairs_per_pass`` of them.

    More than one pass of a training step is computed again in backward, with the same gradients.

    Args:
        judge: images and texts of some pairs to one number each.
        pairs: to be judged.
        pairs_per_pass: at a time, at least 1.
    """

    def judge_part(image_rows: Tensor, text_rows: Tensor) -> Tensor:
        return judge(_take(pairs.images, image_rows), _take(pairs.texts, text_rows))

    parts = list(
        zip(
            pairs.image_rows.split(pairs_per_pass),
            pairs.text_rows.split(pairs_per_pass),
            strict=True,
        )
    )
    if len(parts) <= 1 or not torch.is_grad_enabled():
        return torch.cat([judge_part(*part) for part in parts])
    return torch.cat([checkpoint(judge_part, *part, use_reentrant=False) for part in parts])


@torch.no_grad()
def evaluate_reranking(
    head: FusionHead,
    images: Encoded,
    texts: Encoded,
    caption_ids: Tensor,
    sample_ids: Tensor,
    *,
    candidates: int,
    pairs_per_pass: int,
    picture_ids: Tensor | None = None,
    top_k: tuple[int, ...] = (1, 5, 10),
    group: ProcessGroup | None = None,
) -> dict[str, float]:
    """Recall and median rank in both directions, after the head has re-ranked the candidates.

    Galleries and hits are those of ``metrics.evaluate_pairs``.

    Distributed contract: as ``reranked_ranks``, which see; a sample that occurs twice counts once.

    Args:
        head: in evaluation mode.
        images: B rows of this rank.
        texts: B rows; row i belongs to image i.
        caption_ids: (B,) int64; an equal caption counts as a hit.
        sample_ids: (B,) int64.
        candidates: of a query.
        pairs_per_pass: pairs that the head judges at a time.
        picture_ids: (B,) int64, equal for equal pictures; None if every row has its own.
        top_k: the K of recall@K.
        group: process group.

    Returns:
        reranked_image_to_text_recall@K, reranked_image_to_text_median_rank, and
        reranked_text_to_image_...
    """
    keep = first_occurrences(sample_ids, group=group)
    pictures = sample_ids if picture_ids is None else picture_ids
    sample_ids = sample_ids[keep]
    items = DistinctItems.of(pictures[keep], caption_ids[keep], sample_ids, group=group)
    images, texts = _take(_take(images, keep), items.images), _take(_take(texts, keep), items.texts)
    ids = (items.image_ids[items.images], items.text_ids[items.texts])
    before = retrieval_ranks_both_ways(
        images.features, texts.features, *ids, positives=items.positives, group=group
    )
    found: dict[str, float] = {}
    after: list[Tensor] = []
    sides = (
        (images, texts, *ids, items.positives),
        (texts, images, *ids[::-1], items.positives.swapped()),
    )
    for (queries, gallery, query_ids, gallery_ids, positives), ranks in zip(
        sides, before, strict=True
    ):

        def judge(
            rows: Tensor,
            positions: Tensor,
            queries: Encoded = queries,
            gallery: Encoded = gallery,
        ) -> Tensor:
            wanted, each = positions.unique(return_inverse=True)
            fetched = Encoded(*fetch_rows(gallery, wanted, group=group))
            sides = ((queries, rows), (fetched, each))
            image, text = sides if queries is images else sides[::-1]
            pairs = ChosenPairs(image[0], text[0], image[1], text[1], 0)
            return judge_pairs(head.scores, pairs, pairs_per_pass)

        own = reranked_ranks(
            queries.features,
            gallery.features,
            query_ids,
            gallery_ids,
            ranks,
            judge,
            k=candidates,
            positives=positives,
            queries_per_call=max(1, pairs_per_pass // candidates),
            group=group,
        )
        after.append(own)
    of_rows = items.of_all_rows(*after, group=group)
    sizes = (("image_to_text", items.num_texts), ("text_to_image", items.num_images))
    for (direction, gallery_size), ranks in zip(sizes, of_rows, strict=True):
        (all_ranks,) = gather_in_order([ranks], sample_ids, group=group)
        for k in top_k:
            recall = recall_at_k(all_ranks, k, gallery_size=gallery_size)
            found[f"reranked_{direction}_recall@{k}"] = recall
        found[f"reranked_{direction}_median_rank"] = median_rank(all_ranks)
    return found


def _hardest(
    queries: Tensor, keys: Tensor, ids: Tensor, num_hard: int, group: ProcessGroup | None
) -> Tensor:
    return nearest_neighbors(
        queries, keys, num_hard, query_ids=ids, key_ids=ids, group=group
    ).positions


def _next_texts(ids: Tensor, count: int, group: ProcessGroup | None) -> Tensor:
    """Positions (B, count) of the rows behind each own one; -1 where an id is the same."""
    own_rows = torch.tensor([len(ids)], device=ids.device)
    rows_of_ranks = gather_rows(own_rows, group)
    rank = 0 if len(rows_of_ranks) == 1 else World.detect().rank
    start, total = int(rows_of_ranks[:rank].sum()), max(1, int(rows_of_ranks.sum()))
    own = torch.arange(start, start + len(ids), device=ids.device)
    steps = torch.arange(1, count + 1, device=ids.device)
    positions = (own[:, None] + steps) % total
    (others,) = fetch_rows([ids], positions.flatten(), group=group)
    same = others.reshape(*positions.shape, *ids.shape[1:]) == ids[:, None]
    return positions.masked_fill(same.any(dim=2) if ids.ndim == 2 else same, -1)


def _with_fetched(
    own: Encoded, positions: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Encoded, Tensor]:
    """Put fetched rows behind the own ones.

    Args:
        own: rows of this rank.
        positions: (B, k), wanted partners of each query; -1 where there is none.
        group: process group.

    Returns:
        For each wanted partner the query's row and the partner's row, and the rows.
    """
    queries, columns = (positions >= 0).nonzero(as_tuple=True)
    wanted, each = positions[queries, columns].unique(return_inverse=True)
    fetched = fetch_rows(own, wanted, group=group)
    together = Encoded(*(torch.cat(both) for both in zip(own, fetched, strict=True)))
    return queries, together, each + len(own.features)


def _take(rows: Encoded, chosen: Tensor) -> Encoded:
    return Encoded(*(column[chosen] for column in rows))
