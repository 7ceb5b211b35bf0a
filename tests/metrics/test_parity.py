"""Every metric is the same number on 1, 2 and 3 ranks, with uneven rows and an empty rank."""

import pytest
import torch
import torch.nn.functional as F

from dist_siglip.errors import UserError
from dist_siglip.metrics import (
    PairEvaluation,
    evaluate_pairs,
    linear_separability,
    modality_gap,
    recall_at_k,
    retrieval_ranks,
    retrieval_ranks_both_ways,
    uniformity,
)
from tests.support import metric_reference
from tests.support.processes import run_ranks

SETTINGS = {
    "logit_scale": 12.0,
    "logit_bias": -6.0,
    "global_batch_size": 16,
    "prefix_dims": (4,),
}
COUNT = 23
# Owner of every pair; pairs of one caption lie on several ranks, rank 1 of 3 has none.
OWNERS = {
    1: torch.zeros(COUNT, dtype=torch.int64),
    2: (torch.arange(COUNT) % 5 > 1).long(),
    3: 2 * (torch.arange(COUNT) % 3 > 0).long(),
}
SUMS = {"image_explained_variance", "text_explained_variance"}
EXCHANGES = ("ring", "all_gather", "auto")


def _pairs():
    generator = torch.Generator().manual_seed(7)
    images = F.normalize(torch.randn(COUNT, 6, generator=generator), dim=1)
    texts = F.normalize(images + 0.5 * torch.randn(COUNT, 6, generator=generator), dim=1)
    ids = torch.arange(COUNT) % 17
    texts[2], texts[9] = texts[5], texts[5]  # ties between different captions
    sample_ids = torch.randperm(COUNT, generator=generator)
    return images, texts, ids, ids.clone(), sample_ids


def _pictures():
    """Pictures with several captions, and captions with several pictures, over all ranks."""
    generator = torch.Generator().manual_seed(8)
    pictures, captions = torch.arange(COUNT) % 7, torch.arange(COUNT) * 3 % 10
    images = F.normalize(torch.randn(7, 6, generator=generator), dim=1)[pictures]
    texts = F.normalize(torch.randn(10, 6, generator=generator), dim=1)[captions]
    sample_ids = torch.randperm(COUNT, generator=generator)
    return images, texts, captions, captions.clone(), sample_ids, pictures


def _own(columns, world_size, rank):
    mine = OWNERS[world_size] == rank
    return [column[mine] for column in columns]


def _refusal(call, *args, **settings):
    try:
        call(*args, **settings)
    except UserError as error:
        return str(error)
    return "no error"


def _measure(rank, world_size):
    own = images, texts, image_ids, text_ids, sample_ids = _own(_pairs(), world_size, rank)
    results = {}
    for exchange in EXCHANGES:
        evaluation = evaluate_pairs(*own, **SETTINGS, exchange=exchange, chunk_rows=4)
        both = retrieval_ranks_both_ways(*own[:4], exchange=exchange, chunk_rows=3)
        one = retrieval_ranks(texts, images, text_ids, image_ids, exchange=exchange)
        results[exchange] = {
            "metrics": evaluation.metrics,
            "arrays": evaluation.arrays,
            "both": both,
            "one": one,
        }
    # Different numbers of images and texts, and captions that all lie beside their images.
    fewer = images[1:], texts, image_ids[1:], text_ids
    results["uneven_sides"] = retrieval_ranks_both_ways(*fewer)
    results["local_ids"] = retrieval_ranks_both_ways(
        images, texts, sample_ids, sample_ids, chunk_rows=5
    )
    *rows, pictures = _own(_pictures(), world_size, rank)
    for exchange in EXCHANGES:
        results[exchange]["pictures"] = evaluate_pairs(
            *rows, **SETTINGS, picture_ids=pictures, exchange=exchange, chunk_rows=4
        )
    collector = PairEvaluation()
    collector.update(*own)
    results["collected"] = collector.compute(**SETTINGS).metrics
    results["alone"] = {
        "gap": tuple(modality_gap(images, texts)),
        "uniformity": uniformity(images, chunk_rows=3),
        "separability": linear_separability(images, texts, sample_ids, max_pairs=15),
    }
    return results


def _misuse(rank, world_size):
    own = images, texts, image_ids, text_ids, sample_ids = _own(_pairs(), world_size, rank)
    last = rank == world_size - 1
    broken = images.clone()
    if last:
        broken[3, 0] = torch.nan
    wide = F.pad(images, (0, 1)) if last else images
    long_ids = torch.cat([image_ids, image_ids]) if last else image_ids
    nothing = [column[:0] for column in own]
    return {
        "nan": _refusal(retrieval_ranks_both_ways, broken, texts, image_ids, text_ids),
        "evaluate nan": _refusal(evaluate_pairs, broken, *own[1:], **SETTINGS),
        "width": _refusal(modality_gap, wide, texts),
        "ids": _refusal(retrieval_ranks, images, texts, long_ids, text_ids),
        "pair": _refusal(
            evaluate_pairs, images, texts, image_ids + int(last), text_ids, sample_ids, **SETTINGS
        ),
        "empty": _refusal(evaluate_pairs, *nothing, **SETTINGS),
        "next": modality_gap(images, texts).alignment,  # all ranks are still in step
    }


@pytest.fixture(scope="module")
def single():
    return _measure(0, 1)


def _measure_and_misuse(rank, world_size):
    return _measure(rank, world_size), _misuse(rank, world_size)


@pytest.fixture(scope="module", params=[1, 2, 3])
def both_results(request):
    """One start of the processes for all tests of a world size."""
    return request.param, run_ranks(_measure_and_misuse, request.param)


@pytest.fixture(scope="module")
def everyone(both_results):
    return both_results[0], [measured for measured, _ in both_results[1]]


@pytest.fixture(scope="module")
def refusals(both_results):
    return both_results[0], [refused for _, refused in both_results[1]]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_metric_is_that_of_one_process(single, everyone, exchange):
    for result in everyone[1]:
        expected = single["auto"]["metrics"]
        assert result[exchange]["metrics"] == pytest.approx(expected, rel=1e-11, abs=1e-13)
        assert result["collected"] == pytest.approx(expected, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_pictures_with_several_captions_are_one_wherever_their_rows_lie(everyone, exchange):
    images, texts, captions, _, sample_ids, pictures = _pictures()
    expected = metric_reference.pair_ranks(images, texts, pictures, captions, sample_ids)
    order = sample_ids.argsort().tolist()
    alone = evaluate_pairs(
        images, texts, captions, captions, sample_ids, **SETTINGS, picture_ids=pictures
    )
    for result in everyone[1]:
        found = result[exchange]["pictures"]
        for direction, ranks in zip(("image_to_text", "text_to_image"), expected, strict=True):
            assert found.arrays[f"{direction}_ranks"].tolist() == [ranks[i] for i in order]
        assert found.metrics == pytest.approx(alone.metrics, rel=1e-11, abs=1e-13)


def test_every_rank_has_the_same_metrics_to_the_bit(everyone):
    results = everyone[1]
    assert all(r["auto"]["metrics"] == results[0]["auto"]["metrics"] for r in results)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_arrays_are_those_of_one_process_on_every_rank(single, everyone, exchange):
    for result in everyone[1]:
        for name, expected in single["auto"]["arrays"].items():
            found = result[exchange]["arrays"][name]
            if name in SUMS:  # which are added in another order
                assert found == pytest.approx(expected, rel=1e-11), name
            else:
                assert (found == expected).all(), name


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_of_own_rows_are_on_the_global_gallery(single, everyone, exchange):
    world_size, results = everyone
    for rank, result in enumerate(results):
        for mine, all_ranks in zip(result[exchange]["both"], single["auto"]["both"], strict=True):
            assert mine.tolist() == _own([all_ranks], world_size, rank)[0].tolist()
        assert torch.equal(result[exchange]["one"], result[exchange]["both"][1])


def test_exchange_for_the_best_is_saved_without_changing_ranks(single, everyone):
    world_size, results = everyone
    for rank, result in enumerate(results):
        for mine, all_ranks in zip(result["local_ids"], single["local_ids"], strict=True):
            assert mine.tolist() == _own([all_ranks], world_size, rank)[0].tolist()


def test_sides_of_different_length_are_ranked_on_one_gallery(everyone):
    world_size, results = everyone
    images, texts, image_ids, text_ids, _ = _pairs()
    kept = torch.cat([(OWNERS[world_size] == rank).nonzero()[1:, 0] for rank in range(world_size)])
    expected = retrieval_ranks_both_ways(images[kept], texts, image_ids[kept], text_ids)
    image_to_text = torch.cat([result["uneven_sides"][0] for result in results])
    assert image_to_text.tolist() == expected[0].tolist()
    for rank, result in enumerate(results):
        own = _own([expected[1]], world_size, rank)[0]
        assert result["uneven_sides"][1].tolist() == own.tolist()


def test_single_functions_are_those_of_one_process(single, everyone):
    for result in everyone[1]:
        assert result["alone"]["gap"] == pytest.approx(single["alone"]["gap"], rel=1e-12)
        assert result["alone"]["uniformity"] == pytest.approx(single["alone"]["uniformity"])
        assert result["alone"]["separability"] == single["alone"]["separability"]


def test_averaged_local_galleries_are_another_number(single):
    """The shortcut these functions exist to avoid would not pass the tests above."""
    recalls = []
    for rank in (0, 2):
        own = _own(_pairs(), 3, rank)
        recalls.append(recall_at_k(retrieval_ranks(*own[:4]), 5))
    assert sum(recalls) / 2 > single["auto"]["metrics"]["image_to_text_recall@5"] + 0.05


def test_unusable_rows_are_refused_on_every_rank_by_name(refusals):
    world_size, results = refusals
    last = world_size - 1
    for result in results:
        assert "image_features row 3 holds a value that is not finite" in result["nan"]
        assert f"(rank {last})" in result["nan"]
        assert result["evaluate nan"] == result["nan"]
        assert "embedding sizes" in result["width"]
        assert "one per row of image_features" in result["ids"]
        assert "row 0 is no pair" in result["pair"]
        assert "no rank has any pair" in result["empty"]
    assert len({result["next"] for result in results}) == 1
