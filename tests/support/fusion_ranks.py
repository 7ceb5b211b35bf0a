"""What ranks of an uneven world find of one set of pairs: rows, hard pairs, gradients, ranks."""

import torch

from dist_siglip.distributed.collectives import fetch_rows
from dist_siglip.losses.sampled_pairs import match_loss
from dist_siglip.models.reranker import Encoded, FusionConfig, FusionHead, TokenShape
from dist_siglip.training.module.hard_negatives import (
    choose_hard_pairs,
    evaluate_reranking,
    judge_pairs,
)

NUM_PAIRS, NUM_HARD, NUM_EASY, CANDIDATES = 11, 2, 3, 4
# Rows of each rank, by world size; one rank has none.
SHARES = {1: [11], 2: [11, 0], 3: [3, 0, 8]}
IMAGE, TEXT = TokenShape(3, 6), TokenShape(4, 5)
CAPTION_IDS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 2, 9, 4])
PICTURE_IDS = torch.tensor([0, 1, 2, 3, 3, 5, 6, 7, 8, 1, 9])
IDS = torch.stack([CAPTION_IDS, PICTURE_IDS], dim=1)


def all_pairs():
    """Eleven pairs, two captions and two pictures of which occur twice."""
    generator = torch.Generator().manual_seed(5)

    def side(shape, lengths):
        features = torch.randn(NUM_PAIRS, 3, dtype=torch.float64, generator=generator)
        tokens = torch.randn(NUM_PAIRS, *shape, dtype=torch.float64, generator=generator)
        is_token = torch.arange(shape.num_tokens) < lengths[:, None]
        return Encoded(torch.nn.functional.normalize(features, dim=1), tokens, is_token)

    return (
        side(IMAGE, torch.full((NUM_PAIRS,), 3)),
        side(TEXT, torch.arange(NUM_PAIRS) % 4 + 1),
    )


def make_head():
    """A head in float64 whose match logit is not 0."""
    torch.manual_seed(7)
    config = FusionConfig(direction="both", width=8, heads=2, layers=1)
    head = FusionHead(IMAGE, TEXT, config, dual_scale=4.0, dual_bias=-2.0).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head


def own_rows(columns, rank, world_size):
    """This rank's rows of each column."""
    shares = SHARES[world_size]
    start = sum(shares[:rank])
    return [column[start : start + shares[rank]] for column in columns]


def look(rank, world_size, pairs_per_pass=1000):
    """Everything that ranks find together."""
    images, texts = (Encoded(*own_rows(side, rank, world_size)) for side in all_pairs())
    (ids,) = own_rows([IDS], rank, world_size)
    (sample_ids,) = own_rows([torch.arange(NUM_PAIRS)], rank, world_size)
    wanted = torch.tensor([10, 0, 0, 4][: 4 - rank], dtype=torch.long)
    numbers = torch.arange(NUM_PAIRS) * 10
    columns = own_rows([numbers, numbers % 20 == 0], rank, world_size)
    fetched = fetch_rows(columns, wanted)
    pairs = choose_hard_pairs(images, texts, ids, NUM_HARD, NUM_EASY)
    head = make_head()
    logits = judge_pairs(lambda *sides: head(*sides).logits, pairs, pairs_per_pass)
    loss = match_loss(*logits.tensor_split([pairs.num_positives]))
    loss.backward()
    return {
        "wanted": wanted,
        "fetched": fetched,
        "features": (
            pairs.images.features[pairs.image_rows],
            pairs.texts.features[pairs.text_rows],
        ),
        "loss": loss.detach(),
        "gradients": {name: p.grad for name, p in head.named_parameters()},
        "metrics": evaluate_reranking(
            head.eval(),
            images,
            texts,
            ids[:, 0],
            sample_ids,
            picture_ids=ids[:, 1],
            candidates=CANDIDATES,
            pairs_per_pass=8,
            top_k=(1, 2, 5),
        ),
    }


def refuse(rank, world_size):
    """Only the first rank asks for a row that does not exist."""
    try:
        fetch_rows([torch.arange(2)], torch.tensor([99 if rank == 0 else 0]))
    except ValueError as error:
        return str(error)
    return ""
