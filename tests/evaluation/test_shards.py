import pytest
import torch

from dist_siglip.data.order.position import EvaluationBatchSampler
from dist_siglip.data.samples.captions import CaptionRule
from dist_siglip.errors import UserError
from dist_siglip.evaluation import shards as module
from dist_siglip.evaluation.shards import BenchmarkShards, LoadSettings
from tests.support.benchmark_models import known_model
from tests.support.benchmark_shards import captions_of, write_captioned
from tests.support.shards import encode, picture, write_shard

NUM_SAMPLES = 13
LINES = CaptionRule(split_lines=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("shards"))


def read(paths, *, encoded_texts=None, **settings):
    loading = LoadSettings(**{"local_batch_size": 4, "workers_per_rank": 0, **settings})
    shards = BenchmarkShards(paths, LINES, loading, name="mine")
    return shards.encode(known_model(), encoded_texts=encoded_texts)


def same(first, second):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def test_every_sample_and_text_is_there_once_and_in_order(paths):
    found = read(paths)
    assert found.sample_ids.tolist() == list(range(NUM_SAMPLES))
    assert found.texts == [captions_of(i) for i in range(NUM_SAMPLES)]
    assert found.text_sample_ids.tolist() == [i for i in range(NUM_SAMPLES) for _ in captions_of(i)]
    assert len(found.text_features) == len(found.text_sample_ids)


def test_only_the_texts_wanted_are_encoded(paths):
    one = read(paths, encoded_texts=1)
    assert one.texts == [captions_of(i)[:1] for i in range(NUM_SAMPLES)]
    assert torch.equal(one.text_sample_ids, one.sample_ids)
    none = read(paths, encoded_texts=0)
    assert none.texts == [captions_of(i) for i in range(NUM_SAMPLES)]
    assert len(none.text_features) == len(none.text_sample_ids) == 0


def test_batches_and_loader_processes_change_nothing(paths):
    assert same(read(paths), read(paths, local_batch_size=100))
    assert same(read(paths), read(paths, workers_per_rank=1))


def test_reading_draws_nothing_from_the_generator_of_the_training(paths):
    before = torch.get_rng_state()
    read(paths)
    assert torch.equal(torch.get_rng_state(), before)


class CountedPadding(EvaluationBatchSampler):
    """Broken on purpose: the last of three ranks, where what fills up its batch is a sample."""

    def __init__(self, num_samples, *, local_batch_size, **_):
        super().__init__(num_samples, rank=2, world_size=3, local_batch_size=local_batch_size)

    def __iter__(self):
        for batch in super().__iter__():
            yield [slot._replace(is_padding=False) for slot in batch]


def test_padding_that_counts_is_noticed(paths, monkeypatch):
    """13 samples are 5 + 5 + 3; the test of parity would see the two more."""
    monkeypatch.setattr(module, "EvaluationBatchSampler", CountedPadding)
    assert read(paths).sample_ids.tolist() == [10, 11, 12, 12, 12]


def test_a_batch_without_any_usable_sample_still_calls_both_encoders(tmp_path):
    members = [(f"{i}", {"png": b"no picture", "txt": b"a"}) for i in range(4)]
    members.append(("sound", {"png": encode(picture(0)), "txt": b"b"}))
    path = str(write_shard(tmp_path / "a.tar", members))
    loading = LoadSettings(local_batch_size=4, workers_per_rank=0, max_bad_fraction=0.8)
    calls = []
    shards = BenchmarkShards(path, LINES, loading, name="mine")
    found = shards.encode(known_model(calls), encoded_texts=None)
    assert [name for name, _ in calls] == ["image", "text", "image", "text"]
    assert (found.sample_ids.tolist(), found.texts, found.num_bad) == ([4], [["b"]], 4)


def test_too_many_bad_samples_are_refused(tmp_path):
    members = [("a", {"png": b"no picture", "txt": b"a"})]
    path = str(write_shard(tmp_path / "a.tar", members))
    with pytest.raises(UserError, match=r"max_bad_fraction \(0.01\) of benchmark 'mine'"):
        read(path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"local_batch_size": 0}, r"loading.local_batch_size \(0\)"),
        ({"workers_per_rank": -1}, r"loading.workers_per_rank \(-1\)"),
        ({"max_bad_fraction": -0.1}, r"loading.max_bad_fraction \(-0.1\)"),
    ],
)
def test_wrong_settings_are_refused(paths, settings, match):
    with pytest.raises(UserError, match=match):
        BenchmarkShards(paths, LINES, LoadSettings(**settings), name="mine").check()
