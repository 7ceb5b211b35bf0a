import json

import numpy as np
import pytest

from dist_siglip.errors import UserError
from dist_siglip.evaluation import BenchmarkResult
from dist_siglip.evaluation.shards import LoadSettings
from dist_siglip.evaluation.suites import (
    DATA_SETS,
    SUITES,
    SuiteValues,
    is_counted,
    main_metric,
    read_suite,
    read_values,
    suite_averages,
)
from tests.support.benchmark_models import known_model
from tests.support.benchmark_shards import write_captioned, write_labelled

HERE = LoadSettings(local_batch_size=8, workers_per_rank=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four data sets as they are downloaded, and two that no table has."""
    root = tmp_path_factory.mktemp("evals")
    for name in ("wds_vtab-pets_test", "wds_imagenet1k", "wds_imagenet-a_test", "wds_mine"):
        write_labelled(root / name)
        (root / name / "test" / "nshards.txt").write_text("3\n")
    write_labelled(root / "once")
    (root / "once" / "test").rename(root / "wds_imagenet1k" / "train")
    write_captioned(root / "wds_flickr30k")
    (root / "wds_flickr30k" / "dataset_type.txt").write_text("retrieval\n")
    (root / "wds_voc2007_multilabel").mkdir()
    (root / "wds_voc2007_multilabel" / "dataset_type.txt").write_text("multilabel\n")
    return root


def evaluate(suite, folder, **settings):
    members = read_suite(suite, str(folder), loading=HERE, **settings)
    model = known_model()
    results = {each.name: each.evaluate(model) for _, each in members if not each.check()}
    return members, results


def test_the_tables_are_those_of_datacomp_and_of_clip_benchmark():
    groups = SUITES["datacomp"]
    counts = {name: len(keys) for name, keys in groups.items()}
    assert counts == {
        "ImageNet": 1,
        "ImageNet dist. shifts": 6,
        "VTAB": 13,
        "Retrieval": 3,
        "Average": 38,
    }
    builder = pytest.importorskip("clip_benchmark.datasets.builder")

    def last(keys):
        return {key.rpartition("/")[2] for key in keys}

    for suite in ("vtab", "vtab+", "imagenet_robustness"):
        theirs = last(builder.dataset_collection[suite]) - {"voc2007_multilabel"}
        assert last(SUITES[suite]["Average"]) == theirs
    for keys in (*SUITES.values(),):
        assert all(set(group) <= set(DATA_SETS) for group in keys.values())


def test_what_is_in_the_folder_of_a_suite_is_found(folder):
    members = read_suite("datacomp", str(folder), loading=HERE)
    assert {key: (each.name, each.dataset, each.task) for key, each in members} == {
        "vtab/pets": ("vtab-pets", "wds/vtab/pets", "zeroshot_classification"),
        "imagenet1k": ("imagenet1k", "wds/imagenet1k", "zeroshot_classification"),
        "imagenet-a": ("imagenet-a", "wds/imagenet-a", "zeroshot_classification"),
        "retrieval/flickr30k": ("flickr30k", "wds/flickr30k", "zeroshot_retrieval"),
    }
    names = {each.name for _, each in read_suite("all", str(folder), loading=HERE)}
    assert names == {"vtab-pets", "imagenet1k", "imagenet-a", "flickr30k", "mine"}
    shifts = read_suite("imagenet_robustness", str(folder), loading=HERE)
    assert [each.name for _, each in shifts] == ["imagenet-a"]


def test_averages_are_means_of_the_main_metrics_that_are_there(folder):
    members, results = evaluate("datacomp", folder)
    found = SuiteValues.of("datacomp", members, results)
    retrieval, pets = results["flickr30k"].metrics, results["vtab-pets"].metrics
    ways = [retrieval[f"{way}_retrieval_recall@1"] for way in ("image", "text")]
    acc1 = results["imagenet1k"].metrics["acc1"]
    recall = pets["mean_per_class_recall"]
    assert recall != pets["acc1"]
    expected = {
        "ImageNet": (acc1, 1, 1),
        "ImageNet dist. shifts": (results["imagenet-a"].metrics["acc1"], 1, 6),
        "VTAB": (recall, 1, 13),
        "Retrieval": (sum(ways) / 2, 1, 3),
        "Average": ((2 * acc1 + recall + sum(ways) / 2) / 4, 4, 38),
    }
    for name, average in suite_averages("datacomp", found.values).items():
        assert tuple(average) == pytest.approx(expected[name]), name
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["averages"]["VTAB"] == {
        "value": pytest.approx(recall),
        "count": 1,
        "of": 13,
    }
    assert main_metric("all", "vtab/pets", results["vtab-pets"]) == ("acc1", pets["acc1"])


def test_the_f1_of_iwildcam_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    labels, told = np.random.default_rng(0).integers(0, 6, (2, 80))
    labels[labels == 4] = 1  # a class that is told and does not occur
    pairs, counts = np.unique(np.stack([labels, told], 1), axis=0, return_counts=True)
    confusion = np.column_stack([pairs, counts]).tolist()
    result = BenchmarkResult({"acc1": 0.0}, {"confusion": confusion})
    expected = f1_score(labels, told, labels=np.unique(labels), average="macro")
    assert main_metric("datacomp", "wilds/iwildcam", result) == (
        "F1-macro_all",
        pytest.approx(expected),
    )


def test_a_main_metric_that_is_not_measured_is_left_out_of_the_average():
    result = BenchmarkResult({"acc1": 0.5}, {})
    assert main_metric("datacomp", "wilds/fmow", result) == ("acc_worst_region", None)
    averages = suite_averages("datacomp", {})
    assert averages["Average"].present == 0
    assert np.isnan(averages["Average"].value)


def test_data_sets_with_a_training_split_have_a_probe_where_it_is_asked_for(folder):
    members, results = evaluate("imagenet_robustness", folder, probes=True)
    assert len(members) == 1  # no training split
    members = read_suite("datacomp", str(folder), probes=True, loading=HERE)
    (probe,) = (each for _, each in members if not is_counted(each))
    assert (probe.name, probe.dataset) == ("imagenet1k_probe", "wds/imagenet1k")
    found = probe.evaluate(known_model()).metrics
    assert 0 < found["lp_acc1"] <= 1
    results[probe.name] = BenchmarkResult({"lp_acc1": 1.0}, {})
    assert "imagenet1k" not in SuiteValues.of("datacomp", members, results).values


def test_another_run_can_be_compared(folder, tmp_path):
    members, results = evaluate("datacomp", folder)
    for name, result in results.items():
        content = {"metrics": result.metrics}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    values = SuiteValues.of("datacomp", members, results).values
    assert read_values("datacomp", tmp_path, members) == pytest.approx(values)
    (tmp_path / "imagenet1k.json").write_text("[]")
    with pytest.raises(UserError, match=r"imagenet1k\.json is no result of a benchmark"):
        read_values("datacomp", tmp_path, members)
    with pytest.raises(UserError, match="has no result of these data sets"):
        read_values("datacomp", tmp_path / "none", members)


@pytest.mark.parametrize(
    ("suite", "where", "match"),
    [
        ("imagenet", "", r"suite \(imagenet\) must be one of datacomp, vtab"),
        ("datacomp", "nowhere", "is no folder"),
        ("datacomp", "wds_mine", r"has no data set of suite datacomp: folders are called"),
    ],
)
def test_a_suite_that_is_not_there_is_told_in_one_line(folder, suite, where, match):
    with pytest.raises(UserError, match=match) as caught:
        read_suite(suite, str(folder / where))
    assert "\n" not in str(caught.value)


def test_an_incomplete_data_set_is_told_in_one_line(tmp_path):
    write_labelled(tmp_path / "wds_cars")
    count = tmp_path / "wds_cars" / "test" / "nshards.txt"
    for text, match in (("4", "lacks 1 of 4 shards"), ("many", "must hold a number of shards")):
        count.write_text(text)
        with pytest.raises(UserError, match=match):
            read_suite("datacomp", str(tmp_path))
    count.unlink()
    (tmp_path / "wds_cars" / "classnames.txt").unlink()
    ((_, benchmark),) = read_suite("datacomp", str(tmp_path), loading=HERE)
    with pytest.raises(UserError, match=r"there is no classnames\.txt beside the shards"):
        benchmark.check()
    write_labelled(tmp_path / "wds_cars_test")
    with pytest.raises(UserError, match="beside another folder of cars"):
        read_suite("datacomp", str(tmp_path))
