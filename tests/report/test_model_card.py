"""The card of a run says what its folder says, and nothing of the machine."""

import json

import pytest
import yaml

from dist_siglip.report.model_card import card_of_run, public
from tests.support.run_folder import write_run

SETTINGS = {
    "seed_everything": 7,
    "model": {
        "model": "hf-hub:google/siglip2-base-patch16-224",
        "loss": {
            "class_path": "dist_siglip.losses.SigLipLoss",
            "init_args": {"duplicates": "positive"},
        },
        "objectives": [
            {"class_path": "dist_siglip.objectives.Captioning", "init_args": {"weight": 0.5}}
        ],
        "teachers": [{"model": "local-dir:/secret/place/teacher", "scale": 60}],
        "optim": {"learning_rate": 0.0003, "schedule": "cosine", "warmup_steps": 5},
        "curation": {"filter_ratio": 0.5},
    },
    "data": {
        "train_sources": [
            {"name": "a", "shards": "hf://datasets/me/pairs/{00..99}.tar", "weight": 3.0},
            {"name": "b", "shards": "https://me:pass@host/b.tar?sig=12ab", "weight": 1.0},
        ],
        "val_shards": "/secret/place/val-00000.tar",
        "global_batch_size": 64,
        "on_damage": "skip",
        "stages": [
            {"class_path": "dist_siglip.data.RandomAffine", "init_args": {"translate": 0.02}},
            "mine.stages.keep_large",
        ],
    },
    "trainer": {"max_steps": 60, "gradient_clip_val": 1.0},
}


@pytest.fixture
def run_dir(tmp_path):
    folder = write_run(tmp_path / "mine")
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = "/secret/bin/dist-siglip fit --config '/secret/my place/b.yaml' --run_dir runs/mine"
    command += " --trainer.logger.init_args.api_key k3y1 --x.password=k3y2"
    said = {"command": command, "host": "secret-host", "versions": {"torch": "2.14.1"}}
    (folder / "provenance.json").write_text(json.dumps(said))
    return folder


def test_a_card_has_data_schedule_losses_results_geometry_and_limits(run_dir):
    card = card_of_run(run_dir, licence="mit")
    text = card.sections
    for words in (
        "`hf://datasets/me/pairs/{00..99}.tar (weight 3.0)`",
        "- Before the crop: `RandomAffine` (translate 0.02).",
        "- Before the crop: `keep_large`.",
        "3,840 pairs were seen: 2 epochs of about 1,920 pairs",
        "3 samples could not be used",
        "| filter: damaged shards | skip |",
        "| filter: share of each batch that does not train (curation) | 0.5 |",
        "`SigLipLoss` (duplicates positive)",
        "`Captioning` (weight 0.5)",
        "Teacher: `local-dir:teacher`",
        "| learning rate | 0.0003 |",
        "| steps | 60 |",
        "| val-00000.tar | image_to_text_recall@1 | 0.6230 |",
        "| handwriting | image_retrieval_recall@5 | 0.7500 |",
        "one gallery of 120 pairs",
        "dist-siglip validate --config RUN/config.yaml",
        "dist-siglip fit --config b.yaml --run_dir runs/mine",
        "| modality gap | 0.5120 |",
        "| margin | -0.1230 |",
        "| relative bias | 0.3450 |",
        "| logit bias | -8.0000 |",
        "## Limits",
        "not sound: 1.",
        "torch 2.14.1",
    ):
        assert words in text, words
    assert (card.name, card.licence) == ("mine", "mit")
    assert card.datasets == ("me/pairs",)
    assert card.base_model == "google/siglip2-base-patch16-224"
    validation, benchmark = card.results
    assert validation.metrics["text_to_image_recall@10"] == 0.938
    assert benchmark == ("image-text-retrieval", "handwriting", {"image_retrieval_recall@5": 0.75})


def test_a_card_tells_nothing_of_the_machine(run_dir):
    card = card_of_run(run_dir)
    for secret in ("/secret", "secret-host", "place", "me:pass", "12ab", "k3y"):
        assert secret not in card.sections
        assert not any(secret in each.dataset for each in card.results)


def test_a_run_without_evaluation_says_so(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 3, "train/loss": 1.0}\n')
    card = card_of_run(folder)
    assert card.results == ()
    for words in ("Nothing was measured.", "were not evaluated", "- not known", "not known"):
        assert words in card.sections


@pytest.mark.parametrize(
    ("step", "average", "reason"),
    [
        (40, None, "of step 60; the weights are of step 40"),
        (-1, None, "of step 60; of which step the weights are is not known"),
        (60, False, "of the average that the run keeps; the weights are those it was made of"),
    ],
)
def test_results_of_other_weights_are_left_out(run_dir, step, average, reason):
    averaging = [{"class_path": "dist_siglip.training.callbacks.WeightAverage"}]
    said = {**SETTINGS, "trainer": {**SETTINGS["trainer"], "callbacks": averaging}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(said))
    whole = card_of_run(run_dir, step=60, weights_average=True)
    assert whole == card_of_run(run_dir)
    card = card_of_run(run_dir, step=step, weights_average=average)
    assert card.results == ()
    assert f"Left out: what was measured {reason}." in card.sections
    assert "Left out" not in whole.sections
    for words in (
        "0.6230",
        "0.7500",
        "## Geometry",
        "dist-siglip validate",
    ):
        assert words in whole.sections
        assert words not in card.sections
    assert "nobody knows how good they are" in card.sections
    trained = {40: "2,560 pairs were seen: 1.33 epochs", 60: "3,840 pairs were seen: 2 epochs"}
    assert trained.get(step, ", trained.\n") in card.sections
    assert ("pairs were seen" in card.sections) is (step > 0)


def test_a_benchmark_of_another_step_alone_is_left_out(run_dir):
    path = run_dir / "benchmarks" / "handwriting.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"step": 20}))
    card = card_of_run(run_dir, step=60)
    assert [each.dataset for each in card.results] == ["val-00000.tar"]
    assert "Left out: what was measured of step 20; the weights are of step 60." in card.sections
    assert "no data set but the run's own validation pairs" in card.sections


@pytest.mark.parametrize(
    ("model", "more", "shown"),
    [
        ("ViT-B-32", {}, "from random weights"),
        ("ViT-B-32", {"pretrained": "openai"}, "from `openai`"),
        ("hf-hub:me/model", {}, "from its own weights"),
        ("local-dir:/secret/model", {}, "from its own weights"),
        ("tiny.json", {}, "from random weights, but for those that its config names"),
        ("ViT-B-32", {"from_run": "/secret/first:500"}, "from run `first:500`"),
        ("ViT-B-32", {"pretrained": "openai", "from_run": "a"}, "from run `a`"),
    ],
)
def test_a_card_says_what_training_began_with(run_dir, model, more, shown):
    pretrained, from_run = more.get("pretrained"), more.get("from_run")
    said = {**SETTINGS, "from_run": from_run, "model": {"model": model, "pretrained": pretrained}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(said))
    assert f", {shown}, trained to step 60." in card_of_run(run_dir).sections


def test_a_run_that_was_measured_on_benchmarks_alone_was_evaluated(run_dir):
    (run_dir / "evaluation" / "metrics.json").write_text("{}")
    text = card_of_run(run_dir).sections
    assert "| handwriting | image_retrieval_recall@5 | 0.7500 |" in text
    assert "not evaluated" not in text


def test_settings_cannot_break_the_tables(run_dir):
    broken = "<img src=x> | [a](b)\n# c"
    data = {**SETTINGS["data"], "on_damage": broken, "picture_id": r"\<b> \| \[c](d)"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "data": data}))
    text = card_of_run(run_dir).sections
    assert r"| \\\<b> \\\| \\\[c](d) |" in text
    assert "| \\<img src=x> \\| \\[a](b)\N{REPLACEMENT CHARACTER}# c |" in text


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("/home/jane/a b/x.tar", "x.tar"),
        ("file:///home/jane/x.tar", "x.tar"),
        ("~jane/x.tar", "x.tar"),
        ("../../jane/x.tar", "x.tar"),
        (
            "['/home/jane/x.tar', 'hf://datasets/me/set/y.tar']",
            "['x.tar', 'hf://datasets/me/set/y.tar']",
        ),
        (["/home/jane/x.tar", "s3://bucket/{a,b}/c/d.tar"], "x.tar, s3://bucket/{a,b}/c/d.tar"),
        ("pipe:cat /home/jane/d/x.tar | gzip", "pipe:cat x.tar | gzip"),
        ("--config=/home/jane/x.yaml", "--config=x.yaml"),
        ("google/siglip2-base", "google/siglip2-base"),
        ("https://me:pass@host/a-/b/c.tar?sig=1", "https://host/a-/b/c.tar?..."),
        ("a`b\nc", "a'b\N{REPLACEMENT CHARACTER}c"),
    ],
)
def test_settings_are_cut_to_what_strangers_may_see(setting, shown):
    assert public(setting) == shown
