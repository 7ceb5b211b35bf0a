"""``bench train --objectives`` measures each beside the loss alone, and counts its operations."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from dist_siglip.bench import train_objectives
from dist_siglip.bench.data import write_photo_shards
from dist_siglip.bench.train_runs import TrainCase, TrainSpeed, run_ours
from dist_siglip.cli import main
from tests.support.tiny_models import ARCHITECTURES, write_config

CONFIGURED = """
data:
  captions: {members: [txt, json], weights: {txt: 1, long: 2}}
  regions: {json_field: regions}
model:
  curation: {filter_ratio: 0.75}
  teachers: []
  loss: {class_path: dist_siglip.losses.MatryoshkaLoss, init_args: {dims: [8, 4]}}
  optim: {learning_rate: 1}
  objectives:
    - class_path: dist_siglip.objectives.Captioning
      init_args: {layers: 2, start: 0.8, ramp_steps: 9}
    - {class_path: mine.Objective}
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    model = write_config(folder / "tiny.json", ARCHITECTURES["clip"])
    shards = write_photo_shards(folder / "photos", (96, 80), 48, 2, record=train_objectives.RECORD)
    return ["bench", "train", f"--model={model}", f"--shards={json.dumps(shards)}"]


@pytest.fixture
def pretended(monkeypatch):
    """Runs of known speed; the machine is half as fast in the second round."""
    seen = []
    alone, others = iter([100.0, 50.0, 100.0]), defaultdict(lambda: iter([50.0, 20.0, 40.0]))

    def ours(case, folder, more):
        seen.append(more)
        rate = next(others[json.dumps(more)] if more else alone)
        shares = {"data": 0.1, "towers": 0.6, "loss": 0.1, "optimizer": 0.1, "rest": 0.1}
        if more:
            shares |= {"towers": 0.7, "data": 0.0}
        worked = 0.9 if more else 0.3
        return TrainSpeed(
            samples_per_second=rate, shares=shares, peak_bytes=2**30, processor_seconds=worked
        )

    def embed(command, case, name):
        assert command[-1] == f"--device={case.device}"
        seen.append(command[3:5])

    monkeypatch.setattr(train_objectives, "run_ours", ours)
    monkeypatch.setattr(train_objectives, "run_command", embed)
    return seen


def test_a_ratio_is_that_of_two_runs_of_one_round(arguments, pretended, capsys):
    assert main([*arguments, "--objectives=captioning", "--json=true"]) == 0
    alone, captioning = json.loads(capsys.readouterr().out)
    assert (alone["objective"], alone["ratio"], alone["predicted_ratio"]) == ("sigmoid alone", 1, 1)
    found = [captioning[key] for key in ("least_ratio", "ratio", "most_ratio")]
    assert found == [2.0, 2.5, 2.5]
    assert captioning["computed_ratio"] == pytest.approx(2.5 * 0.8 / 0.7)
    assert captioning["processor_ratio"] == pytest.approx(3)
    assert captioning["step_seconds"] == pytest.approx(64 / 40)
    whole = sum(part["forward"] * part["times"] for part in captioning["parts"])
    part = sum(part["forward"] * part["times"] for part in alone["parts"])
    assert captioning["predicted_ratio"] == whole / part
    assert [bool(more) for more in pretended] == [False, True] * 3


def test_all_are_measured_by_turns_and_printed(arguments, pretended, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*arguments, "--objectives=all"]) == 0
    printed = capsys.readouterr().out
    for word in ("captioning", "matryoshka", "2.50", "1,024 MiB", "decoder, logits", "over that"):
        assert word in printed
    (command, shards), *runs = pretended
    assert (command, len(json.loads(shards))) == ("embed", 2)
    assert runs[: len(runs) // 3] * 3 == runs
    (live,) = runs[4]["model"]["teachers"]
    assert Path(live["pretrained"]).suffix == ".safetensors"


def test_a_configuration_is_measured_entry_by_entry(arguments, pretended, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIGURED)
    assert main([*arguments, f"--objectives={config}", "--rounds=1", "--json=true"]) == 0
    names = [
        "sigmoid alone",
        "captions",
        "curation",
        "MatryoshkaLoss",
        "Captioning",
        "Objective",
        "together",
    ]
    rows = json.loads(capsys.readouterr().out)
    assert [row["objective"] for row in rows] == names
    _, captions, curation, nested, captioning, mine, _ = rows
    assert min(row["predicted_ratio"] for row in (captions, curation, nested, captioning)) > 1
    assert (mine["objective"], mine["predicted_ratio"], mine["parts"]) == ("Objective", None, None)
    _, of_captions, of_curation, of_loss, of_captioning, _, together = pretended
    # As many pairs train as without.
    assert of_curation["data"] == {"global_batch_size": 4 * 64}
    assert of_curation["model"]["curation"] == {"filter_ratio": 0.75}
    assert of_captions["data"]["captions"]["weights"] == {"txt": 1, "long": 2}
    assert of_loss["model"].keys() == {"loss", "teachers"}
    (entry,) = of_captioning["model"]["objectives"]
    assert entry["init_args"] == {"layers": 2}  # from the first step on
    assert together["model"]["objectives"][0] == entry
    assert together["model"]["loss"] == of_loss["model"]["loss"]
    assert of_captioning["data"] == {"regions": {"json_field": "regions"}}
    assert main([*arguments, f"--objectives={config}", "--rounds=1"]) == 0
    assert "not known" in capsys.readouterr().out


def test_operations_are_counted_without_a_run(arguments, pretended, capsys):
    assert main([*arguments, "--objectives=matryoshka", "--count_only=true"]) == 0
    assert "operations of a pair" in capsys.readouterr().out
    assert not pretended


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objectives=no"], "objectives (no) must be of all, captioning, matryoshka"),
        (["--objectives=no.yaml"], "objectives (no.yaml) cannot be read"),
        (["--count_only=true"], "count_only (true) counts objectives"),
        (["--objectives=all", "--open_clip_python=sh"], "exclude each other"),
    ],
)
def test_a_mistake_is_one_line(arguments, options, message, capsys):
    assert main([*arguments, *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}", "has neither model.objectives nor model.loss"),
        ("- 1", "has neither"),
        ("model: {objectives: [3]}", "an entry without class_path: 3"),
        ("{", "cannot be read"),
        ("model: {curation: {filter_ratio: 1}}", "curation.filter_ratio (1) must be between"),
        ("model: {curation: {share: 1}}", "has a curation that cannot be"),
    ],
)
def test_a_configuration_without_objectives_is_one_line(arguments, tmp_path, text, message, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(text)
    assert main([*arguments, f"--objectives={config}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("names", "logged"),
    [
        (
            ["captioning, 3 tasks", "matryoshka", "two captions"],
            ["train/grounded_loss", "train/pair_loss_long"],
        ),
        (["live teacher", "stored teacher"], ["train/distillation_kl"]),
        (["curation, stored reference"], ["train/curation_learnability"]),
    ],
)
def test_settings_of_objectives_reach_their_runs(arguments, tmp_path, names, logged):
    case = TrainCase(
        world_size=1,
        model=arguments[2].removeprefix("--model="),
        shards=tuple(json.loads(arguments[3].removeprefix("--shards="))),
        local_batch_size=4,
        workers=1,
        threads=1,
        precision="32-true",
        device="cpu",
        compile_towers=False,
        warmup_steps=10,
        steps=10,
    )
    merged = {"model": {"teachers": []}, "data": {}}
    for variant in train_objectives.choose_variants(names, case, tmp_path, has_records=True):
        teachers = merged["model"]["teachers"]
        for group, values in variant.settings.items():
            merged[group] |= values
        merged["model"]["teachers"] = teachers + variant.settings.get("model", {}).get(
            "teachers", []
        )
    run_ours(case, tmp_path, merged)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert set(logged) <= json.loads(lines[-1]).keys()
