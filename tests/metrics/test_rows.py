"""Choosing and sorting pairs by sample id."""

import torch

from dist_siglip.metrics.rows import first_occurrences, gather_in_order


def test_repeated_samples_are_kept_once_where_they_come_first():
    ids = torch.tensor([5, 3, 5, 9, 3, 5])
    assert first_occurrences(ids).tolist() == [True, True, False, True, False, False]


def test_no_rows_give_no_marks():
    assert first_occurrences(torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_rows_come_sorted_and_only_the_chosen_ones():
    ids = torch.tensor([8, 2, 5, 1])
    values, names = gather_in_order([ids * 10.0, ids], ids, chosen=torch.tensor([1, 8, 2]))
    assert values.tolist() == [10.0, 20.0, 80.0]
    assert names.tolist() == [1, 2, 8]
