"""Terms, weights and the conclusion about a decoder."""

from dist_siglip.report.records import Picture
from dist_siglip.report.sections import objectives, training
from dist_siglip.report.sections.retrieval import Answer, Exhibit, render_gallery
from tests.support.report_records import record

LOGGED = {
    "train/caption_loss": [10.0, 4.0],
    "train/captioning_weight": [0.0, 0.5],
    "val/caption_loss": [10.0, 5.0],
}


def run_of(gain):
    metrics = {
        "caption_loss": 5.0,
        "caption_token_accuracy": 0.25,
        "caption_picture_gain": gain,
    }
    return record(series=LOGGED, metrics=metrics)


def test_a_run_without_objectives_has_no_section():
    run = record()
    assert objectives.make([run]) is None
    assert objectives.judge(run) is None


def test_a_decoder_that_does_not_look_is_told_from_one_that_does():
    blind, seeing = objectives.judge(run_of(0.01)), objectives.judge(run_of(1.5))
    assert blind.tone == "watch"
    assert "without looking" in blind.text
    assert seeing.tone == "good"
    assert "worth 1.5 nats" in seeing.text
    assert "25 % of them right" in seeing.reason
    assert objectives.judge(record(series=LOGGED)).tone == "unknown"
    assert "boxes" not in seeing.reason
    run = run_of(1.5)
    run.metrics.update(box_exact=0.25, box_iou_50=0.75)
    told = "Of the boxes it writes for texts 75 % overlap theirs by half, 25 % are exact."
    assert told in objectives.judge(run).reason
    assert "boxes that are exact" in objectives.make([run]).render()


def test_a_decoder_whose_loss_stays_at_the_logarithm_of_the_words_is_told():
    weights = {"train/captioning_weight": [1.0] * 8}
    metrics = run_of(1.5).metrics
    stuck = {**weights, "train/caption_loss": [10.8, 10.81, 10.79, 10.8, 10.8, 10.7, 10.8, 10.8]}
    found = objectives.judge(record(series=stuck, metrics=metrics))
    assert found.tone == "watch"
    assert "does not learn: the caption loss is 10.8 nats per token, and was 10.8" in found.text
    falling = {**weights, "train/caption_loss": [10.8, 10.7, 9.9, 8.0, 7.0, 6.5, 6.0, 5.0]}
    assert objectives.judge(record(series=falling, metrics=metrics)).tone == "good"


def teacher_of(entropy, mean_entropy):
    name = "masked_prediction"
    gauges = {"loss": 5.0, "entropy": entropy, "mean_entropy": mean_entropy, "kl": 1.0}
    gauges |= {"centre_norm": 0.5, "weight": 0.25}
    series = {f"train/{name}_{gauge}": [value] * 4 for gauge, value in gauges.items()}
    return record(series=series)


def test_both_collapses_of_a_teacher_are_told_from_one_that_says_something():
    for entropy, mean, tone, words in (
        (1.0, 1.0, "bad", "collapsed: it finds all prototypes alike"),
        (0.01, 0.02, "bad", "collapsed: it finds all pictures alike"),
        (0.6, 0.61, "watch", "hardly tells pictures apart"),
        (0.5, 0.95, "good", "tells pictures apart"),
    ):
        run = teacher_of(entropy, mean)
        found = objectives.judge_teacher(run, "masked_prediction")
        assert (found.tone, words in found.text) == (tone, True)
        assert found.text.startswith("The teacher of masked prediction")
        html = objectives.make([run]).render()
        assert words in html
        assert "masked prediction mean entropy" in html
    assert objectives.judge_teacher(run, "self_distillation") is None
    assert objectives.judge(run) is None  # there is no decoder


def test_an_objective_that_has_not_begun_is_told():
    series = {"train/captioning_weight": [0.0, 0.0], "train/pair_loss": [3.0, 2.0]}
    found = objectives.judge(record(series=series, metrics=run_of(0.0).metrics))
    assert found.tone == "watch"
    assert found.text == "Not begun by step 10: captioning."


def test_the_section_draws_terms_and_weights_and_lists_the_measures():
    html = objectives.make([run_of(1.5)]).render()
    for text in (
        "caption loss",
        "captioning weight",
        "validation",
        "worth of the picture",
        "1.500",
    ):
        assert text in html
    both = objectives.make([run_of(1.5), record("other")]).render()
    assert "n/a" in both


def test_the_gallery_shows_what_the_decoder_writes_escaped():
    picture = Picture(0, "data:,", "<b>a fox")
    shown = render_gallery("", [Exhibit(picture, "fox", [Answer("fox", 0.5, True)])], "")
    assert "the decoder writes</span> &lt;b&gt;a fox" in shown
    assert "in orange" not in shown
    picture = Picture(0, "data:,", "a fox", "<i>its tail")
    shown = render_gallery("", [Exhibit(picture, "fox", [Answer("fox", 0.5, True)])], "")
    assert "in green the place of</span> &lt;i&gt;its tail" in shown
    silent = render_gallery("", [Exhibit(Picture(0, ""), "fox", [Answer("fox", 0.5, True)])], "")
    assert "the decoder" not in silent


def test_the_training_curve_is_that_of_the_pairwise_loss():
    """The whole loss is no number to set beside the validation loss."""
    run = record(series={"train/loss": [9.0, 9.0, 9.0], "train/pair_loss": [3.0, 2.0, 1.0]})
    assert "Training loss 3 at step 0" in training.judge(run).reason


def test_what_was_learned_of_teachers_is_told_and_drawn():
    def run_with(loss, kl, gain):
        values = {"loss": loss, "kl": kl, "gain": gain}
        series = {f"train/distillation_{name}": [each] * 4 for name, each in values.items()}
        return record(series={**series, "train/loss": [9.0] * 4, "train/base_loss": [2.0] * 4})

    good = objectives.judge_distillation(run_with(2.0, 0.5, 1.5))
    assert (good.tone, good.text) == ("good", "The student has 75 % of what the teachers tell.")
    assert "costs 3.5" in good.reason
    assert "than a guess" in objectives.judge_distillation(run_with(4.0, 2.5, -0.5)).text
    assert "than the labels" in objectives.judge_distillation(run_with(1.0, 0.99, 3.0)).text
    assert objectives.judge_distillation(record()) is None
    assert objectives.make_distillation([record()]) is None
    html = objectives.make_distillation([run_with(2.0, 0.5, 1.5), record("other")]).render()
    assert "kl divergence" in html
    # The loss of pairs alone compares with that of the validation.
    assert training._training_loss(run_with(2.0, 0.5, 1.5)).last == 2.0
