"""Probes, choices, folders and languages on one rank or several: the same numbers."""

import json

import pytest

from dist_siglip.distributed import gather_rows
from dist_siglip.evaluation import BabelImageNet, CaptionChoice, FolderRetrieval, LinearProbe
from dist_siglip.evaluation import probe as module
from dist_siglip.evaluation.shards import LoadSettings
from tests.support.benchmark_models import known_model
from tests.support.benchmark_shards import write_labelled
from tests.support.processes import run_ranks
from tests.support.shards import picture

HERE = LoadSettings(local_batch_size=3, workers_per_rank=0)


def _evaluate(rank, world_size, folder):
    calls = []
    model = known_model(calls)
    train, test = f"{folder}/labelled/test", f"{folder}/labelled/test/0.tar"
    results = [
        LinearProbe(train, test, loading=HERE, max_iterations=50),
        LinearProbe(train, test, loading=HERE, shots=1, c=1.0, neighbors=3),
        CaptionChoice(f"{folder}/choice", local_batch_size=2),
        FolderRetrieval(f"{folder}/captions", local_batch_size=2),
        BabelImageNet(test, f"{folder}/names.json", "{}", loading=HERE),
    ]
    results = [tuple(each.evaluate(model)) for each in results]
    names = [name for name, _ in calls]
    probe = LinearProbe(train, test, loading=HERE, c=100.0, neighbors=0)
    right = probe.evaluate(model).metrics
    gather_rows, module.gather_rows = module.gather_rows, _keep_features_back
    try:  # broken on purpose: the first rank fits to its own rows
        broken = probe.evaluate(model).metrics
    finally:
        module.gather_rows = gather_rows
    return results, names, right, broken


def _keep_features_back(rows, group=None):
    """Pictures of other ranks count for nothing: each is as the first of this rank."""
    found = gather_rows(rows, group)
    return rows[:1].expand_as(found).clone() if rows.is_floating_point() else found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("more_parity")
    write_labelled(made / "labelled", counts=(14, 9), label=lambda i: i % 5)
    for name in ("choice", "captions"):
        (made / name).mkdir()
        for number in range(31):
            picture(number).save(made / name / f"{number}.png")
    choices = [
        {
            "images": [f"{n}.png", f"{n + 1}.png"],
            "captions": [f"a is in {n * n}", f"b is in {n * n}"],
        }
        for n in range(30)
    ]
    rows = [
        {"image": f"{n}.png", "captions": {"de": [f"{n} eins", f"{n} zwei"], "en": f"{n} one"}}
        for n in range(7)
    ]
    for path, lines in (("choice/choices.jsonl", choices), ("captions/captions.jsonl", rows)):
        (made / path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made / "names.json").write_text(json.dumps({"DE": [[4, 3, 2, 1, 0], list("abcde")]}))
    return made


@pytest.fixture(scope="module")
def alone(folder):
    return _evaluate(0, 1, folder)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, folder, alone):
    return run_ranks(_evaluate, request.param, folder)


def test_results_do_not_depend_on_the_number_of_ranks(alone, ranks):
    for results, *_ in ranks:
        for (metrics, details), expected in zip(results, alone[0], strict=True):
            assert metrics == pytest.approx(expected[0], abs=1e-9)
            assert details == expected[1]


def test_ranks_call_the_encoders_equally_often(ranks):
    assert all(calls == ranks[0][1] for _, calls, *_ in ranks)


def test_a_probe_of_the_rows_of_the_first_rank_alone_is_noticed(alone, ranks):
    for *_, right, broken in ranks:
        assert right == pytest.approx(alone[2], abs=1e-9)
        assert broken != pytest.approx(alone[2], abs=1e-3)


def test_the_results_are_those_of_a_model_that_tells_something(alone):
    probe, few, choice, captions, babel = (metrics for metrics, _ in alone[0])
    assert 0 < few["lp_acc1"] < 1
    assert 0 < probe["knn_acc1"] < 1
    assert 0 < choice["text_acc"] < 1
    assert 0 < captions["text_retrieval_recall@5"] < 1
    assert 0 < babel["acc1"] < 1
