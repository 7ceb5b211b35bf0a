"""Changing the last digit: a model that is exact, one that is not, and the queries by hand."""

import pytest

from dist_siglip.data.handwriting import number_from_words, number_in_words
from dist_siglip.errors import UserError
from dist_siglip.evaluation import HandwritingArithmetic
from dist_siglip.evaluation.shards import LoadSettings
from tests.support.arithmetic import number_model, read_text, write_numbers
from tests.support.processes import run_ranks

HERE = LoadSettings(local_batch_size=5, workers_per_rank=0)
# Askable among each other: 4721, 4727, 4725 and 3342, 3349. Not: a ten, a teen, a lone number.
NUMBERS = [4721, 3342, 4727, 4720, 4712, 4713, 3349, 4725, 9999]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_numbers(tmp_path_factory.mktemp("numbers"), NUMBERS)


def evaluate(shards, model, **settings):
    return HandwritingArithmetic(shards, loading=HERE, **settings).evaluate(model)


def test_a_model_of_independent_digits_answers_every_query(shards):
    result = evaluate(shards, number_model())
    assert result.metrics["caption_arithmetic@1"] == 1
    assert result.metrics["word_arithmetic@1"] == 1
    assert result.metrics["wanted_caption@1"] == 1
    assert result.details == {"pictures": 9, "queries": 8, "left_out": 0, "strength": 1.0}


def test_nothing_added_leads_to_the_first_of_the_nearest_others(shards):
    # From 4721, 4727 and 4725 equally near is 4720 and each other; the lowest position counts:
    # 4721 -> 4727, the others -> 4721: one of two queries of each is right by it. 3342 and 3349
    # have only each other.
    found = evaluate(shards, number_model()).metrics["unchanged@1"]
    assert found == pytest.approx((1 + 1 + 1 + 1 + 1) / 8)


def shifted(tokens):
    digits = read_text(tokens)
    return [*digits[:-1], digits[-1] % 9 + 1]


def test_a_text_tower_that_confuses_last_digits_is_found_out(shards):
    metrics = evaluate(shards, number_model(shifted)).metrics
    assert metrics["caption_arithmetic@1"] < 0.7
    assert metrics["wanted_caption@1"] < 0.7


def test_a_text_tower_that_does_not_see_last_digits_adds_nothing(shards):
    blind = number_model(lambda tokens: [*read_text(tokens)[:-1], 1])
    metrics = evaluate(shards, blind).metrics
    assert metrics["caption_arithmetic@1"] == metrics["unchanged@1"] < 1


def test_the_rest_of_the_number_must_stay(tmp_path):
    """A difference that drags the first digit along leads from 4721 to 3727."""

    def drags(tokens):
        digits = read_text(tokens)
        return [10 - digits[-1], *digits[1:]] if len(digits) > 1 else digits

    shards = write_numbers(tmp_path, [4721, 4727, 3727])
    metrics = evaluate(shards, number_model(drags), strength=3.0).metrics
    assert metrics["caption_arithmetic@1"] == 0.5
    assert metrics["word_arithmetic@1"] == 1


def test_several_pictures_of_a_number_are_all_right(tmp_path):
    shards = write_numbers(tmp_path, [4721, 4727, 4727, 4721])
    result = evaluate(shards, number_model())
    assert result.details["queries"] == 4
    assert result.metrics["word_arithmetic@1"] == 1


def _evaluate(rank, world_size, shards):
    return evaluate(shards, number_model(shifted))


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_do_not_depend_on_the_number_of_ranks(shards, world_size):
    alone = _evaluate(0, 1, shards)
    assert run_ranks(_evaluate, world_size, shards) == [alone] * world_size
    assert 0 < alone.metrics["caption_arithmetic@1"] < 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([4721, 9999], "no two numbers that differ in the last digit alone"),
        ([4721, 472], "all of equally many"),
        ([3, 4], "numbers of two digits or more"),
    ],
)
def test_a_gallery_that_answers_nothing_is_refused(tmp_path, numbers, message):
    with pytest.raises(UserError, match=message):
        evaluate(write_numbers(tmp_path, numbers), number_model())


def test_settings_out_of_range_are_refused(shards):
    with pytest.raises(UserError, match=r"strength \(-1.0\) of benchmark"):
        HandwritingArithmetic(shards, strength=-1.0).check()
    HandwritingArithmetic(shards).check()


@pytest.mark.parametrize("num_digits", [1, 3, 5, 6])
def test_numbers_in_words_are_read_back(num_digits):
    lowest = 10 ** (num_digits - 1)
    for value in range(lowest, 10 * lowest, max(1, lowest // 37)):
        assert number_from_words(number_in_words(value, num_digits)) == value


@pytest.mark.parametrize(
    "text", ["", "a cat", "two thousand two thousand", "seven two", "zero", "thousand"]
)
def test_anything_else_is_no_number(text):
    assert number_from_words(text) is None
