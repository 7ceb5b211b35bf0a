import torch

from dist_siglip.data.batch import PairCollator, PairSample
from dist_siglip.data.captions import caption_id
from tests.support.shards import tokenize


def test_rows_keep_their_order_and_types():
    samples = [
        PairSample(torch.full((3, 4, 5), float(i)), text, 10 + i, i != 2, i == 1)
        for i, text in enumerate(["a fox", "a hen", "a fox"])
    ]
    batch = PairCollator(tokenize)(samples)
    assert batch.images.shape == (3, 3, 4, 5)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert torch.equal(batch.texts, tokenize(["a fox", "a hen", "a fox"]))
    assert batch.caption_ids.tolist() == [caption_id(text) for text in ("a fox", "a hen", "a fox")]
    assert batch.sample_ids.tolist() == [10, 11, 12]
    assert batch.valid.tolist() == [True, True, False]
    assert batch.substituted.tolist() == [False, True, False]
    types = [field.dtype for field in batch if field is not None]
    assert batch.image_features is batch.text_features is None
    assert types == [torch.float32, *[torch.int64] * 3, *[torch.bool] * 2]


def test_token_ids_are_int64_whatever_the_tokenizer_gives():
    sample = PairSample(torch.zeros(3, 2, 2), "a fox", 0, is_valid=True, is_substitute=False)
    batch = PairCollator(lambda texts: tokenize(texts).int())([sample])
    assert batch.texts.dtype == torch.int64
