import pytest
import torch

from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation import Retrieval
from dist_siglip.evaluation.shards import LoadSettings
from tests.support import reference_benchmarks as reference
from tests.support.benchmark_models import image_map, known_model, text_map
from tests.support.benchmark_shards import captions_of, write_captioned
from tests.support.shards import encode, picture, tokenize, write_shard

HERE = LoadSettings(local_batch_size=4, workers_per_rank=0)
NUM_SAMPLES = 13
TEXTS = [text for i in range(NUM_SAMPLES) for text in captions_of(i)]
OWNERS = [i for i in range(NUM_SAMPLES) for _ in captions_of(i)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("captioned"))


@pytest.fixture(scope="module")
def found(shards):
    return Retrieval(shards, loading=HERE).evaluate(known_model())


def pixels():
    transform = evaluation_transform(known_model().inputs)
    return torch.stack([transform(picture(i)) for i in range(NUM_SAMPLES)])


@pytest.mark.parametrize("k", [1, 5, 10])
def test_it_equals_the_loops_over_all_pictures_and_captions(found, k):
    images, texts = image_map(pixels()), text_map(tokenize(TEXTS))
    ids = range(NUM_SAMPLES)
    by_text = reference.recall(texts, images, OWNERS, ids, k)
    by_image = reference.recall(images, texts, ids, OWNERS, k)
    assert found.metrics[f"image_retrieval_recall@{k}"] == pytest.approx(by_text)
    assert found.metrics[f"text_retrieval_recall@{k}"] == pytest.approx(by_image)


def test_it_equals_clip_benchmark(found):
    oracle = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

    class Model:
        encode_image = staticmethod(image_map)
        encode_text = staticmethod(text_map)

    batch = (pixels(), [captions_of(i) for i in range(NUM_SAMPLES)])
    expected = oracle.evaluate(Model, [batch], tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.metrics.keys() - expected.keys() == {
        "image_retrieval_median_rank",
        "text_retrieval_median_rank",
    }


def test_it_equals_the_hit_rate_of_torchmetrics(found):
    from torchmetrics.functional.retrieval import retrieval_hit_rate

    # torchmetrics counts an item whose score is not above 0 as a miss: hence the 2.
    scores = text_map(tokenize(TEXTS)) @ image_map(pixels()).T + 2
    belongs = torch.tensor(OWNERS)[:, None] == torch.arange(NUM_SAMPLES)
    for name, rows, targets in (
        ("image_retrieval", scores, belongs),
        ("text_retrieval", scores.T, belongs.T),
    ):
        hits = [
            float(retrieval_hit_rate(row, target, top_k=5))
            for row, target in zip(rows, targets, strict=True)
        ]
        assert found.metrics[f"{name}_recall@5"] == pytest.approx(sum(hits) / len(hits))


def test_every_caption_is_a_query(found):
    assert found.details == {"pictures": NUM_SAMPLES, "captions": len(TEXTS), "left_out": 0}


def test_a_list_in_a_json_holds_the_same_captions(tmp_path, found):
    shards = write_captioned(tmp_path, as_json=True)
    assert Retrieval(shards, loading=HERE).evaluate(known_model()) == found


def test_only_the_members_named_are_looked_at(tmp_path):
    members = {"png": encode(picture(0)), "txt": b"a\nb", "alt": b"one caption\nof two lines"}
    shard = str(write_shard(tmp_path / "a.tar", [("0", members)]))
    rule = CaptionRule(members=("alt",))
    found = Retrieval(shard, captions=rule, loading=HERE).evaluate(known_model())
    assert found.details["captions"] == 1


def test_an_equal_caption_of_another_picture_is_no_hit(tmp_path):
    """As published: each caption belongs to its own picture; here a tie, which is lost."""
    kinds = (encode(picture(0)), encode(picture(0), compress_level=0))  # two files, equal pixels
    members = [(str(i), {"png": kinds[i], "txt": b"the same"}) for i in range(2)]
    shard = str(write_shard(tmp_path / "a.tar", members))
    found = Retrieval(shard, top_k=[1, 2], loading=HERE).evaluate(known_model()).metrics
    assert found["image_retrieval_recall@1"] == found["text_retrieval_recall@1"] == 0
    assert found["image_retrieval_recall@2"] == found["text_retrieval_recall@2"] == 1
    assert found["image_retrieval_median_rank"] == 2


def test_a_sample_for_each_caption_is_the_same_as_a_sample_for_each_picture(tmp_path, found):
    """Pictures of equal bytes are one, and a caption that another sample repeats is one."""
    members = [
        (f"{i}x{n}x{copy}", {"png": encode(picture(i)), "txt": text.encode()})
        for copy in range(2)
        for i in range(NUM_SAMPLES)
        for n, text in enumerate(captions_of(i))
    ]
    shard = str(write_shard(tmp_path / "a.tar", members))
    again = Retrieval(shard, loading=HERE).evaluate(known_model())
    assert again.metrics == pytest.approx(found.metrics)
    assert again.details == found.details


def test_a_field_of_the_json_may_say_which_pictures_are_the_same(tmp_path):
    members = [
        (
            f"{i}",
            {
                "png": encode(picture(i // 2), compress_level=9 * (i % 2)),
                "txt": b"text %d" % i,
                "json": b'{"image_id": %d}' % (i // 2),
            },
        )
        for i in range(8)
    ]
    shard = str(write_shard(tmp_path / "a.tar", members))
    rule = CaptionRule(members=("txt",))
    for field, pictures in ((None, 8), ("image_id", 4), ("other", 8)):
        loading = LoadSettings(workers_per_rank=0, picture_field=field)
        found = Retrieval(shard, captions=rule, loading=loading).evaluate(known_model())
        assert (found.details["pictures"], found.details["captions"]) == (pictures, 8)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_k": []}, r"top_k \(\[\]\)"),
        ({"top_k": [0, 5]}, r"top_k \(\[0, 5\]\)"),
        ({"name": "a/b"}, r"name \('a/b'\)"),
        ({"captions": CaptionRule(members=())}, r"captions.members \(\[\]\)"),
        ({"loading": LoadSettings(max_bad_fraction=2)}, r"loading.max_bad_fraction \(2\)"),
        ({"shards": "nowhere.tar"}, "nowhere.tar"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(shards, settings, match):
    with pytest.raises(UserError, match=match):
        Retrieval(**{"shards": shards, **settings}).check()
