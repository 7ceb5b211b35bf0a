import json

import numpy as np
import pytest
import torch

from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation import Classification
from dist_siglip.evaluation.classification import class_vectors, classify, summarise
from dist_siglip.evaluation.shards import LoadSettings
from tests.support import reference_benchmarks as reference
from tests.support.benchmark_models import image_map, known_model, text_map
from tests.support.benchmark_shards import CLASSES, label_of, write_labelled
from tests.support.shards import encode, picture, tokenize, write_shard

HERE = LoadSettings(local_batch_size=4, workers_per_rank=0)
NUM_SAMPLES = 13


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def pixels():
    transform = evaluation_transform(known_model().inputs)
    return torch.stack([transform(picture(i)) for i in range(NUM_SAMPLES)])


def prompts_of(name):
    return [f"a photo of {name}.", f"the number {name}"]


def test_it_equals_the_loops_over_all_pictures_and_classes(shards):
    found = Classification(shards, loading=HERE).evaluate(known_model())
    classes = [reference.class_vector(text_map(tokenize(prompts_of(name)))) for name in CLASSES]
    labels = [label_of(i) for i in range(NUM_SAMPLES)]
    expected = reference.accuracies(image_map(pixels()), classes, labels)
    assert found.metrics == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["acc1"] < expected["acc5"] < 1


def _top_k(output, target, topk):
    """CLIP_benchmark's ``accuracy``, whose last step numpy 2.4 refuses in version 1.6.2."""
    hits = output.topk(max(topk), 1, True, True)[1].t().eq(target.view(1, -1))
    return [float(hits[:k].reshape(-1).float().sum()) / len(target) for k in topk]


def test_it_equals_clip_benchmark(shards, monkeypatch):
    oracle = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    monkeypatch.setattr(oracle, "accuracy", _top_k)

    class Model:
        encode_image = staticmethod(image_map)
        encode_text = staticmethod(text_map)

    class Loader(list):
        class dataset:  # noqa: N801 - where CLIP_benchmark looks for the classes
            classes = CLASSES

    labels = torch.tensor([label_of(i) for i in range(NUM_SAMPLES)])
    templates = ["a photo of {c}.", "the number {c}"]
    loader = Loader([(pixels(), labels)])
    expected = oracle.evaluate(Model, loader, tokenize, CLASSES, templates, "cpu", amp=False)
    found = Classification(shards, loading=HERE).evaluate(known_model())
    assert found.metrics == pytest.approx(expected, abs=1e-12)


def test_the_counts_are_those_of_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score

    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 6, (2, 200))
    ranks = np.where(labels == predictions, 1, 3)
    found = summarise(labels, predictions, ranks, classes=list("abcdef"))
    recall = balanced_accuracy_score(labels, predictions)
    assert found.metrics["mean_per_class_recall"] == pytest.approx(recall)
    expected = recall_score(labels, predictions, average=None)
    assert [row["recall"] for row in found.details["classes"]] == pytest.approx(list(expected))
    matrix = np.zeros((6, 6))
    for label, prediction, count in found.details["confusion"]:
        matrix[label, prediction] = count
    assert (matrix == confusion_matrix(labels, predictions)).all()


def test_the_top_5_are_those_of_torchmetrics():
    from torchmetrics.functional.classification import multiclass_accuracy

    generator = torch.Generator().manual_seed(0)
    images, classes = (torch.randn(n, 4, generator=generator) for n in (50, 9))
    labels = torch.randint(0, 9, (50,), generator=generator)
    predictions, ranks = classify(images, classes, labels, chunk_rows=7)
    for k in (1, 5):
        expected = multiclass_accuracy(images @ classes.T, labels, 9, average="micro", top_k=k)
        assert float((ranks <= k).float().mean()) == pytest.approx(float(expected))
    assert torch.equal(predictions, (images @ classes.T).argmax(dim=1))


def test_class_vectors_are_those_of_open_clip():
    from open_clip import build_zero_shot_classifier

    class Model:
        @staticmethod
        def encode_text(texts, normalize):
            return text_map(texts)

    names = [f"class {number}" for number in range(70)]  # more than one round
    expected = build_zero_shot_classifier(Model, tokenize, names, ["a {}", "the {}!"])
    found = class_vectors(known_model(), names, ["a {}", "the {}!"])
    assert torch.allclose(found, expected.T, atol=1e-6)


def test_of_two_classes_of_one_name_the_first_is_the_answer():
    classes = torch.eye(2)[[1, 0, 0]]
    predictions, ranks = classify(torch.eye(2)[[0, 0]], classes, torch.tensor([1, 2]))
    assert predictions.tolist() == [1, 1]
    assert ranks.tolist() == [1, 2]


def test_a_space_that_has_collapsed_scores_by_chance():
    found = classify(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4))
    assert found[0].tolist() == [0, 0, 0, 0]
    assert found[1].tolist() == [1, 2, 3, 4]


def test_details_name_every_class_and_can_be_written(shards):
    details = Classification(shards, loading=HERE).evaluate(known_model()).details
    assert [row["name"] for row in details["classes"]] == list(CLASSES)
    assert details["classes"][-1] == {"name": "five", "pictures": 0}
    assert sum(count for *_, count in details["confusion"]) == details["pictures"] == NUM_SAMPLES
    assert details["left_out"] == 0
    json.dumps(details, allow_nan=False)


def test_two_classes_have_no_top_5(tmp_path):
    shards = write_labelled(tmp_path, counts=(3,), label=lambda i: i % 2)
    found = Classification(shards, classes=["a", "b"], loading=HERE).evaluate(known_model())
    assert set(found.metrics) == {"acc1", "mean_per_class_recall"}


def test_a_label_that_is_no_class_is_refused_with_its_sample(tmp_path):
    shards = write_labelled(tmp_path, counts=(3,), label=lambda i: 4 + i)
    with pytest.raises(UserError, match=r"label \('6'\) of '.*0002' must be a number from 0 to 5"):
        Classification(shards, loading=HERE).evaluate(known_model())


def test_a_bad_picture_is_left_out_and_named(tmp_path, caplog):
    broken = {"png": encode(picture(1))[:60], "cls": b"1"}
    sound = [(f"s{i}", {"png": encode(picture(i)), "cls": b"0"}) for i in range(3)]
    shard = str(write_shard(tmp_path / "a.tar", [*sound, ("bad", broken)]))
    tolerant = LoadSettings(workers_per_rank=0, max_bad_fraction=0.25)
    settings = {"classes": ["a", "b"], "templates": ["{}"], "name": "broken"}
    found = Classification(shard, **settings, loading=tolerant).evaluate(known_model())
    assert (found.details["pictures"], found.details["left_out"]) == (3, 1)
    assert "benchmark broken leaves out" in caplog.text
    with pytest.raises(UserError, match=r"max_bad_fraction \(0.01\) .* 1 of 4 samples cannot"):
        Classification(shard, **settings, loading=HERE).evaluate(known_model())


def test_shards_without_labels_are_refused_before_anything_starts(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [("a", {"png": encode(picture(0)), "txt": b"a"})])
    with pytest.raises(UserError, match=r"samples have no caption \(\.cls\)"):
        Classification(str(shard), "imagenet", "openai").check()


def test_missing_class_names_are_refused_before_anything_starts(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [("a", {"png": encode(picture(0)), "cls": b"0"})])
    with pytest.raises(UserError, match=r"there is no classnames\.txt beside the shards"):
        Classification(str(shard)).check()
    with pytest.raises(UserError, match=r"templates \(null\) are needed"):
        Classification(str(shard), "imagenet").check()
    with pytest.raises(UserError, match=r"local_batch_size \(0\) must be at least 1"):
        Classification(str(shard), loading=LoadSettings(local_batch_size=0)).check()
