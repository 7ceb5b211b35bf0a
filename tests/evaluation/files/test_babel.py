import json

import pytest
import torch

from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation import BabelImageNet
from dist_siglip.evaluation.shards import LoadSettings
from tests.support import reference_benchmarks as reference
from tests.support.benchmark_models import image_map, known_model, text_map
from tests.support.shards import encode, picture, tokenize, write_shard

HERE = LoadSettings(local_batch_size=8, workers_per_rank=0)
COUNT, NUM_CLASSES = 40, 8
NAMES = {
    "DE": [[1, 0, 5, 6, 7], ["eins", "null", "fuenf", "sechs", "sieben"]],
    "FR": [[0, 1, 2, 3, 4, 7], ["zero", "un", "deux", "trois", "quatre", "sept"]],
}
TEMPLATES = {"DE": ["ein Bild von {}", "{}!"], "FR": ["une photo de {}"], "XX": ["{}"]}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("babel")
    members = [
        (f"{i:03d}", {"png": encode(picture(i)), "cls": str(i % NUM_CLASSES).encode()})
        for i in range(COUNT)
    ]
    (folder / "names.json").write_text(json.dumps(NAMES))
    (folder / "prompts.json").write_text(json.dumps(TEMPLATES))
    shards = str(write_shard(folder / "0.tar", members))
    return shards, str(folder / "names.json"), str(folder / "prompts.json")


def expected_of(language, templates):
    numbers, names = NAMES[language]
    vectors = [
        reference.class_vector(text_map(tokenize([t.replace("{}", name) for t in templates])))
        for name in names
    ]
    kept = [i for i in range(COUNT) if i % NUM_CLASSES in numbers]
    transform = evaluation_transform(known_model().inputs)
    images = image_map(torch.stack([transform(picture(i)) for i in kept]))
    labels = [numbers.index(i % NUM_CLASSES) for i in kept]
    return reference.accuracies(images, vectors, labels)


def test_every_language_equals_the_loops_over_its_own_classes(given):
    found = BabelImageNet(*given, loading=HERE).evaluate(known_model())
    assert list(found.parts) == ["de", "fr"]
    for language, metrics in found.parts.items():
        expected = expected_of(language.upper(), TEMPLATES[language.upper()])
        assert metrics == pytest.approx(expected, abs=1e-12)
        assert 0 < expected["acc1"] < 1
    for name, mean in found.metrics.items():
        assert mean == pytest.approx(sum(m[name] for m in found.parts.values()) / 2)
    assert found.details["languages"]["de"] == {"pictures": 25, "classes": 5}


def test_one_template_may_serve_all_languages(given):
    shards, names, _ = given
    found = BabelImageNet(shards, names, "{}", languages=["fr"], loading=HERE)
    assert found.evaluate(known_model()).metrics == pytest.approx(expected_of("FR", ["{}"]))


def test_the_file_of_clip_benchmark_can_be_read(given):
    theirs = pytest.importorskip("clip_benchmark")
    from pathlib import Path

    folder = Path(theirs.__file__).parent / "datasets"
    names, prompts = folder / "babel_imagenet.json", folder / "nllb_dist13b_prompts.json"
    benchmark = BabelImageNet(given[0], str(names), str(prompts), loading=HERE)
    benchmark.check()
    assert len(benchmark._read_languages()) > 80


@pytest.mark.parametrize(
    ("names", "settings", "match"),
    [
        ({"DE": [[0, 1], ["a", "b"]]}, {}, "5 or more"),
        ({"DE": [[0, 0, 1, 2, 3], list("abcde")]}, {}, "different numbers"),
        ({"DE": 3}, {}, "must hold for language DE"),
        ([], {}, "must be an object by language"),
        ({"DE": [[0, 1, 2, 3, 10**30], list("abcde")]}, {}, "different numbers"),
        ({"DE": [[0, 1, 2, 3, True], list("abcde")]}, {}, "different numbers"),
        ({"../DE": NAMES["DE"]}, {"shared": True}, r"language \('../DE'\) .* letters"),
        (NAMES, {"languages": ["de", "es"]}, r"languages \(\['ES'\]\) .*: DE, FR"),
    ],
)
def test_names_that_cannot_be_used_are_told_in_one_line(given, tmp_path, names, settings, match):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(names))
    templates = "{}" if settings.pop("shared", False) else given[2]
    with pytest.raises(UserError, match=match) as caught:
        BabelImageNet(given[0], str(path), templates, **settings, loading=HERE).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("templates", [3, None, "ein Bild von {}", [3], {"{}": 1}])
def test_templates_that_are_no_list_of_texts_are_told_in_one_line(given, tmp_path, templates):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"DE": templates}))
    with pytest.raises(UserError, match=r"templates \(.*DE.* list of texts") as caught:
        BabelImageNet(given[0], given[1], str(path), loading=HERE).check()
    assert "\n" not in str(caught.value)


def test_a_language_none_of_whose_classes_is_there_is_told(given, tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"DE": [[90, 91, 92, 93, 94], list("abcde")]}))
    with pytest.raises(UserError, match=r"no picture of a class that has a name in language \(de"):
        BabelImageNet(given[0], str(path), given[2], loading=HERE).evaluate(known_model())
