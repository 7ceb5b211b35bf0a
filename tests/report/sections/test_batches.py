"""What is said of chosen pairs, and of the shapes of pictures."""

import numpy as np
import pytest

from dist_siglip.report import _SECTIONS
from dist_siglip.report.sections import batches
from tests.support.report_records import record

NAMES = ("train/curation_learnability", "train/curation_learnability_all", "train/curation_share")


def chosen(gaps, everyone=1.0):
    """A run whose chosen pairs are ``gaps`` above all pairs, step by step."""
    values = [[everyone + gap for gap in gaps], [everyone] * len(gaps), [0.25] * len(gaps)]
    return record(series=dict(zip(NAMES, values, strict=True)))


def test_a_choice_that_teaches_more_is_told_from_chance():
    noise = np.random.default_rng(0).normal(0, 0.2, 40)
    good = batches.judge_curation(chosen(0.5 + noise))
    assert good.tone == "good"
    assert good.text.startswith("The chosen 25 % of the pairs teach 0.")
    assert f"and was {0.5 + noise[0]:.3g} in the first" in good.reason
    late = noise[-10:]
    chance = batches.judge_curation(chosen([*noise[:-10], *(late - late.mean())]))
    assert chance.tone == "watch"
    assert "are a draw by chance" in chance.text
    assert "above that of all pairs read (standard error" in chance.reason
    worse = batches.judge_curation(chosen([-0.5] * 8))
    assert worse.tone == "watch"
    # The same small difference in every step is none of chance.
    assert batches.judge_curation(chosen([0.01] * 8)).tone == "good"
    assert batches.judge_curation(chosen([0.5] * 3)).tone == "unknown"


def test_a_reference_that_knows_no_more_than_the_model_is_told():
    assert batches.judge_reference(chosen([0.5] * 8)) is None
    found = batches.judge_reference(chosen([0.5] * 8, everyone=-0.3))
    assert (found.tone, found.text) == (
        "watch",
        "The reference is no better than the model it chooses for.",
    )
    assert "loses 0.3 nats less than the reference" in found.reason


def test_the_section_of_curation_draws_and_lists_both():
    html = batches.make_curation([chosen([0.5] * 8)]).render()
    for text in ("learnability", "chosen", "read", "0.250", "1.500", "1.000"):
        assert text in html
    both = batches.make_curation([chosen([0.5] * 8), record("other")]).render()
    assert "n/a" in both
    assert batches.make_curation([record()]) is None
    assert batches.judge_curation(record()) is batches.judge_reference(record()) is None


def shaped(lengths, padding, **settings):
    series = {"train/patches": lengths, "train/padding": padding}
    return record(series=series, settings=settings)


@pytest.mark.parametrize(("padding", "tone"), [(0.05, "good"), (0.3, "watch")])
def test_padding_is_told_and_much_of_it_is_watched(padding, tone):
    run = shaped([64, 128, 64, 64], [padding] * 4)
    found = batches.judge_padding(run)
    assert found.tone == tone
    assert found.text.startswith(f"{100 * padding:.1f} % of the patches")
    html = batches.make_patches([run]).render()
    for text in ("64 patches", "75 %", "128 patches", "25 %", "share of padding"):
        assert text in html
    assert "0 %" in batches.make_patches([run, shaped([64], [0.0])]).render()
    assert batches.make_patches([record()]) is None
    assert batches.judge_padding(record()) is None


def test_a_length_that_was_never_drawn_is_named_once_that_is_no_chance():
    listed = {"data.sequence_lengths": [64, 128, 256]}
    few = shaped([64, 128] * 7, [0.1] * 14, **listed)
    assert batches.judge_lengths(few) is None
    many = shaped([64, 128] * 8, [0.1] * 16, **listed)
    assert batches.judge_lengths(many).text == "Lengths that no logged step had: 256."
    rare = shaped([64, 128] * 8, [0.1] * 16, **listed, **{"data.length_weights": [4, 4, 0.5]})
    never = shaped([64, 128] * 8, [0.1] * 16, **listed, **{"data.length_weights": [1, 1, 0]})
    unknown = shaped([64, 128] * 8, [0.1] * 16)
    assert all(batches.judge_lengths(each) is None for each in (rare, never, unknown, record()))


def test_the_page_has_both_sections():
    run = chosen([0.5] * 8)
    run.series.update(shaped([64] * 4, [0.1] * 4).series)
    made = [make([run]) for make in (_SECTIONS["curation"], _SECTIONS["patches"])]
    assert [section.key for section in made] == ["curation", "patches"]
    assert [len(section.verdicts) for section in made] == [1, 1]
