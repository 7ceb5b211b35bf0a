"""A run at prefixes of the dimension: trained on two ranks, measured, shown, exported, embedded."""

import json

import numpy as np
import pytest
import yaml

from dist_siglip.cli import main
from dist_siglip.runs import RunFolder
from dist_siglip.training.module.trained import load_trained
from tests.support.command import write_settings
from tests.support.forked_runs import run_forked
from tests.support.tiny_models import ARCHITECTURES

WIDTH = ARCHITECTURES["clip"]["embed_dim"]
DIMS = [WIDTH, WIDTH // 2]


def settings_with(folder, dims, **trainer):
    path = write_settings(folder, **trainer)
    content = yaml.safe_load(path.read_text())
    content["model"]["loss"] = {
        "class_path": "dist_siglip.losses.MatryoshkaLoss",
        "init_args": {"dims": dims, "separate_logits": True},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.e2e
def test_a_run_at_prefixes_is_measured_resumed_exported_and_embedded(tmp_path, capsys):
    settings = settings_with(tmp_path, DIMS, max_steps=8, devices=2, val_check_interval=4)
    done = run_forked("fit", "--config", settings, "--trainer.max_steps=8", world_size=2)
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "run")
    metrics = json.loads((run.evaluation / "metrics.json").read_text())
    whole, half = (f"prefix_{dim}_image_to_text_recall@1" for dim in DIMS)
    assert metrics[whole] == metrics["image_to_text_recall@1"]
    assert 0 <= metrics[half] <= 1
    assert "In fewer dimensions" in run.report.read_text()
    assert main(["capacity", f"--run_dir={run.path}", "--json=true"]) == 0
    assert set(json.loads(capsys.readouterr().out)["prefixes"]) == {str(dim) for dim in DIMS}

    trained = load_trained(run_dir=str(run.path))
    assert trained.prefix_dims == tuple(DIMS)
    out = tmp_path / "exported"
    assert main(["export", f"--run_dir={run.path}", "--to=safetensors", f"--out={out}"]) == 0
    assert json.loads((out / "export.json").read_text())["matryoshka_dims"] == DIMS
    assert f"the first {WIDTH}, {WIDTH // 2} dimensions" in (out / "README.md").read_text()

    shards = yaml.safe_load(settings.read_text())["data"]["val_shards"]
    words = [*(shards if isinstance(shards, list) else [shards])]
    words += [f"--out={tmp_path / 'rows'}", f"--run_dir={run.path}", f"--dim={WIDTH // 2}"]
    assert main(["embed", *words, "--workers=0", "--rotate=pca"]) == 0
    rows = np.load(next((tmp_path / "rows" / "img_emb").glob("*.npy")))
    assert rows.shape[1] == WIDTH // 2
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=1e-3)


def test_a_prefix_larger_than_the_dimension_is_refused_before_the_run(tmp_path):
    settings = settings_with(tmp_path, [WIDTH * 2, WIDTH])
    done = run_forked("fit", "--config", settings)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "error" in line]
    assert f"a prefix of {WIDTH * 2} columns is more than the {WIDTH} that" in said[-1]
