import time
from functools import cache

import pytest
import torch

from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation import LinearProbe
from dist_siglip.evaluation import probe as module
from dist_siglip.evaluation.probe import (
    STRENGTHS,
    label_scores,
    places_in_class,
    search_strength,
)
from dist_siglip.evaluation.shards import LoadSettings
from tests.support.benchmark_models import image_map, known_model
from tests.support.shards import encode, picture, write_shard

HERE = LoadSettings(local_batch_size=16, workers_per_rank=0)
NUM_CLASSES, TRAIN, TEST = 7, range(100, 190), range(40)


def pixels(sample_ids):
    transform = evaluation_transform(known_model().inputs)
    return torch.stack([transform(picture(i)) for i in sample_ids])


@cache
def thresholds():
    return torch.quantile(image_map(pixels(TRAIN))[:, 0], torch.linspace(0, 1, NUM_CLASSES + 1))


@cache
def label_of(sample_id):
    """How much a picture has of the first feature, in as many steps as there are classes."""
    return int((image_map(pixels([sample_id]))[0, 0] > thresholds()[1:-1]).sum())


def write(path, sample_ids):
    members = [
        (f"{i:04d}", {"png": encode(picture(i)), "cls": str(label_of(i)).encode()})
        for i in sample_ids
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(write_shard(path, members))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    return write(folder / "train" / "0.tar", TRAIN), write(folder / "test" / "0.tar", TEST)


@pytest.fixture(scope="module")
def rows():
    """(features, labels) of both splits."""
    return [
        (image_map(pixels(ids)).double().numpy(), [label_of(i) for i in ids])
        for ids in (TRAIN, TEST)
    ]


def probe(shards, **settings):
    return LinearProbe(*shards, loading=HERE, **settings)


def test_at_a_given_strength_it_is_the_probe_of_scikit_learn(shards, rows):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    (features, labels), (asked, expected) = rows
    theirs = LogisticRegression(C=10.0, tol=1e-8, max_iter=5000).fit(features, labels)
    found = probe(shards, c=10.0, neighbors=0).evaluate(known_model())
    told = theirs.predict(asked)
    assert found.metrics == pytest.approx(
        {
            "lp_acc1": theirs.score(asked, expected),
            "lp_acc5": top_k_accuracy_score(
                expected, theirs.predict_proba(asked), k=5, labels=theirs.classes_
            ),
            "lp_mean_per_class_recall": balanced_accuracy_score(expected, told),
        }
    )
    assert 0.2 < found.metrics["lp_acc1"] < 1
    assert found.details["train_pictures"] == len(TRAIN)


def regression(labels, num_classes, max_iterations=1000):
    told = []
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(labels), 4, generator=generator)
    rows = module._Rows(features, labels, torch.arange(len(labels)).flip(0))
    made = module._Regression(rows, num_classes, max_iterations, lambda: told.append(1))
    return features, made, told


@pytest.mark.parametrize("classes", [[0, 1], [0, 1, 2], [1, 4], [0, 2, 4]])
def test_classes_without_pictures_change_nothing_and_are_never_told(classes):
    from sklearn.linear_model import LogisticRegression

    labels = torch.tensor(classes).repeat(9)
    features, made, _ = regression(labels, 6)
    theirs = LogisticRegression(C=3.0)
    theirs.fit(features.flip(0).double().numpy(), labels.flip(0).numpy())  # in the order of ids
    shares = label_scores(features, made.weights(3.0)).softmax(dim=1)
    expected = theirs.predict_proba(features.double().numpy())
    assert shares[:, classes].numpy() == pytest.approx(expected, abs=1e-12)
    assert shares.sum(dim=1).numpy() == pytest.approx(1)
    assert not shares[:, [n for n in range(6) if n not in classes]].any()


def test_a_long_fit_gives_signs_and_ends_at_its_limit(monkeypatch):
    labels = torch.arange(3).repeat(9)
    _, made, told = regression(labels, 3)
    expected = made.weights(100.0)
    assert len(told) == 1
    fit = module.LogisticRegression.fit

    def fit_after_signs(*arguments):
        while len(told) < 4:
            time.sleep(0.001)
        return fit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_SECONDS_BETWEEN_SIGNS", 0)
        patch.setattr(module.LogisticRegression, "fit", fit_after_signs)
        assert torch.equal(made.weights(100.0), expected)
    _, made, _ = regression(labels, 3, max_iterations=2)
    assert not torch.allclose(made.weights(100.0), expected, atol=0.1)


def test_a_fit_that_fails_says_why(monkeypatch):
    def fail(self, features, labels):
        raise MemoryError("too large")

    monkeypatch.setattr(module.LogisticRegression, "fit", fail)
    with pytest.raises(MemoryError, match="too large"):
        regression(torch.arange(3).repeat(9), 3)[1].weights(1.0)


@pytest.mark.parametrize("peak", [0, 1, 37, 48, 95, 96])
def test_the_search_finds_every_peak_with_few_looks(peak):
    looks = []

    def accuracy(c):
        looks.append(c)
        return -abs(STRENGTHS.index(c) - peak)

    assert search_strength(accuracy) == STRENGTHS[peak]
    assert len(looks) == len(set(looks)) <= 15
    assert len(STRENGTHS) == 97
    assert STRENGTHS[0] == pytest.approx(1e-6)
    assert STRENGTHS[-1] == pytest.approx(1e6)


def test_of_equal_strengths_the_smallest_is_taken():
    assert search_strength(lambda c: 0.5) == STRENGTHS[0]


def test_the_neighbours_are_those_of_scikit_learn(shards, rows):
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    (features, labels), (asked, expected) = rows
    theirs = KNeighborsClassifier(
        7, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(features, labels)
    found = probe(shards, c=1.0, neighbors=7).evaluate(known_model()).metrics
    assert found["knn_acc1"] == pytest.approx(theirs.score(asked, expected))
    assert set(found) == {
        f"{kind}_{name}"
        for kind in ("lp", "knn")
        for name in ("acc1", "acc5", "mean_per_class_recall")
    }


def test_the_strength_is_searched_on_a_part_of_the_training_split(shards, rows):
    from sklearn.linear_model import LogisticRegression

    (features, labels), _ = rows
    found = probe(shards, neighbors=0).evaluate(known_model())
    own, ids = torch.tensor(labels), torch.arange(len(labels))
    places = places_in_class(own, ids, seed=0)
    held_out = (places < (torch.bincount(own) * 0.2).floor().clamp_min(1)[own]).numpy()

    def accuracy(c):
        theirs = LogisticRegression(C=c, max_iter=1000)
        theirs.fit(features[~held_out], own[~held_out])
        return theirs.score(features[held_out], own[held_out])

    best = search_strength(accuracy)
    assert found.details["c"] == best
    assert STRENGTHS[0] < best < STRENGTHS[-1]


def test_a_validation_split_chooses_where_there_is_one(shards, tmp_path, monkeypatch):
    val = write(tmp_path / "val" / "0.tar", range(300, 330))
    fitted = []
    fit = module.LogisticRegression.fit
    monkeypatch.setattr(
        module.LogisticRegression,
        "fit",
        lambda self, rows, labels: fitted.append(rows) or fit(self, rows, labels),
    )
    found = probe(shards, val_shards=val, neighbors=0).evaluate(known_model())
    assert found.details["train_pictures"] == len(TRAIN) + 30
    # One order on any number of ranks: the training split, then the other, each by its samples.
    expected = [image_map(pixels(ids)).double() for ids in (TRAIN, range(300, 330))]
    assert torch.equal(torch.from_numpy(fitted[-1]), torch.cat(expected))
    assert all(torch.equal(torch.from_numpy(each), expected[0]) for each in fitted[:-1])


def test_few_shots_are_drawn_by_the_seed_and_so_many_of_each_class(shards):
    found = [probe(shards, shots=2, seed=seed).evaluate(known_model()) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0].metrics != found[2].metrics
    classes = len({label_of(i) for i in TRAIN})
    assert found[0].details["train_pictures"] == 2 * classes


def test_places_in_a_class_are_an_order_that_the_seed_decides():
    labels, ids = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([7, 1, 3, 4, 0])
    places = places_in_class(labels, ids, seed=3)
    assert sorted(places[labels == 2].tolist()) == [0, 1, 2]
    assert sorted(places[labels == 0].tolist()) == [0, 1]
    order = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(places_in_class(labels[order], ids[order], seed=3), places[order])
    drawn = {tuple(places_in_class(labels, ids, seed=seed).tolist()) for seed in range(20)}
    assert len(drawn) > 4


def test_class_names_beside_the_shards_are_in_the_details(shards):
    train, test = shards
    found = LinearProbe(train, test, classes=list("abcdefg"), c=1.0, loading=HERE)
    details = found.evaluate(known_model()).details
    assert [row["name"] for row in details["lp"]["classes"]] == list("abcdefg")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"shots": 0}, r"shots \(0\) must be at least 1"),
        ({"c": 0.0}, r"c \(0.0\) must be above 0"),
        ({"val_share": 1.0}, r"val_share \(1.0\) must be in \(0, 1\)"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be above 0"),
        ({"temperature": float("inf")}, r"temperature \(inf\) must be above 0"),
        ({"c": float("inf")}, r"c \(inf\) must be above 0"),
        ({"neighbors": -1}, r"neighbors \(-1\) must be at least 0"),
        ({"classes": "nowhere.txt"}, r"classes \(nowhere.txt\) cannot be read"),
        ({"val_shards": "gone.tar"}, "gone.tar"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(shards, settings, match):
    with pytest.raises(UserError, match=match):
        probe(shards, **settings).check()


def test_more_shots_than_a_class_has_are_refused(shards):
    with pytest.raises(UserError, match=r"shots \(80\) .* must be at most the pictures of each"):
        probe(shards, shots=80).evaluate(known_model())


def test_pictures_of_one_class_alone_are_refused(shards, tmp_path):
    members = [(str(i), {"png": encode(picture(i)), "cls": b"3"}) for i in range(4)]
    same = str(write_shard(tmp_path / "same.tar", members))
    with pytest.raises(UserError, match="must have pictures of two classes or more to learn from"):
        LinearProbe(same, shards[1], c=1.0, loading=HERE).evaluate(known_model())


def test_a_label_outside_of_the_classes_is_refused(shards):
    with pytest.raises(UserError, match="must be a number from 0 to 1: benchmark 'linear_probe'"):
        probe(shards, classes=["a", "b"]).evaluate(known_model())
