import torch

from dist_siglip.data.index.pairs import build_pair_table, check_ranks_agree
from tests.support.shards import write_shards


def test_equal_shards_agree(two_ranks):
    assert [result["equal"] for result in two_ranks] == ["fine", "fine"]


def test_rank_with_other_shards_is_named_on_every_rank(two_ranks):
    text = "train_shards differ between ranks: rank 0 sees 7 samples, rank 1 sees 8"
    assert [result["unequal"].startswith(text) for result in two_ranks] == [True, True]


def test_one_process_has_nothing_to_compare(tmp_path):
    table = build_pair_table(write_shards(tmp_path), image_extensions=("png",))
    check_ranks_agree(table, name="train_shards", device=torch.device("cpu"))
