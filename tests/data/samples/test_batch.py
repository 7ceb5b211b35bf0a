import pytest
import torch
from open_clip import SimpleTokenizer

from dist_siglip.data.samples.batch import BatchPieces, PairCollator, PairSample
from dist_siglip.metrics import retrieval_ranks_both_ways
from dist_siglip.models.text_tower import ModelTokenizer
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
    fox, hen, again = batch.caption_ids.tolist()
    assert fox == again != hen
    assert batch.picture_ids.tolist() == [10, 11, 12]  # not known: each its own
    assert batch.sample_ids.tolist() == [10, 11, 12]
    assert batch.valid.tolist() == [True, True, False]
    assert batch.substituted.tolist() == [False, True, False]
    types = [field.dtype for field in batch[:6]]
    assert batch.image_features is batch.text_features is None
    assert types == [torch.float32, *[torch.int64] * 3, *[torch.bool] * 2]


def test_token_ids_are_int64_whatever_the_tokenizer_gives():
    sample = PairSample(torch.zeros(3, 2, 2), "a fox", 0, is_valid=True, is_substitute=False)
    batch = PairCollator(lambda texts: tokenize(texts).int())([sample])
    assert batch.texts.dtype == torch.int64


def _batch(captions, tokenizer, **fields):
    samples = [
        PairSample(torch.zeros(3, 2, 2), text, i, is_valid=True, is_substitute=False, **fields)
        for i, text in enumerate(captions)
    ]
    return PairCollator(tokenizer)(samples)


SEVEN = [
    *("A red fox.", "a red fox", "a hen", "A HEN", "a boat"),
    *("two boats &amp; a car", "two boats & a car"),
]


@pytest.mark.parametrize(
    ("clean", "groups"), [("lower", [0, 1, 2, 2, 3, 4, 4]), ("canonicalize", [0, 0, 2, 2, 3, 4, 4])]
)
def test_captions_of_equal_tokens_are_one_and_a_perfect_model_finds_them(clean, groups):
    tokenizer = SimpleTokenizer(context_length=16, clean=clean)
    ids = _batch(SEVEN, tokenizer).caption_ids
    same = torch.tensor(groups)
    assert torch.equal(ids[:, None] == ids, same[:, None] == same)
    features = torch.nn.functional.one_hot(same, 5).float()
    for ranks in retrieval_ranks_both_ways(features, features, ids, ids):
        assert ranks.tolist() == [1] * 7


def test_captions_that_are_cut_off_alike_are_one():
    long = "a fox and " * 20
    batch = _batch([long + "a hen", long + "a boat", "a hen"], SimpleTokenizer(context_length=16))
    assert batch.caption_ids[0] == batch.caption_ids[1] != batch.caption_ids[2]


def test_a_tokenizer_that_draws_tokens_keeps_equal_captions_equal():
    config = {"context_length": 8, "tokenizer_kwargs": {"reduction_mask": "random"}}
    tokenizer = ModelTokenizer(name="tiny", text_config=config, context_length=8)
    batch = _batch(["a fox and a hen in a wide field"] * 8 + ["a Fox"], tokenizer)
    assert len(batch.texts[:8].unique(dim=0)) > 1
    assert len(batch.caption_ids.unique()) == 2


def test_stored_ids_stand_in_for_tokens_and_bytes():
    fields = {"text_features": torch.zeros(4), "picture_id": 7, "caption_id": 5}
    batch = _batch(["a fox", "a hen"], None, **fields)
    assert batch.caption_ids.tolist() == [5, 5]
    assert batch.picture_ids.tolist() == [7, 7]


def test_rows_and_tokens_of_teachers_come_along_side_by_side():
    rows = {name: torch.arange(5.0) for name in ("teacher_image_features", "teacher_text_features")}
    sample = PairSample(
        torch.zeros(3, 2, 2), "a fox", 0, is_valid=True, is_substitute=False, **rows
    )
    short = SimpleTokenizer(context_length=6)
    batch = PairCollator(tokenize, [short, tokenize])([sample, sample])
    assert batch.teacher_image_features.shape == batch.teacher_text_features.shape == (2, 5)
    expected = torch.cat([short(["a fox"] * 2), tokenize(["a fox"] * 2)], dim=1)
    assert torch.equal(batch.teacher_texts, expected)
    joined = BatchPieces((batch, batch)).join(torch.device("cpu"))
    assert torch.equal(joined.teacher_texts, torch.cat([expected, expected]))
    assert PairCollator(tokenize)([sample._replace(teacher_image_features=None)])[10] is None


def test_further_captions_get_rows_and_ids_beside_the_first():
    texts = [("a fox", "a hen"), ("a hen", "a boat"), ("a fox", "a Hen")]
    samples = [
        PairSample(torch.zeros(3, 2, 2), first, i, True, False, more_captions=(first, other))
        for i, (first, other) in enumerate(texts)
    ]
    collate = PairCollator(SimpleTokenizer(context_length=8))
    whole, alone = collate(samples), collate([s._replace(more_captions=()) for s in samples])
    assert alone.more_texts is alone.more_caption_ids is None
    assert torch.equal(whole.texts, alone.texts)
    assert torch.equal(whole.caption_ids, alone.caption_ids)
    assert torch.equal(whole.more_texts[:, 0], alone.texts)
    assert torch.equal(whole.more_caption_ids[:, 0], alone.caption_ids)
    hen, boat, again = whole.more_caption_ids[:, 1].tolist()
    assert hen == again == whole.caption_ids[1] != boat
    columns = [alone.texts, alone.texts, whole.more_texts[:, 1]]
    assert torch.equal(whole.all_texts(), torch.cat(columns))
    pieces = BatchPieces((collate(samples[:1]), collate(samples[1:])))
    joined = pieces.join(torch.device("cpu"))
    assert torch.equal(joined.all_texts(), whole.all_texts())
