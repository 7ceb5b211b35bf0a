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
    },
    "trainer": {"max_steps": 60, "gradient_clip_val": 1.0},
}


@pytest.fixture
def run_dir(tmp_path):
    folder = write_run(tmp_path / "mine")
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = "/secret/bin/dist-siglip fit --config '/secret/my place/b.yaml' --run_dir runs/mine"
    said = {"command": command, "host": "secret-host", "versions": {"torch": "2.14.1"}}
    (folder / "provenance.json").write_text(json.dumps(said))
    return folder


def test_a_card_has_data_schedule_losses_results_geometry_and_limits(run_dir):
    card = card_of_run(run_dir, licence="mit")
    text = card.sections
    for words in (
        "`hf://datasets/me/pairs/{00..99}.tar (weight 3.0)`",
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
    for secret in ("/secret", "secret-host", "place", "pass", "12ab"):
        assert secret not in card.sections
        assert not any(secret in each.dataset for each in card.results)


def test_a_run_without_evaluation_says_so(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 3, "train/loss": 1.0}\n')
    card = card_of_run(folder)
    assert card.results == ()
    for words in ("Nothing was measured.", "not evaluated", "- not known", "not known"):
        assert words in card.sections


def test_settings_cannot_break_the_tables(run_dir):
    said = {**SETTINGS, "data": {**SETTINGS["data"], "on_damage": "<img src=x> | [a](b)\n# c"}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(said))
    text = card_of_run(run_dir).sections
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
