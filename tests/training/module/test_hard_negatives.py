"""What ranks choose, judge and re-rank together equals plain loops on all pairs."""

import pytest
import torch

from dist_siglip.models.reranker import Encoded
from dist_siglip.training.module.hard_negatives import judge_pairs
from tests.support import fusion_ranks, reference_fusion
from tests.support.fusion_ranks import (
    CANDIDATES,
    CAPTION_IDS,
    IDS,
    NUM_EASY,
    NUM_HARD,
    all_pairs,
    look,
    make_head,
    refuse,
)
from tests.support.processes import run_ranks

WORLDS = [1, 2, 3]


@pytest.fixture(scope="module")
def found():
    """Results of every rank, by world size."""
    return {size: run_ranks(look, size) if size > 1 else [look(0, 1)] for size in WORLDS}


@pytest.fixture(scope="module")
def expected():
    """Chosen pairs and their logits by loops over one process."""
    images, texts = all_pairs()
    head = make_head()
    state = {name: value.tolist() for name, value in head.state_dict().items()}
    pairs = reference_fusion.hard_pairs(
        images.features.tolist(),
        texts.features.tolist(),
        IDS.tolist(),
        NUM_HARD,
        NUM_EASY,
    )
    return pairs, state, head.config


def logit(state, config, image, text, judge=reference_fusion.head_logit):
    images, texts = all_pairs()
    return judge(
        state, config, [c[image].tolist() for c in images], [c[text].tolist() for c in texts]
    )


@pytest.mark.parametrize("world_size", WORLDS)
def test_fetched_rows_are_those_asked_for(found, world_size):
    for result in found[world_size]:
        numbers, flags = result["fetched"]
        assert numbers.tolist() == (result["wanted"] * 10).tolist()
        assert flags.tolist() == [w % 2 == 0 for w in result["wanted"].tolist()]
        assert flags.dtype == torch.bool


def test_a_row_that_does_not_exist_is_refused_on_every_rank():
    assert (
        run_ranks(refuse, 2)
        == [
            "positions to fetch must be from 0 to 3, the rows of all ranks; ask for rows that exist"
        ]
        * 2
    )


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_hardest_partners_of_all_ranks_are_chosen(found, expected, world_size):
    """Of whatever rank; equal captions, and those of one picture, are no wrong partners."""
    images, texts = all_pairs()
    chosen = []
    for result in found[world_size]:
        for image, text in zip(*result["features"], strict=True):
            chosen.append(
                (
                    int((images.features - image).norm(dim=1).argmin()),
                    int((texts.features - text).norm(dim=1).argmin()),
                )
            )
    assert sorted(chosen) == sorted(expected[0])
    wrong = [(image, text) for image, text in chosen if image != text]
    assert all((IDS[image] != IDS[text]).all() for image, text in wrong)


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(found, expected, world_size):
    pairs, state, config = expected
    logits = [logit(state, config, *pair) for pair in pairs]
    loss = reference_fusion.match_loss(logits[: len(CAPTION_IDS)], logits[len(CAPTION_IDS) :])
    mean = sum(result["loss"] for result in found[world_size]) / world_size
    assert mean.item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_the_mean_of_the_gradients_is_that_of_one_rank(found, world_size):
    (alone,) = found[1]
    largest = max(gradient.abs().max() for gradient in alone["gradients"].values())
    for name, gradient in alone["gradients"].items():
        mean = sum(result["gradients"][name] for result in found[world_size]) / world_size
        assert (mean - gradient).abs().max() <= 1e-12 * largest, name
    # One rank's share is not the whole, so a mean that leaves ranks out would be noticed.
    share = found[3][0]["gradients"]["match.weight"]
    assert (share - alone["gradients"]["match.weight"]).abs().max() > 1e-3 * largest


def test_the_gradient_equals_differences_of_the_loops(found, expected):
    pairs, state, config = expected
    step, count = 1e-6, len(CAPTION_IDS)

    def loss():
        logits = [logit(state, config, *pair) for pair in pairs]
        return reference_fusion.match_loss(logits[:count], logits[count:])

    gradients = found[1][0]["gradients"]
    for name in ("match.bias", "text_stream.norm.weight", "image_input.norm.bias"):
        kept = state[name][0]
        state[name][0] = kept + step
        upper = loss()
        state[name][0] = kept - step
        slope = (upper - loss()) / (2 * step)
        state[name][0] = kept
        assert gradients[name][0].item() == pytest.approx(slope, rel=1e-6)


def test_passes_of_a_few_pairs_give_the_same_gradients(found):
    few, (whole,) = look(0, 1, pairs_per_pass=7), found[1]
    assert few["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-12)
    for name, gradient in whole["gradients"].items():
        assert torch.allclose(few["gradients"][name], gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("world_size", WORLDS)
def test_reranked_recall_equals_loops_on_every_world(found, expected, world_size):
    _, state, config = expected
    images, texts = all_pairs()
    captions, pictures = IDS.T.tolist()
    # Every different picture and caption once, where it occurs first; every row asks.
    image_rows, text_rows = (
        [ids.index(i) for i in dict.fromkeys(ids)] for ids in (pictures, captions)
    )
    together = set(zip(pictures, captions, strict=True))
    similarities = (images.features @ texts.features.T)[image_rows][:, text_rows].tolist()
    judge = reference_fusion.score
    scores = [[logit(state, config, i, t, judge) for t in text_rows] for i in image_rows]
    is_relevant = [[(pictures[i], captions[t]) in together for t in text_rows] for i in image_rows]
    wanted = {}
    for direction, asked in (("image_to_text", pictures), ("text_to_image", captions)):
        tables = [similarities, scores, is_relevant]
        if asked is captions:
            tables = [[list(column) for column in zip(*t, strict=True)] for t in tables]
        rows = zip(*tables, strict=True)
        items = [reference_fusion.reranked_rank(*row, CANDIDATES) for row in rows]
        of_item = dict(zip(dict.fromkeys(asked), items, strict=True))
        ranks = [of_item[item] for item in asked]
        for k in (1, 2, 5):
            hits = sum(rank <= k for rank in ranks)
            wanted[f"reranked_{direction}_recall@{k}"] = hits / len(ranks)
        wanted[f"reranked_{direction}_median_rank"] = sorted(ranks)[len(ranks) // 2]
    for result in found[world_size]:
        assert result["metrics"] == pytest.approx(wanted, abs=1e-12)


def test_a_head_that_sees_the_wrong_rows_is_noticed(found):
    """Pairs whose texts are turned by one row give another loss."""
    images, texts = all_pairs()
    turned = Encoded(*(column.roll(1, 0) for column in texts))
    pairs = fusion_ranks.choose_hard_pairs(images, texts, IDS, NUM_HARD, NUM_EASY)
    head = make_head()
    pairs = pairs._replace(texts=turned_rows(pairs.texts, turned))
    logits = judge_pairs(lambda *sides: head(*sides).logits, pairs, 100)
    loss = fusion_ranks.match_loss(*logits.tensor_split([pairs.num_positives]))
    assert abs(loss.item() - found[1][0]["loss"].item()) > 1e-3


def turned_rows(rows, turned):
    return Encoded(*(torch.cat([t, r[len(t) :]]) for t, r in zip(turned, rows, strict=True)))
