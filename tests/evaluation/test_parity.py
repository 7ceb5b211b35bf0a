"""One rank or three: the same numbers, the same number of calls, and refusals on all of them."""

import copy

import pytest
import torch

from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.errors import UserError
from dist_siglip.evaluation import Classification, PairMetrics, Retrieval
from dist_siglip.evaluation import retrieval as module
from dist_siglip.evaluation.shards import LoadSettings
from tests.support.benchmark_models import known_model
from tests.support.benchmark_shards import write_captioned, write_labelled
from tests.support.processes import run_ranks

HERE = LoadSettings(local_batch_size=3, workers_per_rank=0)


def _complaint(action):
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def _without_the_other_ranks(shards, model):
    """Broken on purpose: every rank counts its own queries alone."""
    gather, module.gather_rows = module.gather_rows, lambda rows, group=None: rows
    try:
        return Retrieval(shards, loading=HERE).evaluate(model).metrics
    finally:
        module.gather_rows = gather


def _evaluate(rank, world_size, folder):
    calls = []
    model = known_model(calls)
    labelled, captioned = f"{folder}/labelled/test", f"{folder}/captioned/test"
    few = f"{captioned}/2.tar"  # one sample: other ranks have none
    results = [
        Classification(labelled, loading=HERE).evaluate(model),
        Retrieval(captioned, loading=HERE).evaluate(model),
        Retrieval(few, loading=HERE).evaluate(model),
        PairMetrics(
            captioned, captions=CaptionRule(split_lines=True), loading=HERE, global_batch_size=8
        ).evaluate(model),
    ]
    bad_labels = _complaint(
        lambda: Classification(f"{folder}/bad/test", loading=HERE).evaluate(model)
    )
    broken = _without_the_other_ranks(captioned, known_model())
    return [tuple(result) for result in results], calls, bad_labels, broken


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("parity")
    write_labelled(made / "labelled")
    write_captioned(made / "captioned")
    write_labelled(made / "bad", counts=(5,), label=lambda i: 9 if i == 4 else 0)
    return made


@pytest.fixture(scope="module")
def alone(folder):
    return _evaluate(0, 1, folder)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, folder, alone):
    return run_ranks(_evaluate, request.param, folder)


def test_results_do_not_depend_on_the_number_of_ranks(alone, ranks):
    for results, *_ in ranks:
        for (metrics, details), (expected, expected_details) in zip(results, alone[0], strict=True):
            assert metrics == pytest.approx(expected, abs=1e-6)
            assert details == expected_details


def test_ranks_call_the_encoders_equally_often(ranks):
    """Sharded towers gather their weights in every call: one call less would hang the others."""
    names = [[name for name, _ in calls] for _, calls, *_ in ranks]
    assert all(each == names[0] for each in names)
    assert min(rows for _, calls, *_ in ranks for _, rows in calls) >= 1


def test_no_sample_is_encoded_for_two_ranks(alone, ranks):
    def num_rows(results):
        return sum(rows for _, calls, *_ in results for name, rows in calls if name == "image")

    surplus = num_rows(ranks) - num_rows([alone])
    assert 0 <= surplus <= 5 * len(ranks)  # five times at most one stand-in for each rank


def test_all_ranks_refuse_a_label_that_one_of_them_has(alone, ranks):
    complaints = {complaint for _, _, complaint, _ in ranks}
    assert complaints == {alone[2]}
    assert "label ('9')" in alone[2]


def test_a_rank_that_counts_alone_is_noticed(alone, ranks):
    expected = alone[0][1][0]
    assert alone[3] == expected
    assert any(broken != pytest.approx(expected, abs=1e-6) for *_, broken in ranks)


def test_the_results_are_those_of_a_model_that_tells_something(alone):
    """No metric of these is 0 or 1 throughout, so that equal numbers mean something."""
    classification, retrieval, _, pairs = (metrics for metrics, _ in alone[0])
    assert 0 < classification["acc1"] < 1
    assert 0 < retrieval["text_retrieval_recall@5"] < 1
    assert pairs["gallery_pairs"] == 13


def test_pair_metrics_are_those_of_evaluate_pairs(folder, alone):
    from dist_siglip.metrics import evaluate_pairs

    benchmark = PairMetrics(
        f"{folder}/captioned/test", captions=CaptionRule(split_lines=True), loading=HERE
    )
    encoded = copy.deepcopy(benchmark)._shards.encode(known_model(), encoded_texts=1)
    firsts = [texts[0] for texts in encoded.texts]
    ids = torch.tensor([firsts.index(text) for text in firsts])
    expected = evaluate_pairs(
        encoded.image_features,
        encoded.text_features,
        ids,
        ids,
        encoded.sample_ids,
        logit_scale=10.0,
        logit_bias=-5.0,
        global_batch_size=8,
    )
    assert alone[0][3][0] == pytest.approx(expected.metrics)
