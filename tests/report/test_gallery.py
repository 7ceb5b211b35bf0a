"""The first five captions of an image."""

import numpy as np

from dist_siglip.report.records import Picture
from dist_siglip.report.sections.retrieval import rank_captions, render_gallery


def _rank(captions, similarities, row=0, top=5):
    """One picture whose cosines with the captions are given."""
    texts = np.eye(len(captions))
    images = np.zeros((len(captions), len(captions)))
    images[row] = similarities
    (exhibit,) = rank_captions([Picture(row, "")], captions, images, texts, top=top)
    return exhibit


def test_captions_come_best_first_and_at_most_five():
    exhibit = _rank(list("abcdefg"), [0.1, 0.7, 0.3, 0.6, 0.2, 0.5, 0.4])
    assert [answer.caption for answer in exhibit.answers] == ["b", "d", "f", "g", "c"]
    assert exhibit.answers[0].similarity == 0.7
    assert not any(answer.is_right for answer in exhibit.answers)


def test_equal_caption_of_another_pair_is_right():
    exhibit = _rank(["six", "two", "six"], [0.1, 0.5, 0.9])
    assert [(a.caption, a.is_right) for a in exhibit.answers] == [("six", True), ("two", False)]
    assert exhibit.answers[0].similarity == 0.9


def test_small_gallery_gives_fewer_answers():
    assert len(_rank(["a", "b"], [0.2, 0.1]).answers) == 2


def test_ties_keep_the_order_of_the_gallery():
    assert [a.caption for a in _rank(list("abc"), [0.5, 0.5, 0.5], top=2).answers] == ["a", "b"]


def test_another_caption_of_the_same_picture_is_right():
    texts, images = np.eye(3), np.zeros((3, 3))
    images[0] = [0.1, 0.9, 0.5]
    arguments = ([Picture(0, "")], ["one", "two", "three"], images, texts)
    (exhibit,) = rank_captions(*arguments, ids=[np.array([1, 2, 3]), np.array([7, 7, 8])])
    assert [(a.caption, a.is_right) for a in exhibit.answers] == [
        ("two", True),
        ("three", False),
        ("one", True),
    ]


def test_below_a_right_answer_stand_other_candidates_and_no_wrong_ones():
    right = render_gallery("", [_rank(list("abc"), [0.9, 0.5, 0.1])], "")
    assert right.count("wrong") == 0
    assert right.index("right</b> a") < right.index("other candidates") < right.index("<li>b")
    assert '<ol start="2">' in right


def test_answers_above_the_right_one_are_wrong():
    wrong = render_gallery("", [_rank(list("abc"), [0.5, 0.9, 0.1])], "")
    assert wrong.index("wrong</b> b") < wrong.index("right</b> a") < wrong.index("<li>c")
    nowhere = render_gallery("", [_rank(list("abc"), [0.1, 0.9, 0.5], top=2)], "")
    assert nowhere.count("wrong</b>") == 2
    assert "other candidates" not in nowhere
