import pytest
import torch

from dist_siglip.data.samples.transforms import evaluation_transform
from dist_siglip.errors import UserError
from dist_siglip.evaluation.encoding import encode_pictures, encode_texts
from tests.support.benchmark_models import image_map, known_model, text_map
from tests.support.processes import run_ranks
from tests.support.shards import picture, tokenize

TEXTS = [f"text {number}" for number in range(5)]
PICTURES = [picture(number) for number in range(4)]


def _encode(rank, world_size):
    calls = []
    model = known_model(calls)
    texts = encode_texts(model, TEXTS, batch_rows=2)
    pictures = encode_pictures(model, PICTURES, batch_rows=2)
    one = encode_texts(model, TEXTS[:1])
    return texts, pictures, one, calls


@pytest.fixture(scope="module")
def on_three_ranks():
    return run_ranks(_encode, 3)


def test_features_are_those_of_the_encoders_in_the_order_given():
    texts, pictures, one, _ = _encode(0, 1)
    transform = evaluation_transform(known_model().inputs)
    assert torch.equal(texts, text_map(tokenize(TEXTS)))
    assert torch.equal(pictures, image_map(torch.stack([transform(p) for p in PICTURES])))
    assert torch.equal(one, texts[:1])


def test_features_do_not_depend_on_the_number_of_ranks(on_three_ranks):
    alone = _encode(0, 1)
    for rank in on_three_ranks:
        for mine, expected in zip(rank[:3], alone[:3], strict=True):
            assert torch.allclose(mine, expected, atol=1e-6)
            assert mine.shape == expected.shape


def test_every_rank_calls_the_encoders_equally_often(on_three_ranks):
    calls = [rank[3] for rank in on_three_ranks]
    assert calls[0] == calls[1] == calls[2]
    assert sum(rows for name, rows in calls[0] if name == "text") == 2 + 1


def test_nothing_to_encode_is_refused_in_one_line():
    with pytest.raises(UserError, match="there is no text to encode"):
        encode_texts(known_model(), [])
